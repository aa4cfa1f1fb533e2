"""Figures of the embedded checkpoints on the pages are those of their cards: a new checkpoint leaves no old ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import siglip_hf

DOCS = Path(__file__).parents[2] / "docs"


def card(folder: str) -> str:
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


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
