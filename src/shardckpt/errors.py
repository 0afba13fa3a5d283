"""Every error shardckpt raises, grouped by what the caller does about it.

.. code-block:: text

    ShardckptError
    ├── UsageError (ValueError)                      fix the call
    │   ├── UnserialisableError (TypeError)          take the object out of the state, or make it picklable
    │   └── TensorIndexError (IndexError)            an index past the end of a tensor
    ├── CheckpointNotFoundError (FileNotFoundError)  look at the path; the message names what lies beside it
    ├── TensorNotFoundError (KeyError)               nothing of that name; the message has similar ones
    ├── StateMismatchError (ValueError)              checkpoint and live state differ; nothing was changed
    ├── UnsafeLoadError                              pickled objects: trust the file, or load without them
    ├── CorruptCheckpointError                       the bytes are not what was written; use another checkpoint
    │   └── UnsupportedFormatError                   written by a newer shardckpt; upgrade
    ├── StorageError (OSError)                       the storage refused; credentials, quota, network
    │   ├── ObjectNotFoundError (FileNotFoundError)
    │   ├── ObjectExistsError (FileExistsError)      a conditional put lost its race
    │   ├── StorageAccessError (PermissionError)
    │   └── StorageFullError
    ├── ConflictingStateError (ValueError)           ranks disagree about one tensor, or about the call
    ├── RankTimeoutError (TimeoutError)              a rank did not answer; look at that rank's log
    ├── RemoteError (RuntimeError)                   another rank met an error that is not one of these
    ├── SaveFailedError (RuntimeError)               a save failed on some rank; the last checkpoint is intact
    │   └── UncertainCommitError                     the storage fell silent at the commit; look what is at the path
    └── LoadFailedError (RuntimeError)               a load failed on some rank; the message says what was changed

An error that has a builtin counterpart is one, so ``except FileNotFoundError`` works; the root is not, so
``except ShardckptError`` catches all of ours and nothing else.
"""


class ShardckptError(Exception):
    """The root of every error that shardckpt raises on purpose."""

    rank: int | None = None
    """The rank that met it, where that has told the others; None for an error of this process."""
    told_as: str | None = None
    """The name of its class on that rank, which may be one that this process does not know."""


class UsageError(ShardckptError, ValueError):
    """The call itself is wrong: an unknown option, a bad path, a closed or forked Checkpointer."""


class UnserialisableError(UsageError, TypeError):
    """A value of the state can be stored neither as a tensor, nor as a plain value, nor by pickle."""


class TensorIndexError(UsageError, IndexError):
    """An index lies outside of the stored tensor, or has more dimensions."""


class CheckpointNotFoundError(ShardckptError, FileNotFoundError):
    """No complete checkpoint lies at the path."""


class TensorNotFoundError(ShardckptError, KeyError):
    """The checkpoint has no tensor, and nothing else, of that name."""

    __str__ = Exception.__str__  # a KeyError shows its message as a key, in quotes


class StateMismatchError(ShardckptError, ValueError):
    """The checkpoint and the live state differ in names, shapes or dtypes; nothing has been changed."""


class UnsafeLoadError(ShardckptError):
    """The checkpoint holds pickled objects and ``weights_only`` forbids loading them."""


class CorruptCheckpointError(ShardckptError):
    """A file of the checkpoint is missing, short, or does not match its digest."""


class UnsupportedFormatError(CorruptCheckpointError):
    """The checkpoint was written in a format that this version of shardckpt does not know."""


class StorageError(ShardckptError, OSError):
    """The storage failed, after whatever retries its backend makes."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """A file or object does not exist."""


class ObjectExistsError(StorageError, FileExistsError):
    """A create-only or conditional put found somebody else's object in its place."""


class StorageAccessError(StorageError, PermissionError):
    """Credentials are missing, wrong or expired, or the place may not be read or written."""


class StorageFullError(StorageError):
    """The disk or the quota is full."""


class ConflictingStateError(ShardckptError, ValueError):
    """Ranks disagree: about a tensor's shape, dtype or boxes, or about which call they are making."""


class RankTimeoutError(ShardckptError, TimeoutError):
    """One or more ranks did not answer within the timeout."""

    ranks: tuple[int, ...] = ()
    """Those that were waited for, where that is known."""


class RemoteError(ShardckptError, RuntimeError):
    """Another rank met an error that is none of ours: out of memory, a bug in a ``state_dict`` hook."""


class SaveFailedError(ShardckptError, RuntimeError):
    """A save failed on some rank. Checkpoints committed before it are intact."""


class UncertainCommitError(SaveFailedError):
    """The storage failed in the act of the commit. New or old, what lies at the path is whole."""


class LoadFailedError(ShardckptError, RuntimeError):
    """A load failed on some rank. The message says whether the live state was touched."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, without the traceback that some carry in their message."""
    return str(error).strip().partition("\n")[0]
