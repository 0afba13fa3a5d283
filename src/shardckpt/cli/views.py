"""What each command shows to people."""

from collections.abc import Mapping, Sequence

from rich.text import Text
from rich.tree import Tree

from shardckpt.cli.screen import ago, number, printable, row, shorten, show, table
from shardckpt.reports import VerifyReport, size_text
from shardckpt.tools import (
    Comparison,
    ConvertReport,
    CopyReport,
    Inspection,
    Listed,
    Node,
    Pruned,
    TensorStats,
    age,
    text_of,
)
from shardckpt.tools.inspection import TensorInfo

_VALUE_WIDTH = 48
"""Characters of a plain value that a tree shows."""
_NAMED = 8
"""Places that a sentence names."""
_STYLES = {"complete": "green", "saving": "yellow"}


def listed(found: Sequence[Listed], path: str) -> None:
    if not found:
        show(f"no checkpoints in {path}")
        return
    made = table("checkpoint", "step", "age", "size", "ranks", "status", numbers=("step", "age", "size", "ranks"))
    for item in found:
        status = Text(item.status, style=_STYLES.get(item.status, "red"))
        row(made, item.name, item.step, ago(age(item)), size_text(item.nbytes), item.world_size, status)
    show(made)
    problems = [f"{item.name}: {item.problem}" for item in found if item.problem]
    if problems:
        show("", *problems)


def inspected(found: Inspection, depth: int | None) -> None:
    took = "" if found.save_seconds is None else f", in {found.save_seconds:.2f} s"
    facts = table("", "")
    facts.show_header = False
    shards = sum(len(tensor.shards) for tensor in found.tensors)
    row(facts, "saved", f"{found.created}{took}, by {found.world_size} rank(s)")
    row(facts, "by", ", ".join(f"{name} {version}" for name, version in found.writer.items()))
    row(facts, "save id", f"{found.save_id}, format v{found.format_version}")
    row(facts, "step", found.step)
    row(facts, "size", size_text(found.nbytes))
    row(facts, "tensors", f"{len(found.tensors)} in {shards} shard(s), {size_text(found.tensor_nbytes)}")
    pickled = f"{len(found.objects)} object(s), {size_text(sum(item.nbytes for item in found.objects))}"
    row(facts, "pickled", pickled if found.objects else "nothing")
    ranks = table("rank", "size", "share", "shards", "file", numbers=("rank", "size", "share", "shards"))
    for item in found.ranks:
        row(ranks, item.rank, size_text(item.nbytes), f"{item.share:.1%}", item.entries, item.file)
    state = Tree(Text("state", style="bold"))
    tensors = {name: tensor for tensor in found.tensors for name in (tensor.name, *tensor.aliases)}
    sizes = {item.path: item.nbytes for item in found.objects}
    _grow(state, found.tree, sizes, tensors, depth)
    show(Text(printable(found.path), style="bold"), facts, "", ranks, "", state)


def _grow(
    tree: Tree, node: Node, pickled: Mapping[str, int], tensors: Mapping[str, TensorInfo], depth: int | None
) -> None:
    if not node.path and not node.children:
        tree.add(_about(node, pickled, tensors))
    for child in node.children:
        branch = tree.add(_about(child, pickled, tensors))
        if depth is None or depth > 1:
            _grow(branch, child, pickled, tensors, None if depth is None else depth - 1)


def _about(node: Node, pickled: Mapping[str, int], tensors: Mapping[str, TensorInfo]) -> Text:
    label = Text(printable(node.key), style="bold" if node.children else "")
    label.append("  ")
    if node.kind == "value":
        return label.append(printable(shorten(text_of(node.value), _VALUE_WIDTH)), style="dim")
    if node.tensor is not None:
        tensor = tensors[node.tensor]
        parts = [f"{tensor.dtype} {list(tensor.shape)}", size_text(tensor.nbytes)]
        parts += [f"{len(tensor.shards)} shards"] * (len(tensor.shards) > 1)
        parts += [f"is {printable(tensor.name)}"] * (tensor.name != node.tensor)
        parts += [f"{tensor.codec}: {size_text(tensor.stored_nbytes)}"] * (tensor.codec is not None)
        parts += [node.kind] * (node.kind != "tensor")
        return label.append("  ".join(parts))
    if node.kind == "object":
        return label.append(f"pickled object, {size_text(pickled[node.value])}", style="yellow")
    return label.append(_container(node), style="dim")


def _container(node: Node) -> str:
    kind = "by rank" if node.kind == "per_rank" else node.kind
    return f"{kind}, {len(node.children)}" if node.children else f"{kind}, empty"


def counted(found: Sequence[TensorStats]) -> None:
    figures = ("norm", "mean", "max abs", "NaN", "Inf")
    made = table("tensor", *figures, numbers=figures)
    for item in found:
        bad = "red" if item.nan or item.inf else ""
        cells = (number(item.norm), number(item.mean), number(item.max_abs))
        row(made, item.name, *cells, Text(str(item.nan), bad), Text(str(item.inf), bad))
    nan, inf = sum(item.nan for item in found), sum(item.inf for item in found)
    show(made, "", f"{len(found)} tensor(s), {sum(item.elements for item in found):,} elements, {nan} NaN, {inf} Inf")


def compared(found: Comparison) -> None:
    for name, places in ((found.a, found.only_a), (found.b, found.only_b)):
        if places:
            show(
                Text(f"only in {printable(name)}", style="bold"), *(f"  {place or 'the root'}" for place in places), ""
            )
    if found.changed:
        made = table("place", "first", "second")
        for change in found.changed:
            row(made, change.path, shorten(change.a, _VALUE_WIDTH), shorten(change.b, _VALUE_WIDTH))
        show(made, "")
    differing = [item for item in found.tensors if item.verdict != "equal"]
    if differing:
        figures = ("differing", "max abs", "not finite")
        made = table("tensor", "difference", *figures, numbers=figures)
        for item in differing:
            why = "values" if item.verdict == "differs" else f"{item.a}, {item.b}"
            counts = (None,) * 3 if item.verdict == "shape" else (item.differing, number(item.max_abs), item.not_finite)
            row(made, item.path, why, *counts)
        show(made, "")
    equal = f"{len(found.tensors) - len(differing)} of {len(found.tensors)} tensors in both are equal, bit for bit"
    show("the same: " + equal if found.equal else "different: " + equal)


def verified(found: VerifyReport) -> None:
    if not found.ok:
        figures = ("byte", "size")
        made = table("file", "byte", "size", "of", "fault", numbers=figures)
        for fault in found.faults:
            of = fault.tensor if fault.object is None else f"object {fault.object}"
            held = "" if fault.expected is None else f": {fault.found}, not {fault.expected}"
            size = None if fault.nbytes is None else size_text(fault.nbytes)
            row(made, fault.file, fault.offset, size, of, Text(fault.what + held, style="red"))
        show(made, "")
    verdict = "ok" if found.ok else f"damaged, {len(found.faults)} fault(s)"
    what = f"{found.tensors} tensor(s), {found.objects} pickled object(s)"
    show(f"{verdict}: {what}, {size_text(found.bytes_read)} read in {found.seconds:.2f} s")


def copied(report: CopyReport) -> None:
    if report.nbytes:
        show(f"copied {report.source} to {report.target}: {size_text(report.nbytes)}, every byte verified")
    else:
        show(f"{report.target} holds this save already: nothing was copied")


def converted(report: ConvertReport) -> None:
    sizes = f"{report.tensors} tensor(s), {size_text(report.nbytes)}"
    show(f"converted {report.source} ({report.source_format}) to {report.target} ({report.target_format}): {sizes}")
    if report.left_out:
        named = ", ".join(report.left_out[:_NAMED])
        more = f" and {len(report.left_out) - _NAMED} more" if len(report.left_out) > _NAMED else ""
        show(f"left out, since {report.target_format} has no room for it: {named}{more}")


def pruned(found: Pruned, *, dry_run: bool) -> None:
    count = sum(map(len, found.removed.values()))
    show(*(f"{place}: {name}" for place, names in found.removed.items() for name in names))
    show(f"{count} file(s) and uploads {'would be removed' if dry_run else 'removed'}" if count else "nothing to prune")
