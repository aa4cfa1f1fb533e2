"""Scripted pen drawings, and how the evaluation counts what a model calls them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import evaluate_default
import siglip_hf
import sketches
from evaluate_default import Evaluator


def test_a_number_is_one_drawing_and_all_are_black_on_white():
    assert len(sketches.THINGS) == 12
    first, again, other = (np.asarray(sketches.sketch("key", number)) for number in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.005
    for thing in sketches.THINGS:
        levels = np.asarray(sketches.sketch(thing, 0))
        assert levels.shape == (sketches.SIZE, sketches.SIZE, 3)
        assert set(np.unique(levels)) == {0, 255}
        assert 0.01 < (levels == 0).mean() < 0.3
        assert (levels[[0, -1]] == 255).all(), f"{thing} leaves the page"


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(siglip_hf.default_checkpoint(), [])


def test_named_counts_the_right_ones(evaluator):
    images = [sketches.sketch("umbrella", number) for number in range(4)]
    prompts = {"umbrella": "a drawing of an umbrella", "house": "a drawing of a house"}
    right = evaluate_default.named(evaluator, images, ["umbrella"] * 4, prompts)
    wrong = evaluate_default.named(evaluator, images, ["house"] * 4, prompts)
    assert right + wrong == 100
    assert right in (0, 25, 50, 75, 100)


def test_card_has_what_is_counted(evaluator):
    card = (Path(siglip_hf.default_checkpoint()) / "README.md").read_text(encoding="utf-8")
    right = re.search(r"Of the demo's 24 pictures.*?(\d+) get the right one", card, re.DOTALL)
    assert right is not None
    assert evaluate_default.demo(evaluator) == pytest.approx(100 * int(right[1]) / 24)
    drawn = re.search(r"scripted pen sketches.*?([\d.]+)% do", card, re.DOTALL)
    assert drawn is not None
    assert evaluate_default.sketches(evaluator) == pytest.approx(float(drawn[1]), abs=1.0)
