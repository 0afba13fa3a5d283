"""How a live state and a checkpoint differ, on one rank and on all of them together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shardckpt.errors import StateMismatchError


@dataclass(slots=True)
class Differences:
    """How a live state and a checkpoint differ, as lines for a person; empty where they match."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def check(self, where: str, *, strict: bool) -> None:
        """Raise StateMismatchError that names every difference, if ``strict``."""
        lines = [f"  missing from the checkpoint: {name}" for name in self.missing]
        lines += [f"  in the checkpoint only: {name}" for name in self.unexpected]
        lines += [f"  {line}" for line in self.mismatched]
        if strict and lines:
            raise StateMismatchError(
                f"the checkpoint {where} does not match the live state, and nothing has been changed:\n"
                + "\n".join(lines)
                + "\nPass strict=False (a LightningModule: strict_loading) to restore what matches and report the rest."
            )


def together(ranks: Sequence[Differences], rank: int) -> tuple[Differences, Differences]:
    """The differences of all ranks as one verdict, and those that concern ``rank``.

    A rank may lack what others have (a pipeline's stage, a mesh on some ranks only), so what a checkpoint has is
    unexpected only where no rank has a place for it. Everything else counts if it is so on any rank, and the verdict
    says on which.
    """
    lacking = [_Lacking(found) for found in ranks]
    found_unexpected = dict.fromkeys(name for found in ranks for name in found.unexpected)
    unexpected = [name for name in found_unexpected if all(name in own for own in lacking)]
    verdict = Differences(
        _with_ranks([found.missing for found in ranks]),
        unexpected,
        _with_ranks([found.mismatched for found in ranks]),
    )
    return verdict, replace(ranks[rank], unexpected=[name for name in unexpected if name in lacking[rank]])


class _Lacking:
    """The names for which a rank has no place."""

    def __init__(self, found: Differences) -> None:
        self._whole = {*found.unexpected, *found.skipped}

    def __contains__(self, name: str) -> bool:
        # What a rank lacks altogether it has not looked into.
        while name not in self._whole:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return False
        return True


def _with_ranks(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of all ranks, each once; one that is not so on every rank says where it is."""
    counts = Counter(line for own in lines for line in dict.fromkeys(own))
    found = []
    for line, count in counts.items():
        holders = [str(rank) for rank, own in enumerate(lines) if line in own]
        where = f" (on rank{'s' if count > 1 else ''} {', '.join(holders)})" if count < len(lines) else ""
        found.append(line + where)
    return found
