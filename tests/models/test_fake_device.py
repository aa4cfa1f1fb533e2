"""Every public path on an accelerator that does not exist: no device meets another, no dtype is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fake_device.py"
PATHS = (
    "joint",
    "joint_loss",
    "encode_image",
    "encode_text",
    "attention_weights",
    "larger_pictures",
    "naflex",
    "naflex_gradients",
    "classifier",
    "classifier2",
    "loss",
)
# The loss sums in float32 whatever the embeddings are.
IN_FLOAT32 = {"joint_loss", "loss"}


@pytest.fixture(scope="module")
def told():
    """What the script tells, by path and dtype; in a process of its own, which keeps the made-up device."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {(line["path"], line["asked"]): line for line in lines}


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_no_device_meets_another_and_no_dtype_is_lost(told, path, dtype):
    line = told[path, dtype]
    assert line.get("error") is None
    assert line["device"] == "gpu:0"
    assert line["dtype"] == ("torch.float32" if path in IN_FLOAT32 else dtype)


def test_the_script_runs_no_other_path(told):
    assert {path for path, _ in told} == set(PATHS)
