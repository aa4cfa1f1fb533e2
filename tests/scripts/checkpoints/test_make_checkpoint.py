"""One command for everything: its parts are scripts with these options, and their minutes add up."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import make_checkpoint
import train_default
import train_naflex
from make_checkpoint import commands
from recipe.start import add_options


@pytest.fixture
def lines() -> dict[str, list[str]]:
    found = commands(100, "cuda", Path("work"), Path("pictures"))
    return {script: options for script, *options in found}


def value(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def test_every_part_is_a_script_and_follows_what_it_needs(lines):
    order = ["build_pictures", "train_default", "train_naflex", "evaluate_default", "evaluate_naflex"]
    assert list(lines) == [f"{name}.py" for name in order]
    assert all((make_checkpoint.HERE / script).exists() for script in lines)
    made = str(Path(value(lines["train_default.py"], "--run")) / "checkpoint")
    assert value(lines["train_naflex.py"], "--square") == made
    assert value(lines["evaluate_default.py"], "--model") == made


def test_minutes_are_shared_out_and_some_are_left_for_pictures_and_evaluation(lines):
    minutes = [float(value(lines[f"train_{name}.py"], "--minutes")) for name in ("default", "naflex")]
    assert 85 <= sum(minutes) <= 95
    for script in (train_default, train_naflex):
        longest = max(script.TOWERS.values()) + sum(script.TOGETHER.values())
        assert longest == pytest.approx(1.0)


@pytest.mark.parametrize("script", ["train_default.py", "train_naflex.py"])
def test_device_reaches_both_trainings(lines, script):
    assert value(lines[script], "--device") == "cuda"


def test_both_trainings_have_the_same_options():
    parser = argparse.ArgumentParser()
    add_options(parser, "runs/x", 10)
    read = parser.parse_args(["--minutes", "3", "--device", "cuda"])
    assert (read.minutes, read.device, read.run, read.seed) == (3.0, "cuda", Path("runs/x"), 0)
