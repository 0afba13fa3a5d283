"""Agreement between ranks that carries errors, without a collective.

Everything goes through the c10d Store of the default process group, as keys that one rank sets and others wait for
with a timeout. A collective in a background thread would cross training's own; a Store cannot. Background threads use
a clone of the Store, its own connection: on a shared one a background ``wait`` keeps a foreground ``set`` waiting.

Like collectives, operations are matched by their order: every rank makes the same calls of shardckpt in the same order.
Each call carries its name, so a rank that makes another one is told what the others are doing instead of hanging.
"""

from shardckpt.coordinator.beginning import begin, begin_alone, rank_and_world_size
from shardckpt.coordinator.operation import Operation, Turn, taking_part, told, turn

__all__ = ["Operation", "Turn", "begin", "begin_alone", "rank_and_world_size", "taking_part", "told", "turn"]
