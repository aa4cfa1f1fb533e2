"""What the commands share. A command is a module beside this one: it parses, calls one function of the package, prints.

Only typer is imported at the top of these modules, so that `siglip-hf --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

#: Lines about pictures that were left out that are printed; more would hide the results.
MOST_LINES = 20

#: What a command says on stderr that uses the embedded checkpoint because no other was given.
EMBEDDED = "the embedded checkpoint knows drawings; for photographs --model google/siglip2-base-patch16-224\n"

#: Options that mean the same in every command that has them.
Model = Annotated[str | None, typer.Option(help="A checkpoint; without it the embedded one, with no network.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the first accelerator by default.")]
ComputeDtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 where the processor has it.")
]
Fast = Annotated[bool, typer.Option("--fast/--no-fast", help="Fused layers; the results differ by rounding.")]

#: The option of every command that reads pictures; see `largest_picture`.
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Pixels of the largest picture that is decoded; larger ones are skipped.")
]

#: The option of every command that encodes labels.
LabelBankFolder = Annotated[
    Path | None, typer.Option("--label-bank", help="Keep the embeddings of labels in this folder, for later runs.")
]

# As wide as a table may get where it is not shown on a screen: a path must stay in one piece for the next program.
_PIPED_WIDTH = 10_000


def largest_picture(pixels: int | None) -> contextlib.AbstractContextManager[None]:
    """A block in which larger pictures are refused, undecoded; None leaves that to Pillow's own limit."""
    from siglip_hf.parallel import PIXELS

    return PIXELS.at_most(pixels)


@contextlib.contextmanager
def no_library_progress() -> Iterator[None]:
    """The bars of transformers stay away from ours."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def progress_bar() -> Progress:
    """A bar on stderr with counts, speed left to the caller's description; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    errors = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=errors,
        transient=True,
        redirect_stdout=False,
        disable=not errors.is_terminal,
    )


def embedded_note(model: Any) -> Callable[[], None]:
    """A function that says, once and on stderr, what the embedded checkpoint is good for, if no model is given.

    It is to be called when the work begins: late enough for a mistake to be told in one line, early enough to stop.
    """
    lines = [] if model else [EMBEDDED]

    def tell() -> None:
        while lines:
            print(lines.pop(), end="", file=sys.stderr)

    return tell


def console() -> Console:
    """Where tables are printed: as wide as the terminal, and without bound where the output goes elsewhere."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=_PIPED_WIDTH)


def print_json(value: Any) -> None:
    """Prints a value as JSON, in characters that stdout can take."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, ensure_ascii=not is_unicode, indent=2))


def counted(count: int, thing: str) -> str:
    """A count with its noun: "1 picture", "1,200 pictures"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def print_some(lines: Sequence[str], rest: str = "") -> None:
    """The first lines on stderr, how many more there are, and where those are."""
    for line in lines[:MOST_LINES]:
        print(line, file=sys.stderr)
    if len(lines) > MOST_LINES:
        print(f"... and {len(lines) - MOST_LINES} more{rest}", file=sys.stderr)


def short_names(rows: Sequence[Any]) -> list[str]:
    """What to call rows of an index (anything with `id`, `path`, `text`): the text, or a short unique name.

    That is the id where it ends the path (the path below the folder that was embedded), else the path.
    """
    counts = Counter(row.id for row in rows)
    return [
        row.text or (row.id if not row.path or (counts[row.id] == 1 and row.path.endswith(row.id)) else row.path)
        for row in rows
    ]


def check_sheet(path: Path, sources: Sequence[str] = (), option: str = "--sheet") -> None:
    """Refuses a place for a contact sheet where writing would fail only after all the work, or cost a picture.

    Raises:
        ValueError: for an ending that Pillow does not write, a folder that is not there or not writable, or a path
            that is also one of `sources`.
    """
    from PIL import Image

    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{option} {path}: no picture format has this ending; use .png")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; give the name of a picture file")
    refuse_source(path, sources, option)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: it cannot be written there")


def refuse_source(path: Path, sources: Sequence[str], option: str) -> None:
    """Refuses a place for a picture where it would replace one of those that are read.

    Raises:
        ValueError: if the path is one of `sources`, by whatever name.
    """
    if path.exists() and any(os.path.exists(source) and path.samefile(source) for source in sources):
        raise ValueError(f"{option} {path}: it is one of the pictures to read; give another name")
