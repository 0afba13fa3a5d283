"""The plugins in this process: Trainers that are made while there are any get the binding's callback."""

import weakref
from typing import Any

living: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Every `ShardedCheckpointIO` that somebody still holds."""
