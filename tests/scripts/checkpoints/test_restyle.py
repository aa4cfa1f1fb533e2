"""Restyling of drawings: the same from the same seed, different from another, and always an SVG of the same thing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from drawings.restyle import parsed, restyled, written

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 64 64" width="64" '
    'height="64" color="#202020"><defs><linearGradient id="g"><stop stop-color="#ff0000"/><stop offset="1" '
    'stop-color="#0000ff"/></linearGradient></defs><path fill="url(#g)" d="M0 0h9v9z"/><path fill="#fc0" d="M9 9h9z"/>'
    '<path fill="none" stroke="currentColor" d="M1 1h3"/></svg>'
)
PATHS = ["M0 0h9v9z", "M9 9h9z", "M1 1h3"]


@pytest.fixture(scope="module")
def hands() -> dict[str, str]:
    return {str(seed): restyled(SVG, str(seed)) for seed in range(60)}


def test_one_seed_is_one_hand(hands):
    assert restyled(SVG, "7") == hands["7"]
    assert len(set(hands.values())) > 0.9 * len(hands)


def test_every_hand_draws_the_same_shapes_in_a_whole_svg(hands):
    for svg in hands.values():
        root = ElementTree.fromstring(svg)
        group = root[-1]
        assert [path.get("d") for path in group if path.tag.endswith("path")] == PATHS


def test_there_are_lines_flat_and_empty_fills_hatching_unsteady_hands_and_shadows(hands):
    def share(pattern: str) -> float:
        return sum(bool(re.search(pattern, svg)) for svg in hands.values()) / len(hands)

    assert 0.3 < share("stroke-linejoin") < 0.9
    assert 0.05 < share("<pattern") < 0.4
    assert 0.05 < share('fill="none" d="M9|fill="#ffffff" d="M9') < 0.4
    assert 0.2 < share("feDisplacementMap") < 0.6
    assert 0.02 < share("feDropShadow") < 0.4
    assert 0.2 < share('fill="url\\(#g\\)"') < 0.6  # the others are flat: no gradient


def test_flat_fill_is_the_mean_of_the_gradient():
    def fill(svg: str) -> str | None:
        match = re.search('fill="([^"]+)" d="M0', svg)
        return match and match[1]

    flat = [fill(restyled(SVG, str(seed))) for seed in range(200)]
    assert "#800080" in flat  # with its own palette


def test_viewbox_makes_room_for_lines(hands):
    for svg in hands.values():
        box = re.search('viewBox="([^"]+)"', svg)
        assert box is not None
        assert box[1] in ("0 0 64 64", "-2.56 -2.56 69.12 69.12")
        assert (box[1] == "0 0 64 64") == ("stroke-linejoin" not in svg and "filter" not in svg)


def test_colours_are_read_in_all_their_forms():
    assert parsed("#fc0") == parsed("#ffcc00") == parsed("#ffcc0080") == (1.0, 0.8, 0.0)
    assert parsed("white") == (1.0, 1.0, 1.0)
    assert written((1.0, 0.8, 0.0)) == "#ffcc00"
    assert written((2.0, -1.0, 0.5)) == "#ff0080"


def test_lights_and_shadows_of_the_first_hand_are_left_out():
    soft = SVG.replace('<path fill="#fc0"', '<path filter="url(#soft)" fill="#fc0"')
    for seed in range(40):
        assert restyled(soft, str(seed)) == restyled(SVG, str(seed))
