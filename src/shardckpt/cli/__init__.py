"""``shardckpt`` on the command line: arguments in, tables or JSON out. What it does is in `shardckpt.tools`."""

import sys
import traceback


def main() -> None:
    """The entry point of the program; exits with one of `shardckpt.cli.codes`."""
    try:
        from shardckpt.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"shardckpt: the command line needs {error.name}: pip install 'shardckpt[cli]'")
    try:
        app()
    except Exception:  # noqa: BLE001 - a mistake of ours must not look like an answer: diff's 1 means "they differ"
        traceback.print_exc()
        sys.exit(70)
