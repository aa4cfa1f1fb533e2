"""Stops `embed`, `index`, `train`, `learn` and `convert` at random moments, runs them again, and compares results.

Each run is a fresh process, ended by SIGKILL, SIGTERM or SIGINT; the last must be answered in one line. After every
stop of `embed` the rows on disk are counted: none may be lost, and the next run must do exactly those that are missing.
Run: python scripts/checks/kills.py --kills 20
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import siglip_hf

BATCH_SIZE, PART_ROWS = 4, 24  # small, so that there are many moments to be killed at
_MODULES = {
    "embed": ["data.embedder"],
    "index": ["search.sources_to_index"],
    "train": ["training.run", "training.trainer"],
    "learn": ["training.learn"],
    "convert": ["integrations.convert"],
}
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_SECONDS = 120  # to end after a signal; more is a hang


def main() -> None:
    """Parses the options, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a checkpoint; the embedded one by default")
    parser.add_argument("--commands", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = write_pictures(Path(folder) / "photos", options.pictures, options.seed)
        # A copy: a checkpoint that someone replaces meanwhile would look like a broken result.
        model = str(shutil.copytree(options.model or siglip_hf.default_checkpoint(), Path(folder) / "model"))
        for name in options.commands:
            result = CHECKS[name](Path(folder), photos, options.kills, options.seed, model)
            signals = ", ".join(f"{result[number.name]} {number.name}" for number in dict.fromkeys(_SIGNALS))
            print(
                f"{name}: {result['kills']} kills ({signals}) in {result['jobs']} jobs, each ended like an unbroken "
                f"one, byte for byte; {result['resumed']} runs went on from rows on disk"
                + (", none lost, none done twice")
                * (name == "embed"),
                flush=True,
            )


def check_embed(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> Counter[str]:
    """Kills embedding; see `_kill_and_compare`."""
    line = ["embed", photos, "--model", model or siglip_hf.default_checkpoint(), "--batch-size", BATCH_SIZE]
    return _kill_and_compare(folder / "embeddings", [*line, "--device", "cpu"], kills, seed, _count_rows)


def check_index(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> Counter[str]:
    """Kills the indexing of embeddings; see `_kill_and_compare`."""
    from siglip_hf.data.embed import embed_source

    embeddings = folder / "to_index"
    embed_source(str(photos), embeddings, model=model, device="cpu", batch_size=BATCH_SIZE)
    return _kill_and_compare(folder / "index", ["index", embeddings], kills, seed, lambda out: 0)


def check_train(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> Counter[str]:
    """Kills training; see `_kill_and_compare`."""
    table = folder / "captions.csv"
    names = [file for number, file in enumerate(sorted(photos.iterdir())) if number % 20 != 7][:16]
    table.write_text("path,text\n" + "".join(f"{name},picture {number}\n" for number, name in enumerate(names)))
    line = ["train", table, "--model", model or siglip_hf.default_checkpoint(), "--steps", 6, "--batch-size", 4]
    line += ["--save-every", 2, "--cpu", "--workers", 0]
    return _kill_and_compare(folder / "trained", line, kills, seed, lambda out: 0)


def check_learn(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> Counter[str]:
    """Kills learning, the embedding of its pictures included; see `_kill_and_compare`."""
    classes = folder / "classes"
    for number, file in enumerate(sorted(photos.iterdir())[:40]):
        (classes / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, classes / f"c{number % 2}")
    line = ["learn", classes, "--model", model or siglip_hf.default_checkpoint(), "--overwrite", "--device", "cpu"]
    return _kill_and_compare(folder / "head", line, kills, seed, lambda out: 0)


def check_convert(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> Counter[str]:
    """Kills a conversion that replaces an earlier one; see `_kill_and_compare`."""
    line = ["convert", model or siglip_hf.default_checkpoint(), "--to", "timm", "--overwrite"]
    return _kill_and_compare(folder / "timm", line, kills, seed, lambda out: 0)


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Small JPEG files of coloured noise, one in twenty of them cut off."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((80, 64))
        file = folder / f"{number:05d}.jpg"
        pixels.save(file)
        if number % 20 == 7:
            file.write_bytes(file.read_bytes()[:200])
    return folder


def _kill_and_compare(
    out: Path, line: list[object], kills: int, seed: int, count_rows: Callable[[Path], int]
) -> Counter[str]:
    """Runs a command with kills until it is done, again and again, until there were enough kills.

    Raises:
        AssertionError: if rows are lost or done twice, a run hangs or shows a traceback, or a result differs from the
            unbroken run's.
    """
    context: Any = multiprocessing.get_context("spawn")
    rng = random.Random(seed)
    said = out.with_suffix(".log")

    def start() -> Any:
        ready, is_ready = context.Pipe(duplex=False)
        words = [*map(str, line), "--out", str(out)]
        process = context.Process(target=_run, args=(is_ready, words, str(said)))
        process.start()
        ready.poll(600)  # its libraries are imported; a kill before that would be one of Python, not of ours
        return process

    shutil.rmtree(out, ignore_errors=True)
    process = start()
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode in (0, 1), f"the unbroken run fails: {said.read_text()}"
    unbroken = _digests(out)
    whole = out.with_name(f"{out.name}_whole")
    out.rename(whole)

    result: Counter[str] = Counter()
    while result["kills"] < kills:
        for made in (out, out.with_name(f"{out.name}.emb")):
            shutil.rmtree(made, ignore_errors=True)
        result["jobs"] += 1
        present = 0
        while True:
            process = start()
            if result["kills"] < kills:
                process.join(rng.uniform(0, seconds))
            else:
                process.join()
            if process.exitcode is not None:
                break
            number = rng.choice(_SIGNALS)
            os.kill(process.pid, number)
            process.join(_SECONDS)
            assert process.exitcode is not None, f"hung after {number.name}: {said.read_text()}"
            words = said.read_text()
            assert "Traceback" not in words, f"{number.name}: {words}"
            result["kills"] += 1
            result[number.name] += 1
            print(f"{out.name}: {result['kills']} kills, {result['jobs']} jobs", file=sys.stderr, flush=True)
            if process.exitcode in (0, 1):  # it was done before the signal reached it
                break
            if number is signal.SIGINT:
                assert process.exitcode == 130, f"{process.exitcode} after SIGINT: {words}"
                assert "siglip-hf: stopped" in words, words
                assert ("the same command goes on where this stopped" in words) == (line[0] != "convert"), words
            found = count_rows(out)
            assert found >= present, f"{present} rows before, {found} now"
            result["resumed"] += found > 0
            present = found
        words = said.read_text()
        assert process.exitcode in (0, 1), f"a run fails with {process.exitcode}: {words}"
        if kept := re.search(r"(\d+) kept", words):
            assert int(kept[1]) == present, f"{present} rows were there, and {kept[1]} were kept"
        assert _digests(out) == unbroken, f"not the result of the unbroken run: {_differences(out, whole)}"
        left = [path.name for path in out.parent.glob(f".{out.name}.*") if path.is_dir()]
        assert not left, f"left beside it: {left}"
    return result


def _run(is_ready: Any, line: list[str], said: str) -> None:
    """Runs a command line in a process of its own, with all that it prints in a file."""
    from siglip_hf.cli.main import main as command_line
    from siglip_hf.data import store

    for name in _MODULES[line[0]]:
        importlib.import_module(f"siglip_hf.{name}")
    store.PART_ROWS = PART_ROWS
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    is_ready.send(True)
    code = command_line(line)
    sys.stdout.flush()
    os._exit(code)  # a signal that comes while Python ends would be Python's to answer


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the lock; of a trained checkpoint only the weights, as the others tell the time."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    if (folder / "report.json").exists():
        files = [folder / "model.safetensors"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _differences(folder: Path, whole: Path) -> str:
    """What is not the same in two folders, in words."""
    import pyarrow.parquet as parquet

    found, expected = _digests(folder), _digests(whole)
    words = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            words.append(f"{name} is {'missing' if name in expected else 'too much'}")
        elif found[name] != expected[name]:
            what = "bytes"
            if name.endswith(".parquet"):
                one, other = (parquet.read_table(place / name).to_pydict() for place in (folder, whole))
                what = "columns " + ", ".join(column for column in one if one[column] != other[column])
            words.append(f"{name} has other {what}")
    return "; ".join(words)


def _count_rows(folder: Path) -> int:
    """Distinct ids in the Parquet files."""
    import pyarrow.parquet as parquet

    ids: set[str] = set()
    for file in folder.glob("[!.]*.parquet"):
        ids.update(parquet.read_table(file, columns=["id"])["id"].to_pylist())
    return len(ids)


CHECKS = {
    "embed": check_embed,
    "index": check_index,
    "train": check_train,
    "learn": check_learn,
    "convert": check_convert,
}

if __name__ == "__main__":
    main()
