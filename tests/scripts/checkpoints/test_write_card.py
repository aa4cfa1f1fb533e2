"""What scripts/checkpoints/write_card.py writes into a card."""

from __future__ import annotations

import json

import pytest
import torch

from evaluate_default import reliability
from write_card import curve_table, draw_curve, figures_table, fill, markdown, naflex_table, read_curve, sources_table


def test_markdown():
    assert markdown(("a", "b"), [(1, ""), ("x", 2.5)]) == "| a | b |\n| --- | --- |\n| 1 | |\n| x | 2.5 |"


def test_figures_have_a_column_per_style_and_their_chance():
    figures = {
        "fxemoji": {
            "10-way, seen concepts": 95.5,
            "top-1, bare English label": 50.0,
            "demo": 91.7,
            "reliability": [[5, 4]],
        },
        "openmoji": {"10-way, seen concepts": 90.25, "top-1, bare English label": 0.001, "reliability": [[5, 6]]},
    }
    lines = figures_table(figures).splitlines()
    assert lines[2:] == [
        "| 10-way, seen concepts | 95.50 | 90.25 | 10 |",
        "| top-1, bare English label | 50.00 | < 0.005 | 0.07 |",
    ]


def test_naflex_figures_have_a_row_per_budget():
    ways = {"10-way, seen concepts": 91.0, "top-1 of all plain concepts": 46.8}
    both = {"labels among the best 10": 6.6}
    figures = {
        "square": {"squashed, square": ways, "squashed, two side by side": both},
        "NaFlex": {"16 patches, square": ways, "16 patches, two side by side": both},
    }
    assert naflex_table(figures).splitlines()[2:] == [
        "| squashed, by siglip-hf-pictures-64 | 91.0 / 46.8 | 6.6 |",
        "| NaFlex, 16 patches | 91.0 / 46.8 | 6.6 |",
    ]


def test_sources_say_their_licence_and_use():
    style = {"package": "p", "version": "1", "pictures": 7, "licence": "MIT", "author": "A", "name": "s"}
    rows = sources_table({"styles": [{**style, "use": "train", "restyled": 3}, {**style, "use": "evaluate"}]})
    assert rows.splitlines()[2:] == [
        "| p | 1 | 7 | 3 | MIT | A | training |",
        "| p | 1 | 7 | | MIT | A | evaluation only |",
    ]


def test_curve_is_drawn_and_a_stage_started_anew_replaces_what_it_had(tmp_path):
    rows = [
        {"stage": "table", "samples": 60, "loss": 9.0},
        {"stage": "joint", "samples": 100, "loss": 5.0, "work": 60.0, "validation_top1": 0.2},
        {"stage": "joint", "samples": 200, "loss": 4.0, "work": 120.0, "validation_top1": 0.3},
        {"stage": "joint", "samples": 150, "loss": 3.0, "work": 90.0, "validation_top1": 0.4},
        {"stage": "calibrate", "samples": 9, "loss": 0.5, "scale": 20.0, "bias": -1.0},
    ]
    (tmp_path / "learning_curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = read_curve(tmp_path)
    assert {name: [row["samples"] for row in kept] for name, kept in stages.items()} == {"joint": [100, 150]}
    assert curve_table(stages).splitlines()[2] == "| joint | 150 | 2 | 3.00 | validation, top-1 40.0% |"
    for name in ("a.svg", "b.svg"):
        draw_curve(stages, tmp_path / name)
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_text_goes_between_its_marks():
    card = "before\n<!-- written: curve -->\nold\n<!-- end -->\nafter\n<!-- written: sources -->\n<!-- end -->"
    once = fill(card, {"curve": "new \\1"})
    assert once.startswith("before\n<!-- written: curve -->\n\nnew \\1\n\n<!-- end -->\nafter")
    assert "old" not in once
    assert fill(once, {"curve": "new \\1"}) == once
    with pytest.raises(ValueError, match="no part '<!-- written: figures -->'"):
        fill(card, {"figures": ""})


def test_reliability_of_scores_that_tell_nothing_is_even():
    model = torch.nn.Module()
    model.logit_scale, model.logit_bias = torch.tensor(0.0), torch.tensor(0.0)
    classes = torch.ones(40, 1)
    images = torch.full((40, 1), 0.2)
    (point,) = reliability(model, images, classes, torch.arange(40))
    assert point == (pytest.approx(100 / (1 + 2.718281828**-0.2), abs=0.01), 50.0)


def test_reliability_of_scores_that_tell_all():
    model = torch.nn.Module()
    model.logit_scale, model.logit_bias = torch.tensor(3.0), torch.tensor(-10.0)
    points = reliability(model, torch.eye(40), torch.eye(40), torch.arange(40))
    assert [right for _, right in points] == [0.0, 100.0]
