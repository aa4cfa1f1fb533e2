"""Figures of the embedded checkpoints on the pages are those of their cards: a new checkpoint leaves no old ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import siglip_hf

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "scripts").rglob("*.md"), *DOCS.rglob("*.ipynb")])
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Pages of other measurements than the cards', each with the script that prints them.
OTHERS = {"learn": "scripts/checkpoints/evaluate_learned.py"}
# Words of a line that gives a figure of an embedded checkpoint.
MEASURE = re.compile(r"FxEmoji|OpenMoji|10-way|10지선다|(?:un)?seen concepts|plain concepts|scripted|sketches|스케치")
# "18 of 24", and so on; a share of the demo's pictures.
SHARE = re.compile(r"\b(\d+)(?: of |/)24\b|\b24(?:장|개) (?:가운데|중) (\d+)|\b24 drawings, (\d+)")
PERCENT = re.compile(r"\b(\d+(?:\.\d+)?)%|\| (\d+\.\d+) (?=\|)")


def card(folder: str) -> str:
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def cards() -> str:
    return card(siglip_hf.default_checkpoint()) + card(siglip_hf.naflex_checkpoint())


def shares(text: str) -> set[str]:
    """Numbers of the demo's 24 pictures that a page calls right."""
    return {number for found in SHARE.findall(text) for number in found if number}


def percents(text: str) -> set[str]:
    """Percentages in the lines of a page that speak of what the cards measure; of a table's row, the first one."""
    found = set()
    for line in text.splitlines():
        if MEASURE.search(line):
            numbers = [a or b for a, b in PERCENT.findall(line)]
            found |= set(numbers[:1] if line.startswith("|") else numbers)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_the_cards(page):
    text = page.read_text(encoding="utf-8")
    right = re.search(r"Of the demo's 24 pictures.*?(\d+) get the right one", cards(), re.DOTALL)
    assert right is not None
    assert shares(text) <= {right[1], "24"}, "the card has another share of the demo's pictures"
    known = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cards())]
    if script := OTHERS.get(page.name.partition(".")[0]):
        assert script in text
        return
    for shown in percents(text):
        digits = len(shown.partition(".")[2])
        # Half a unit of the last digit shown, and a little for rounding twice.
        assert any(abs(float(shown) - value) <= 0.51 * 10**-digits for value in known), f"no card has {shown}%"


def test_old_figures_are_found():
    page = "17 of 24\n그림 24장 가운데 16장\n| FxEmoji: 10-way | 93.4 | 92.1 |\nsketches: 71.5% of them\n12% else\n"
    assert shares(page) == {"17", "16"}
    assert percents(page) == {"93.4", "71.5"}


def test_sizes_are_the_cards():
    square, naflex = (
        re.search(r"([\d.]+) million parameters \(([\d.]+) MB", card(folder))
        for folder in (siglip_hf.default_checkpoint(), siglip_hf.naflex_checkpoint())
    )
    assert square is not None
    assert naflex is not None
    for page in ("README.md", "README.ko.md"):
        (row,) = re.findall(r"^\| `siglip_hf\.default_checkpoint\(\)`.*", (ROOT / page).read_text(), re.MULTILINE)
        assert f"| {float(square[1]):.0f} M |" in row
    for page in ("siglip2.md", "siglip2.ko.md"):
        assert {naflex[1], naflex[2]} <= set(re.findall(r"\d+\.\d+", (DOCS / page).read_text()))


def test_naflex_table_is_the_cards():
    rows = [line for line in (DOCS / "siglip2.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    measured = [row for row in rows if row.startswith(("| squashed, by", "| NaFlex, "))]
    assert len(measured) >= 4
    assert set(measured) <= set(card(siglip_hf.naflex_checkpoint()).splitlines())


def test_float32_column_of_the_int8_table_is_the_cards():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (FxEmoji|OpenMoji): (.+?) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) == 6
    figures = dict(
        re.findall(r"^\| (.+?) \| ([\d.]+ \| [\d.]+) \|", card(siglip_hf.default_checkpoint()), re.MULTILINE)
    )
    for style, measure, shown in rows:
        value = float(figures[measure].split(" | ")[("FxEmoji", "OpenMoji").index(style)])
        assert float(shown) == pytest.approx(value, abs=0.051), f"{style}: {measure}"


@pytest.mark.parametrize("page", ["search.md", "search.ko.md"])
def test_share_of_found_queries_is_the_cards(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    start = text.index("20 stated queries" if page == "search.md" else "질의 20개")
    shown = re.findall(r"(\d+)%", text[start : text.index("evaluate_search.py", start)])
    found = re.search(r"Of 20 stated search queries.*", card(siglip_hf.default_checkpoint()), re.DOTALL)
    assert found is not None
    numbers = re.findall(r"(\d+)%", found[0])[:6]
    assert sorted(shown) == sorted(numbers)


@pytest.mark.parametrize("folder", [siglip_hf.default_checkpoint(), siglip_hf.naflex_checkpoint()])
def test_card_is_for_users(folder):
    """A card says what the weights can do; targets and issues are the project's own talk."""
    assert re.findall(r"\b(?:targets?|issues?|session|milestone)\b", card(folder), re.IGNORECASE) == []
