"""Every test runs offline; the switch must be set before anything imports huggingface_hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU, Triton's kernels run in its interpreter, which is chosen when triton is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def on_accelerator(tmp_path_factory):
    """What `on_accelerator.py` tells, by path: run once, whatever processes share the tests."""
    from siglip_hf.files import in_turn

    script = Path(__file__).with_name("on_accelerator.py")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    told = shared / "on_accelerator.jsonl"
    with in_turn(shared / "on_accelerator.lock"):
        if not told.exists():
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
            command = [sys.executable, str(script)]
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
            assert run.returncode == 0, run.stderr[-2000:]
            told.write_text(run.stdout)
    return _Told(json.loads(line) for line in told.read_text().splitlines() if line.startswith("{"))


class _Told(dict):
    """Facts by path; a path that failed fails who asks for it."""

    def __init__(self, lines):
        super().__init__((line["path"], line["told"]) for line in lines)

    def __getitem__(self, path):
        told = super().__getitem__(path)
        assert "error" not in told, told["error"]
        return told
