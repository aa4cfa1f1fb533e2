"""The drawing of the floors is that of today's imports; how_it_works.md names files and code that exist."""

from __future__ import annotations

import re

import pytest
from test_docs_site import ROOT, load_script

from test_architecture import FLOORS

layers = load_script("draw_layers")


def test_the_drawing_is_up_to_date():
    assert layers.LAYERS.read_text(encoding="utf-8") == layers.draw(), "run python scripts/docs/draw_layers.py"


def test_every_room_is_drawn():
    rooms = {room for floor in FLOORS for room in floor if not room.startswith("_")} - {"extras"}
    assert {room for floor in layers.floors(layers.needs()) for room in floor} == rooms


def test_lines_leave_out_what_follows_from_others():
    graph = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set()}
    assert layers.direct(graph) == [("top", "middle"), ("middle", "ground")]


@pytest.mark.parametrize("page", ["how_it_works.md", "how_it_works.ko.md"])
def test_each_step_of_the_day_exists(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    steps = re.findall(r"`([\w/]+\.py)`(?:: `(\w+)`)?", text)
    assert len(steps) >= 18
    for file, name in steps:
        source = (layers.PACKAGE / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{file}: {name}"
