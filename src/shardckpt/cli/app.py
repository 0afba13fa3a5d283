"""The commands."""

from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shardckpt import tools
from shardckpt.cli import views
from shardckpt.cli.arguments import (
    CHECKPOINT,
    EXCLUDE,
    INCLUDE,
    JSON,
    STORAGE_OPTIONS,
    TARGET_STORAGE_OPTIONS,
    renames,
    storage_options,
)
from shardckpt.cli.codes import ExitCode, code_of
from shardckpt.cli.screen import complain, meter, show_json
from shardckpt.errors import ShardckptError
from shardckpt.tools.conversion import FORMATS, SHARD


class Commands(TyperGroup):
    """The commands, each of which may raise a ShardckptError: one message, no traceback, an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShardckptError as error:
            complain(str(error))
            raise typer.Exit(code_of(error)) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look at sharded checkpoints, compare, copy and convert them, and tidy up.",
    epilog="Exit codes: 0 fine, 1 different (diff), 2 usage, 3 no checkpoint, 4 damaged, 5 newer format, 6 storage,"
    " 7 other failure, 141 output closed.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"shardckpt {metadata.version('shardckpt')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def ls(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where checkpoints lie: a local path or any fsspec URL.")
    ],
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """List the checkpoints directly in DIR, newest first, and what is left of those that are none."""
    found = tools.ls(directory, storage_options=storage_options(storage_option))
    if json:
        show_json(found)
    else:
        views.listed(found, directory)


@app.command()
def inspect(
    checkpoint: CHECKPOINT,
    depth: Annotated[int | None, typer.Option(min=1, help="Levels of the tree to show; by default all.")] = None,
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Show what is in a checkpoint: its tree, tensors and their shards, plain values, and what is pickled."""
    found = tools.inspect(checkpoint, storage_options=storage_options(storage_option))
    if json:
        show_json({key: value for key, value in vars(found).items() if key != "tree"})
    else:
        views.inspected(found, depth)


@app.command()
def stats(
    checkpoint: CHECKPOINT,
    include: INCLUDE = None,
    exclude: EXCLUDE = None,
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Show the norm, mean and largest element of each tensor, and count NaN and Inf. Reads and verifies all of it."""
    with meter("reading") as progress:
        found = tools.stats(
            checkpoint,
            include=include,
            exclude=exclude,
            storage_options=storage_options(storage_option),
            progress=progress,
        )
    if json:
        show_json(found)
    else:
        views.counted(found)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    include: INCLUDE = None,
    exclude: EXCLUDE = None,
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Compare two checkpoints: what stands where, and each tensor, bit for bit. Exits with 1 where they differ."""
    with meter("comparing") as progress:
        found = tools.diff(
            a,
            b,
            include=include,
            exclude=exclude,
            storage_options=storage_options(storage_option),
            progress=progress,
        )
    if json:
        show_json({"equal": found.equal, **vars(found)})
    else:
        views.compared(found)
    if not found.equal:
        raise typer.Exit(ExitCode.DIFFERENT)


@app.command()
def verify(
    checkpoint: CHECKPOINT,
    rank: Annotated[int | None, typer.Option(help="Only what this rank wrote.", show_default=False)] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tensor.", show_default=False)] = None,
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Read all of a checkpoint, and list every fault, by its digests. Exits with 4 where there is one."""
    with meter("verifying") as progress:
        found = tools.verify(
            checkpoint,
            rank=rank,
            tensor=tensor,
            storage_options=storage_options(storage_option),
            progress=progress,
        )
    if json:
        show_json({"ok": found.ok, **vars(found)})
    else:
        views.verified(found)
    if not found.ok:
        raise typer.Exit(ExitCode.DAMAGED)


@app.command()
def cp(
    source: CHECKPOINT,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Its new path; with / at the end, where to put it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at TARGET.")] = False,
    storage_option: STORAGE_OPTIONS = None,
    target_storage_option: TARGET_STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Copy a checkpoint, from and to any storage. Every byte is verified; at TARGET it appears whole, or not at all."""
    with meter("copying") as progress:
        report = tools.copy(
            source,
            target,
            overwrite=overwrite,
            storage_options=storage_options(storage_option),
            target_storage_options=storage_options(target_storage_option) if target_storage_option else None,
            progress=progress,
        )
    if json:
        show_json(report)
    else:
        views.copied(report)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint of any of the formats.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What to make of it; its name may tell the format.")],
    to: Annotated[
        str | None, typer.Option(metavar="|".join(FORMATS), help="The format of TARGET.", show_default=False)
    ] = None,
    prefix: Annotated[str, typer.Option(help="The place that is taken for the whole.", show_default=False)] = "",
    include: INCLUDE = None,
    exclude: EXCLUDE = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TEXT", help="In names of tensors, REGEX becomes TEXT; may be repeated.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What floating-point tensors become: bfloat16, float16, ...", show_default=False),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option(help="Unpickle nothing. --no-weights-only runs code that the source may hold.")
    ] = True,
    max_shard_size: Annotated[
        int, typer.Option(metavar="BYTES", min=1, help="Of one file in a directory of safetensors.")
    ] = SHARD,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at TARGET.")] = False,
    storage_option: STORAGE_OPTIONS = None,
    target_storage_option: TARGET_STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Bring a checkpoint into another format, or a part of it: of shardckpt, torch.save, DCP and safetensors."""
    with meter("converting") as progress:
        report = tools.convert(
            source,
            target,
            to=to,
            prefix=prefix,
            include=include,
            exclude=exclude,
            rename=renames(rename),
            dtype=dtype,
            weights_only=weights_only,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            storage_options=storage_options(storage_option),
            target_storage_options=storage_options(target_storage_option) if target_storage_option else None,
            progress=progress,
        )
    if json:
        show_json(report)
    else:
        views.converted(report)


@app.command()
def prune(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's path, or where checkpoints lie.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    storage_option: STORAGE_OPTIONS = None,
    json: JSON = False,
) -> None:
    """Remove what saves that died have left. Checkpoints stay, and running saves, and all that is yours."""
    found = tools.prune(directory, dry_run=dry_run, storage_options=storage_options(storage_option))
    if json:
        show_json({"dry_run": dry_run, **vars(found)})
    else:
        views.pruned(found, dry_run=dry_run)
    for place, problem in found.skipped.items():
        complain(f"nothing was pruned at {place}: {problem}")
    if found.skipped:
        raise typer.Exit(ExitCode.DAMAGED)
