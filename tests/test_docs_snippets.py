"""Runs every Python snippet of README.md and docs/, so that what they say stays true.

The snippets of a page share their names, in order. A snippet after the line `<!-- no-run -->` is not run: it needs the
network, a GPU or much time. Published names ("google/siglip...") stand for the embedded checkpoint here.
"""

import re
from pathlib import Path

import pytest

import siglip_hf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(?P<mark><!-- no-run -->\s*)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and code of each snippet that is to be run."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in SNIPPET.finditer(text)
        if not match["mark"]
    ]


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


def test_there_are_snippets():
    names = {page.stem for page in WITH_SNIPPETS}
    assert {"README", "quantization", "sharding", "lora", "vision_language_models"} <= names


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    for package, pages in {
        "bitsandbytes": ("quantization", "lora"),
        "torchao": ("quantization",),
        "peft": ("lora",),
    }.items():
        if page.stem in pages:
            pytest.importorskip(package)
    # Pages name the repository's own pictures, and write files of theirs.
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    checkpoint = siglip_hf.default_checkpoint()
    names: dict = {"__name__": "__main__"}
    for line, code in snippets(page):
        code = re.sub(r"google/siglip[\w-]*", checkpoint, code)
        # Blank lines in front, so that a traceback names the page's own lines.
        exec(compile("\n" * line + code, str(page), "exec"), names)
