"""Odd surroundings: outputs that take nothing, folders that are gone or cannot be written to, no home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from siglip_hf.apps.page import demo_folder
from siglip_hf.cli.main import main
from tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("pyarrow")
linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full and /proc")
CAT = str(demo_folder() / "cat.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def line_of(capsys):
    """The one line of ours on stderr."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("siglip-hf: ")]
    return line


@linux
def test_an_output_that_takes_nothing_is_named_and_let_go(monkeypatch, capsys):
    saved = os.dup(1)
    try:
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), 1)
        with open(1, "w", closefd=False) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main(["--help"]) == 2
            stdout.flush()  # as Python does at the end; what was not written is let go
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert line_of(capsys).startswith("siglip-hf: the disk of the output is full")


def test_a_current_folder_that_is_gone_is_named(monkeypatch, capsys):
    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert main(["classify", CAT, "--labels", "a"]) == 2
    assert line_of(capsys) == "siglip-hf: the current folder is gone; change to one that is there."


@linux
@pytest.mark.parametrize(
    "line",
    [
        ["classify", CAT, "--labels", "a", "--sheet", "{}/a.png", "--model", "{model}"],
        ["classify", CAT, "--labels", "a", "--label-bank", "{}/bank", "--model", "{model}"],
        ["embed", str(demo_folder()), "--out", "{}/emb", "--model", "{model}"],
        ["index", str(demo_folder()), "--out", "{}/idx", "--model", "{model}"],
        ["train", "{table}", "--out", "{}/run", "--model", "{model}", "--cpu"],
        ["convert", "{model}", "--to", "timm", "--out", "{}/timm"],
        ["convert", "{model}", "--to", "big_vision", "--out", "{}/a.npz"],
    ],
)
def test_a_folder_that_cannot_be_written_to_is_one_line(checkpoint, tmp_path, capsys, line):
    (tmp_path / "a.csv").write_text(f"path,text\n{CAT},a cat\n")
    # Root may write anywhere but below the last.
    words = {"{model}": checkpoint, "{table}": str(tmp_path / "a.csv"), "{}": "/proc/self/task"}
    for word, value in words.items():
        line = [part.replace(word, value) for part in line]
    assert main(line) == 2
    assert "/proc/self/task" in line_of(capsys)


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{} classify {cat} {cat} --labels 고양이,b --json | head -1 | grep -q .", 0, ""),
        ("{} classify {cat} --labels 고양이,b > /dev/full", 2, "the disk of the output is full"),
        ("PYTHONIOENCODING=ascii {} classify {cat} --labels 고양이,b | grep -q uace0", 0, ""),
        ("{} classify {cat} --labels a,b >&-", 0, ""),
        ("{} classify {cat} --labels a,b <&- >&- 2>&-", 0, ""),
        ("env -u HOME {} classify {cat} --labels a,b > /dev/null", 0, ""),
        ("mkdir gone && cd gone && rmdir ../gone && {} classify {cat} --labels a,b", 2, "the current folder is gone"),
    ],
)
def test_real_processes(tmp_path, shell, code, said):
    command = f"{sys.executable} -c 'import sys; from siglip_hf_command import main; sys.exit(main())'"
    line = "set -o pipefail; " + shell.replace("{}", command).replace("{cat}", CAT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
