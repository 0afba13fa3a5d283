"""What a run of a suite is asked for, and the processes that it starts for it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.record import Target

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """The command line, as the suites and every rank of theirs see it."""

    suite: str
    size: str
    ranks: int | None
    """None: as many as the suite takes by itself."""
    storage: str
    repeats: int
    """Counted ones; each is preceded by a warm-up that is recorded and left out of the medians."""
    folder: Path
    """Where the checkpoints go: on the disk to measure. Emptied."""
    only: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    gib: tuple[float, ...] = ()

    def wants(self, contender: str) -> bool:
        """Whether ``--only`` lets it take part."""
        return not self.only or any(part.lower() in contender.lower() for part in self.only)

    def wants_layout(self, layout: str) -> bool:
        return not self.layouts or layout in self.layouts

    def sizes(self, *, small: float, full: tuple[float, ...]) -> tuple[float, ...]:
        """GiB of state, of all ranks together."""
        return self.gib or ((small,) if self.size == "small" else full)

    def text(self) -> str:
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @classmethod
    def of_text(cls, text: str) -> "Options":
        fields: dict[str, Any] = json.loads(text)
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **tuples, "folder": Path(fields["folder"])})


@dataclass(frozen=True)
class Launch:
    """One job of ``ranks`` processes, each of which calls the suite's ``work(bench, **arguments)``."""

    ranks: int
    arguments: dict[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """A module of `benchmarks.suites`. The first line of its docstring is what ``--list`` says."""

    TARGETS: tuple[Target, ...]

    def launches(self, options: Options) -> Iterable[Launch]: ...

    def work(self, bench: Any, **arguments: Any) -> None: ...


def size_text(gib: float) -> str:
    return f"{gib:g} GiB" if gib >= 1 else f"{gib * 1024:g} MiB"
