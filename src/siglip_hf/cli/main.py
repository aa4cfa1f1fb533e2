"""`siglip-hf`: the command line. Each command is a module beside this one.

Exit codes: 0 all well; 1 something was skipped or found wrong, named on stderr; 2 wrong usage or a fault, in one line
on stderr; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer

from siglip_hf.cli.app import app as show_page
from siglip_hf.cli.classify import classify
from siglip_hf.cli.clusters import clusters
from siglip_hf.cli.convert import convert, export
from siglip_hf.cli.demo import demo
from siglip_hf.cli.doctor import doctor
from siglip_hf.cli.duplicates import duplicates
from siglip_hf.cli.embed import embed
from siglip_hf.cli.evaluate import evaluate
from siglip_hf.cli.index import index
from siglip_hf.cli.learn import learn
from siglip_hf.cli.search import search
from siglip_hf.cli.serve import serve
from siglip_hf.cli.train import train
from siglip_hf.cli.verify import verify

# Commands with the examples under their --help.
_COMMANDS = (
    (demo, ("siglip-hf demo", "siglip-hf demo --pictures drawings --out sheet.png")),
    (
        classify,
        (
            'siglip-hf classify drawings/ --labels "a cat, a dog" --sheet sheet.png',
            "siglip-hf classify photos/ --labels-file labels.txt --model google/siglip2-base-patch16-224 --json",
        ),
    ),
    (
        embed,
        (
            "siglip-hf embed drawings/ --out drawings.emb",
            "siglip-hf embed table.csv --image-column file --out table.emb --model google/siglip2-base-patch16-224",
        ),
    ),
    (index, ("siglip-hf index drawings/ --out drawings.idx", "siglip-hf index drawings/ --out drawings.idx --update")),
    (
        search,
        (
            'siglip-hf search drawings.idx "a red car" --sheet found.png',
            "siglip-hf search drawings.idx --image sketch.png --not people -k 20 --json",
        ),
    ),
    (
        duplicates,
        ("siglip-hf duplicates drawings.idx", "siglip-hf duplicates drawings.idx --threshold 0.99 --json"),
    ),
    (clusters, ("siglip-hf clusters drawings.idx", "siglip-hf clusters drawings.idx -n 20 --words words.txt")),
    (
        evaluate,
        (
            "siglip-hf evaluate classes/ --templates imagenet7",
            "siglip-hf evaluate captions.csv --task retrieve --model google/siglip2-base-patch16-224",
        ),
    ),
    (
        learn,
        (
            "siglip-hf learn classes/ --out mine",
            "siglip-hf learn table.csv --label-column kind --out mine --model google/siglip2-base-patch16-224",
        ),
    ),
    (
        train,
        (
            "siglip-hf train captions.csv --out tuned --epochs 3",
            "siglip-hf train drawings/ --out tuned --lora 8 --hold-out 100",
        ),
    ),
    (show_page, ("siglip-hf app search", "siglip-hf app compare --model google/siglip2-base-patch16-224")),
    (
        serve,
        (
            "siglip-hf serve",
            "siglip-hf serve --model google/siglip2-base-patch16-224 --index photos=photos.idx --api-key keys.txt",
        ),
    ),
    (doctor, ("siglip-hf doctor", "siglip-hf doctor --json")),
    (
        verify,
        (
            "siglip-hf verify",
            "siglip-hf verify google/siglip2-base-patch16-224 photo.jpg --dtype bfloat16",
        ),
    ),
    (
        convert,
        (
            "siglip-hf convert siglip.npz --out siglip",
            "siglip-hf convert open_clip_model.safetensors --out siglip2 --preset ViT-B-16-SigLIP2-256",
            "siglip-hf convert tuned --to timm --out tuned-timm",
        ),
    ),
    (
        export,
        (
            "siglip-hf export tuned --out tuned-onnx",
            "siglip-hf export google/siglip2-base-patch16-224 --out onnx --dtype float16",
            "siglip-hf export tuned --layout transformers.js --out tuned-js",
        ),
    ),
)

# Commands that go on where they were stopped, if they are called again.
_RESUMABLE = ("embed", "index", "learn", "train")

_FULL = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name="siglip-hf",
    help="SigLIP from the command line.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    epilog="Examples:\n\nsiglip-hf demo\n\nsiglip-hf classify --help",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in line
    # `--output` was the word of version 0.1.
    line = [re.sub(r"^--output(?==|$)", "--out", word) for word in line if word != "--debug"]
    command = next((word for word in line if not word.startswith("-")), "")
    _let_every_character_through()
    try:
        _check_current_folder()
        with _quiet_libraries():
            code = app(line, standalone_mode=False) or 0
            if code == 130:  # what typer makes of Ctrl-C
                raise KeyboardInterrupt
            sys.stdout.flush()
            return code
    except (typer.Abort, KeyboardInterrupt):
        again = "; the same command goes on where this stopped" if command in _RESUMABLE else ""
        print(f"siglip-hf: stopped{again}", file=sys.stderr)
        _end_output()
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _end_output()
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"siglip-hf: {' '.join(_explain(error).split())}", file=sys.stderr)
        _end_output()
        return 2


def _check_current_folder() -> None:
    """Libraries end the process, in words of their own, where the current folder has been deleted.

    Raises:
        OSError: if it has.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise OSError("the current folder is gone; change to one that is there.") from error


def _end_output() -> None:
    """Lets go of what stdout does not take; Python would try again at the end, and fail with a message of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> str:
    """What went wrong, for one line."""
    # Errors of usage come with an exit code and a message for the user, whatever class a version of typer has.
    if hasattr(error, "format_message"):
        names: list[str] = []
        context = getattr(error, "ctx", None)
        while context is not None and context.parent is not None:  # the outermost has the name of the program
            names.insert(0, str(context.info_name))
            context = context.parent
        command = " ".join(["siglip-hf", *names])
        return f"{error.format_message().rstrip('.')}. See {command} --help"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"the disk of {error.filename or 'the output'} is full: {error}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:200]!a} is not valid Unicode; rename the file or folder, or give another text"
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return f"not enough memory; a smaller --batch-size needs less ({str(error).strip() or 'MemoryError'})"
    if isinstance(error, ValueError | OSError | ImportError) and str(error).strip():  # ImportError: of a missing extra
        return str(error)
    from siglip_hf import __version__

    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"a fault in version {__version__}, not your mistake: {what[:500]} "
        f"({os.path.basename(place.filename)}, line {place.lineno}); please report it with what --debug prints."
    )


def _let_every_character_through() -> None:
    """What the terminal's encoding lacks is printed as its code; it must not end a run after all the work."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error; may stand anywhere in the line.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for command, examples in _COMMANDS:
    app.command(epilog="\n\n".join(("Examples:", *examples)))(command)
