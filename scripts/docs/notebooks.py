"""The notebooks as pages of the site, with what they print and draw: a hook of mkdocs.

The line `<!-- notebook: NAME -->` in a page stands for `docs/notebooks/NAME.ipynb`.
`RUN_NOTEBOOKS=1 mkdocs build` (that is `make docs`) runs each notebook once in a folder of its own, which is removed
afterwards; without it the pages show the code only. The notebooks themselves are stored without outputs.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
SECONDS = 600  # for a cell; a guard against one that hangs
PLACE = re.compile(r"^<!-- notebook: (\w+) -->$", re.MULTILINE)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
NOTE = """\
!!! note ""
    This page is [a notebook]({name}.ipynb); its outputs are those of the run that made this site.
"""


def run(path: Path) -> Any:
    """Runs a notebook: no network, no window, and every file that it writes goes into a temporary folder.

    Returns:
        the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: for the first cell that fails.
    """
    import nbclient
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        kernel = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(Path(folder, "cache")),
            "IPYTHONDIR": str(Path(folder, "ipython")),
            "TMPDIR": folder,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        notebook = nbformat.read(path, as_version=4)
        with mock.patch.dict(os.environ, kernel):
            nbclient.NotebookClient(
                notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(work)}}
            ).execute()
    return notebook


def as_page(notebook: Any, name: str) -> str:
    """A notebook as Markdown, its pictures within it.

    Args:
        notebook: as `nbformat` reads it, with or without outputs.
        name: of its file, without `.ipynb`.
    """
    title, *cells = notebook.cells
    parts = [title.source, NOTE.format(name=name)]
    for cell in cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source.rstrip()}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![What the code draws](data:image/png;base64,{data['image/png'].strip()})")
            elif text := output.get("text") if output.get("name") == "stdout" else data.get("text/plain"):
                parts.append(f"```text\n{ESCAPES.sub('', text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


@cache
def page_of(name: str, outputs: bool) -> str:
    """The page of a notebook.

    Args:
        name: of its file, without `.ipynb`.
        outputs: whether to run it.
    """
    import nbformat

    path = FOLDER / f"{name}.ipynb"
    return as_page(run(path) if outputs else nbformat.read(path, as_version=4), name)


def on_page_markdown(text: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's source: puts notebooks in place; the list of them links to their pages."""
    text = PLACE.sub(lambda match: page_of(match[1], bool(os.environ.get("RUN_NOTEBOOKS"))), text)
    if page.file.src_uri.startswith("notebooks."):
        return re.sub(r"\((notebooks/\w+)\.ipynb\)", r"(\1.md)", text)
    return text
