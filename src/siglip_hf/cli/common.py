"""What the commands share. A command is a module beside this one: it parses, calls one function of the package, prints.

Only typer is imported at the top of these modules, so that `siglip-hf --help` answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


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
