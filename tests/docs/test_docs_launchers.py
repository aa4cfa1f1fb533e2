"""The commands of docs/training.md for several processes and machines, run at small scale on this machine's CPUs.

Two processes stand for eight, two launchers for four machines; data and model are tiny. All else is as on the page.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs_snippets import ROOT, blocks

from siglip_hf.cli.main import main
from tiny_checkpoint import write_tiny_checkpoint
from training_data import write_captioned

PROGRAMS = Path(sys.executable).parent
COMMANDS = [
    command for block in blocks(ROOT / "docs" / "training.md") if block.mark == "no-run" for command in block.commands()
]
SMALL = ["--cpu", "--steps", "2", "--batch-size", "4", "--micro-batch", "2", "--learning-rate", "1e-3"]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def at_small_scale(command, folder):
    """The command lines to run at the same time: as many as there are machines."""
    port = free_port()
    several = "--nnodes" in command
    command = re.sub(r"--nnodes \d+ --nproc-per-node \d+", "--nnodes 2 --nproc-per-node 1", command)
    command = re.sub(r"(--nproc-per-node|--num_processes) 8", r"\1 2", command)
    command = command.replace("first-machine:29500", f"localhost:{port}")
    # accelerate finds GPUs by itself; without any it has to be told to start more than one process. Its other commands,
    # which `accelerate` imports, fail where timm is without torchvision, as it is for our benchmarks.
    launch = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --main_process_port {port}"
    command = command.replace("accelerate launch", launch)
    command = command.replace("train drawings", f"train {folder / 'drawings'}")
    command = command.replace("--out tuned", f"--out {folder / 'tuned'}")
    assert str(folder / "tuned") in command
    words = [str(PROGRAMS / word) if (PROGRAMS / word).is_file() else word for word in shlex.split(command)]
    return [[*words, "--model", str(folder / "tiny"), *SMALL]] * (2 if several else 1)


def test_the_page_names_each_way_to_start():
    assert [command.split()[0] for command in COMMANDS] == ["torchrun", "torchrun", "accelerate", "torchrun"]
    assert "--fsdp" in COMMANDS[1]
    assert "--rdzv-endpoint" in COMMANDS[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    write_captioned(folder / "drawings", count=8)
    write_tiny_checkpoint(folder / "tiny")
    options = ["--model", str(folder / "tiny"), *SMALL]
    assert main(["train", str(folder / "drawings"), "--out", str(folder / "alone"), *options]) == 0
    return folder


# The first always; the others, which start the same way, with `make test-slow`.
@pytest.mark.parametrize("command", [COMMANDS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in COMMANDS[1:])])
def test_it_trains_as_one_process_does(command, folder, tmp_path):
    for name in ("drawings", "tiny"):
        (tmp_path / name).symlink_to(folder / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in at_small_scale(command, tmp_path)
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(printed)
    alone = json.loads((folder / "alone" / "report.json").read_text())
    together = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert (together["processes"], together["steps"], together["batch_size"]) == (2, 2, 4)
    error = 2e-2 if "bfloat16" in command else 1e-4
    assert together["first_loss"] == pytest.approx(alone["first_loss"], rel=error)
    assert together["last_loss"] == pytest.approx(alone["last_loss"], rel=error)
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    assert "image to text recall@1" in "".join(printed)
