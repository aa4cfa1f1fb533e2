"""Output folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool, marker: str) -> None:
    """Refuses a folder that `new_folder` would refuse; call it before work that takes long.

    Raises:
        ValueError: If something stands at the path that may not be replaced; the message names it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{folder} is not empty; give another folder, or overwrite=True (--overwrite) to replace it"
            )
        if not (folder / marker).is_file():
            # The folder is replaced as a whole, and this one may hold anything: a mistyped path must not cost a home.
            raise ValueError(f"{folder} has no {marker}, so it is none of ours to replace; give another folder")


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Gives a temporary folder to write to; it takes the place of `folder` when the block ends without an error.

    Args:
        folder: The place. It may be missing or an empty folder; its parents are made.
        overwrite: Replace a folder that is not empty, all files in it, provided it holds `marker`.
        marker: Name of a file by which an earlier output is recognised.

    Yields:
        The folder to write to, beside `folder` on the same disk. It is removed if the block raises.

    Raises:
        ValueError: See `check_output_folder`.
    """
    check_output_folder(folder, overwrite=overwrite, marker=marker)
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        check_output_folder(folder, overwrite=overwrite, marker=marker)  # someone may have written meanwhile
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
