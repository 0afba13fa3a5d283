"""How the ranks come to one verdict on a save, and what is said of one that failed."""

import logging
import traceback
from collections.abc import Callable

from shardckpt.coordinator import Operation
from shardckpt.errors import RankTimeoutError, SaveFailedError, ShardckptError, UncertainCommitError

log = logging.getLogger(__name__)


def settle(
    operation: Operation, word: bytes | Exception, timeout: float, conclude: Callable[[list[bytes]], bytes]
) -> bytes:
    """The second half of a commit: every rank says how it went, rank 0 concludes, every rank hears the verdict."""
    operation.post("written", word)
    if operation.rank != 0:
        return operation.hear("written", timeout)
    try:
        verdict = conclude(operation.collect("written", timeout))
    except Exception as error:
        operation.announce("written", error)
        raise
    except BaseException as error:
        uncertain = UncertainCommitError(
            f"rank 0 was interrupted by {type(error).__name__} in the commit, which may have been made; load it to see."
        )
        operation.announce("written", uncertain)
        raise uncertain from error
    try:
        operation.announce("written", verdict)
        operation.see_off("written")
    except RankTimeoutError as error:  # the commit stands, whether or not the others hear of it
        log.warning("committed, but the other ranks could not be told: %s", error)
    return verdict


def failure(path: str, error: BaseException, *, unheard: bool = False) -> SaveFailedError:
    """What a failed save raises: the cause, and what is still safe. ``unheard``: rank 0 may yet commit it."""
    if isinstance(error, UncertainCommitError):
        return error
    if unheard:
        uncertain = UncertainCommitError(
            f"this rank never heard whether the save to {path} was committed, so it may have been; load it to see."
            f" Checkpoints committed before it are intact. Cause: {error}"
        )
        uncertain.__cause__ = error
        return uncertain
    reason = str(error) if isinstance(error, ShardckptError) else f"{type(error).__name__}: {error}"
    failed = SaveFailedError(
        f"the save to {path} failed and left no checkpoint behind. Checkpoints committed before it are intact. "
        f"Cause: {reason}"
    )
    failed.__cause__ = error
    return failed


def let_go(error: BaseException | None) -> None:
    """Have an error keep nothing of what it came from: the frames of its traceback have the tensors, and the writer."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def cause_of(word: bytes | Exception, verdict: Exception, rank: int) -> Exception:
    """What a save that failed on this rank with ``word``, and on all with ``verdict``, failed of.

    An error of this rank's own, which has its traceback, unless another rank's came before: then this one may have
    come of it, since that rank clears up.
    """
    told_by = verdict.rank if isinstance(verdict, ShardckptError) else None
    return word if isinstance(word, Exception) and told_by in (None, rank) else verdict
