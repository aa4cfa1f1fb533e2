"""The GPU script: what fails or hangs is reported and stops nothing; the rehearsal of every step passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import STEPS, Options, Step, draw, run_steps

ROOT = Path(__file__).parents[3]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    names = ("fails", "hangs", "dies", "absent", "works")
    steps = tuple(Step(name, 3 if name == "hangs" else 60, "gpu_fake_steps") for name in names)
    results = run_steps(steps, Options("cpu", True, str(tmp_path)), 8)
    assert [result["state"] for result in results] == ["failed", "stopped", "failed", "failed", "ok"]
    assert [len(result["rows"]) for result in results] == [1, 1, 1, 0, 3]
    assert results[0]["note"] == "RuntimeError: the | driver is gone"
    assert results[1]["note"].startswith("after 3 s, its limit")
    assert results[2]["note"] == "exit code -9"
    assert "absent" in results[3]["note"]
    assert not is_running(int((tmp_path / "child").read_text()))
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert "| works | rate | 2 TB/s | >= 1 | yes |" in lines
    assert "| works | memory | 3 GB | <= 1 | no |" in lines
    assert "| works | device | cpu |  |  |" in lines
    assert any("the / driver is gone" in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_without_time_the_rest_is_left_out(tmp_path):
    results = run_steps((Step("works", 60, "gpu_fake_steps"),), Options("cpu", True, str(tmp_path)), 0)
    assert [result["state"] for result in results] == ["no time"]


def test_no_figures_no_picture(tmp_path):
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(SystemExit, match="run the step `towers` first"):
        draw(tmp_path)


def test_the_loss_is_warmed_up_with_the_shapes_that_are_timed():
    import torch

    from loss import measure

    calls = []

    def form(images, texts, scale, bias):
        calls.append((tuple(images.shape), images.dtype, images.grad is None))
        return (images.sum() + texts.sum()) * scale.sum() + bias.sum()

    found = measure(form, 24, 8, "cpu", torch.bfloat16, 3)
    assert calls == [((24, 8), torch.bfloat16, True)] * 4
    assert found["seconds"] >= 0


@pytest.mark.slow
def test_the_rehearsal_of_every_step_passes(tmp_path):
    """As `make gpu TINY=1`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    command = [sys.executable, ROOT / "scripts/bench/gpu.py", "--device", "cpu", "--tiny", "--stretch", "20"]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [result["step"] for result in results] == [step.name for step in STEPS]
    assert {result["state"] for result in results} == {"ok"}
    assert all(result["rows"] for result in results)
    assert draw(tmp_path).stat().st_size > 1000
