"""Two checkpoints beside each other: what stands where, and how far apart their tensors are. Nothing is unpickled."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from shardckpt.errors import UsageError
from shardckpt.manifest import Manifest, TensorEntry
from shardckpt.options import Path
from shardckpt.planner import Wanted
from shardckpt.staging import StagingPool
from shardckpt.state.names import unique
from shardckpt.state.selection import Selection
from shardckpt.state.values import tag_of
from shardckpt.tools.numbers import doubles, octets, stretches
from shardckpt.tools.opened import Opened, Progress, open_checkpoint, unheard
from shardckpt.tools.streaming import batches, read
from shardckpt.tools.tree import Node, text_of, tree_of

Number = int | float


@dataclass(frozen=True)
class Change:
    """A place where both have something that is not the same: a plain value, a pickled object, or another kind."""

    path: str
    a: str
    b: str


@dataclass
class TensorDifference:
    """One tensor that both have."""

    path: str
    a: str
    """Dtype and shape."""
    b: str
    verdict: Literal["equal", "differs", "dtype", "shape"]
    """Equal is equal bit for bit. Under another dtype numbers are compared, under another shape nothing is."""
    differing: int = 0
    """Elements whose bits differ, or under another dtype their numbers."""
    max_abs: Number | None = None
    """The largest absolute difference where both are finite, exact for integers; None where none was found."""
    not_finite: int = 0
    """Of the elements that differ, those where one of the two is infinite or NaN."""


@dataclass
class Comparison:
    """What `diff` found. A container that only one of them has stands for all that is in it."""

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    changed: list[Change]
    tensors: list[TensorDifference] = field(default_factory=list)
    """All that both have, in the order of the first."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_a or self.only_b or self.changed) and all(t.verdict == "equal" for t in self.tensors)


class Place(NamedTuple):
    """A node, and the path of the node that it lies in."""

    node: Node
    parent: str | None


def diff(
    a: Path,
    b: Path,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress = unheard,
) -> Comparison:
    """Compare two checkpoints, however many ranks saved each; tensors are streamed, and verified as they are read.

    ``include`` and ``exclude`` are patterns of places as for a save. Raises what opening and reading a checkpoint do,
    and UsageError where ``include`` matches nothing.
    """
    first, second = open_checkpoint(a, storage_options), open_checkpoint(b, storage_options)
    selection = Selection(include, exclude)
    ours, theirs = _places(first.manifest, selection), _places(second.manifest, selection)
    if include and not (ours or theirs):
        raise UsageError(f"include={list(include)} matches nothing in {first.path} or {second.path}.")
    found = Comparison(first.path, second.path, _missing(ours, theirs), _missing(theirs, ours), [])
    tensors: dict[tuple[str, str], list[TensorDifference]] = defaultdict(list)
    for path, (node, _) in ours.items():
        if path not in theirs:
            continue
        other = theirs[path].node
        if node.kind == other.kind and node.tensor is not None and other.tensor is not None:
            difference, names = _heads(path, first.manifest, node.tensor, second.manifest, other.tensor)
            found.tensors.append(difference)
            tensors[names].append(difference)
        elif _mark(first.manifest, node) != _mark(second.manifest, other):
            found.changed.append(Change(path, _text(first.manifest, node), _text(second.manifest, other)))
    # Two names of one tensor are one comparison.
    _compare(first, second, {names: same[0] for names, same in tensors.items() if same[0].verdict != "shape"}, progress)
    for same in tensors.values():
        for other_name in same[1:]:
            for part in ("verdict", "differing", "max_abs", "not_finite"):
                setattr(other_name, part, getattr(same[0], part))
    return found


def _places(manifest: Manifest, selection: Selection) -> dict[str, Place]:
    found: dict[str, Place] = {}

    def walk(node: Node, parent: str | None) -> None:
        path = unique(node.path, found.__contains__)
        found[path] = Place(node, parent)
        for child in node.children:
            walk(child, path)

    walk(tree_of(manifest), None)
    return {path: place for path, place in found.items() if selection(path)}


def _missing(places: Mapping[str, Place], others: Mapping[str, Place]) -> list[str]:
    missing = {path for path in places if path not in others}
    return [path for path in places if path in missing and places[path].parent not in missing]


def _heads(path: str, a: Manifest, a_name: str, b: Manifest, b_name: str) -> tuple[TensorDifference, tuple[str, str]]:
    ours, theirs = _entry(a, a_name), _entry(b, b_name)
    verdict: Literal["equal", "dtype", "shape"] = "equal"
    if ours.shape != theirs.shape:
        verdict = "shape"
    elif ours.dtype != theirs.dtype:
        verdict = "dtype"
    names = a.aliases.get(a_name, a_name), b.aliases.get(b_name, b_name)
    return TensorDifference(path, _head(ours), _head(theirs), verdict), names


def _entry(manifest: Manifest, name: str) -> TensorEntry:
    entry = manifest.resolve(name)
    assert entry is not None, "the skeleton has been checked"
    return entry


def _head(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _mark(manifest: Manifest, node: Node) -> tuple[Any, ...]:
    """What has to be the same at a place, besides what lies in it."""
    if node.kind == "object":
        entry = manifest.objects[node.value]
        return node.kind, entry.nbytes, entry.digest
    # As JSON, since to Python 1, 1.0 and True are equal.
    return node.kind, msgspec.json.encode(_in_order(node.value))


def _in_order(value: Any) -> Any:
    """A plain value with its sets sorted: they are stored as the saving process happened to hash them."""
    if isinstance(value, list):
        return [_in_order(item) for item in value]
    if not isinstance(value, dict):
        return value
    ordered = {key: _in_order(item) for key, item in value.items()}
    tag = tag_of(value)
    return {tag: sorted(ordered[tag], key=msgspec.json.encode)} if tag in ("$set", "$frozenset") else ordered


def _text(manifest: Manifest, node: Node) -> str:
    if node.tensor is not None:
        return f"{node.kind} {_head(_entry(manifest, node.tensor))}"
    if node.kind == "object":
        entry = manifest.objects[node.value]
        return f"pickled object, {entry.nbytes:,} bytes, xxh3 {entry.digest}"
    if node.kind == "value":
        return text_of(node.value)
    return node.kind if node.value is None else f"{node.kind} {text_of(node.value)}"


def _compare(a: Opened, b: Opened, pairs: Mapping[tuple[str, str], TensorDifference], progress: Progress) -> None:
    partners: defaultdict[str, list[str]] = defaultdict(list)
    for ours, theirs in pairs:
        partners[ours].append(theirs)
    total, done = sum(sum(a.manifest.tensors[name].nbytes) for name in partners), 0
    pool = StagingPool()
    try:
        for batch in batches(a.manifest, partners):
            tensors = read(a, batch, pool)
            # Ties that only one of them has: a tensor of the first is held against several of the second.
            for turn in range(max(len(partners[name]) for name, _ in batch)):
                asked = [
                    (name, box, t) for (name, box), t in zip(batch, tensors, strict=True) if turn < len(partners[name])
                ]
                wanted = [Wanted(partners[name][turn], box) for name, box, _ in asked]
                for (name, _, ours_part), item, theirs_part in zip(asked, wanted, read(b, wanted, pool), strict=True):
                    _add(pairs[name, item.fqn], ours_part, theirs_part)
            done += sum(tensor.nbytes for tensor in tensors)
            progress(min(done, total), total)
    finally:
        pool.close()
    for difference in pairs.values():
        if difference.differing and difference.verdict == "equal":
            difference.verdict = "differs"
        elif not difference.differing:
            difference.max_abs = 0


def _add(found: TensorDifference, a: Tensor, b: Tensor) -> None:
    for ours, theirs in stretches(a, b):
        if a.dtype == b.dtype:
            differing = (octets(ours) != octets(theirs)).any(1)
            if not differing.any():
                continue
            # Chosen as bytes, since not every dtype can be indexed.
            ours, theirs = (octets(part)[differing].reshape(-1).view(part.dtype) for part in (ours, theirs))
            found.differing += len(ours)
            if not (a.is_floating_point() or a.is_complex()):
                _note(found, _integers_apart(ours, theirs))
                continue
            x, y = doubles(ours), doubles(theirs)
        else:
            x, y = _same_width(doubles(ours), doubles(theirs))
            differing = ((x != y) & ~(x.isnan() & y.isnan())).any(1)
            x, y = x[differing], y[differing]
            found.differing += len(x)
        finite = x.isfinite().all(1) & y.isfinite().all(1)
        found.not_finite += int((~finite).sum())
        apart = x[finite] - y[finite]
        if len(apart):
            is_complex = a.is_complex() or b.is_complex()
            _note(found, float((torch.hypot(apart[:, 0], apart[:, 1]) if is_complex else apart.abs()).max()))


def _same_width(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Real numbers beside complex ones, as such without an imaginary part."""
    wide = max(x.shape[1], y.shape[1])
    padded = [torch.nn.functional.pad(part, (0, wide - part.shape[1])) for part in (x, y)]
    return padded[0], padded[1]


def _note(found: TensorDifference, apart: Number) -> None:
    found.max_abs = apart if found.max_abs is None else max(found.max_abs, apart)


def _integers_apart(a: Tensor, b: Tensor) -> int:
    """The largest difference between integers or booleans of one dtype, exactly."""
    x, y = _ordered(a), _ordered(b)
    # It fits into 64 bits without a sign: what wraps around to a negative number is 2^64 more than that.
    apart = torch.maximum(x, y) - torch.minimum(x, y)
    wrapped = apart[apart < 0]
    return int(wrapped.max()) + (1 << 64) if len(wrapped) else int(apart.max())


def _ordered(integers: Tensor) -> Tensor:
    """As int64, in the same order and as far apart."""
    if integers.dtype != torch.uint64:
        return integers.to(torch.int64)
    return integers.view(torch.int64) ^ torch.iinfo(torch.int64).min
