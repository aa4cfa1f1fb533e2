"""`siglip-hf`: the command line. Each command is a module beside this one.

Exit codes: 0 all well; 1 something was skipped or found wrong, named on stderr; 2 wrong usage, in one line on stderr.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer

from siglip_hf.cli.app import app as show_page
from siglip_hf.cli.classify import classify
from siglip_hf.cli.clusters import clusters
from siglip_hf.cli.convert import convert, export
from siglip_hf.cli.doctor import doctor
from siglip_hf.cli.duplicates import duplicates
from siglip_hf.cli.embed import embed
from siglip_hf.cli.evaluate import evaluate
from siglip_hf.cli.index import index
from siglip_hf.cli.search import search
from siglip_hf.cli.train import train
from siglip_hf.cli.verify import verify

app = typer.Typer(
    name="siglip-hf",
    help="SigLIP from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    try:
        with _quiet_libraries():
            return app(arguments, standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        # Errors of usage come with an exit code and a message for the user, whatever class a version of typer has.
        if hasattr(error, "format_message"):
            message = error.format_message()
        elif isinstance(error, ValueError | OSError | ImportError):  # of an extra that is not installed
            message = str(error)
        else:
            raise
        print(f"siglip-hf: {' '.join(message.split())}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No warnings of libraries between the results; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _print_version(wanted: bool) -> None:
    if wanted:
        from siglip_hf import __version__

        print(f"siglip-hf {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    classify,
    embed,
    index,
    search,
    duplicates,
    clusters,
    evaluate,
    train,
    show_page,
    doctor,
    verify,
    convert,
    export,
):
    app.command()(command)
