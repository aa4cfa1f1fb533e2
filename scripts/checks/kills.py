"""Kills `siglip-hf embed`, `index` and `train` at random moments, runs them again, and compares the results.

Each run is a fresh process, ended by SIGKILL. After every kill of `embed` the rows on disk are counted: none may be
lost, and the next run must do exactly those that are missing. Run: python scripts/checks/kills.py --kills 20
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import siglip_hf

BATCH_SIZE, PART_ROWS = 4, 24  # small, so that there are many moments to be killed at


def main() -> None:
    """Parses the options, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a checkpoint; the embedded one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = write_pictures(Path(folder) / "photos", options.pictures, options.seed)
        # A copy: a checkpoint that someone replaces meanwhile would look like a broken result.
        model = str(shutil.copytree(options.model or siglip_hf.default_checkpoint(), Path(folder) / "model"))
        for name, check in (("embed", check_embed), ("index", check_index), ("train", check_train)):
            result = check(Path(folder), photos, options.kills, options.seed, model)
            print(
                f"{name}: {result['kills']} kills in {result['jobs']} jobs, each ended like an unbroken one, byte for "
                f"byte; {result['resumed']} runs went on from rows on disk"
                + (", none lost, none done twice")
                * (name == "embed")
            )


def check_embed(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> dict[str, int]:
    """Kills embedding; see `_kill_and_compare`."""

    def run(out: Path, report: Path) -> tuple[Any, ...]:
        return _embed, (str(photos), str(out), str(report), model)

    return _kill_and_compare(folder / "embeddings", run, kills, seed, _count_rows)


def check_index(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> dict[str, int]:
    """Kills the indexing of embeddings; see `_kill_and_compare`."""
    embeddings = folder / "to_index"
    _embed(str(photos), str(embeddings), str(folder / "report.json"), model)

    def run(out: Path, report: Path) -> tuple[Any, ...]:
        return _index, (str(embeddings), str(out), str(report))

    return _kill_and_compare(folder / "index", run, kills, seed, lambda out: 0)


def check_train(folder: Path, photos: Path, kills: int, seed: int = 0, model: str | None = None) -> dict[str, int]:
    """Kills training; see `_kill_and_compare`."""
    table = folder / "captions.csv"
    names = [file for number, file in enumerate(sorted(photos.iterdir())) if number % 20 != 7][:16]
    table.write_text("path,text\n" + "".join(f"{name},picture {number}\n" for number, name in enumerate(names)))

    def run(out: Path, report: Path) -> tuple[Any, ...]:
        return _train, (str(table), str(out), str(report), model)

    return _kill_and_compare(folder / "trained", run, kills, seed, lambda out: 0)


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
    out: Path, run: Callable[[Path, Path], tuple[Any, ...]], kills: int, seed: int, count_rows: Callable[[Path], int]
) -> dict[str, int]:
    """Runs a job with kills until it is done, again and again, until there were enough kills.

    Raises:
        AssertionError: if rows are lost or done twice, or a result differs from the unbroken run's.
    """
    context: Any = multiprocessing.get_context("spawn")
    rng = random.Random(seed)
    report = out.with_suffix(".json")

    def start() -> Any:
        function, arguments = run(out, report)
        ready, is_ready = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(is_ready, function, arguments))
        process.start()
        ready.poll(600)  # its libraries are imported; a kill before that would be one of Python, not of ours
        return process

    shutil.rmtree(out, ignore_errors=True)
    process = start()
    began = time.monotonic()
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0, "the unbroken run fails"
    unbroken = _digests(out)
    whole = out.with_name(f"{out.name}_whole")
    out.rename(whole)

    result = {"kills": 0, "jobs": 0, "resumed": 0}
    while result["kills"] < kills:
        shutil.rmtree(out, ignore_errors=True)
        result["jobs"] += 1
        present = 0
        while True:
            report.unlink(missing_ok=True)
            process = start()
            if result["kills"] < kills:
                process.join(rng.uniform(0, seconds))
            else:
                process.join()
            if process.exitcode is not None:
                assert process.exitcode == 0, f"a run fails with {process.exitcode}"
                break
            process.kill()
            process.join()
            result["kills"] += 1
            print(f"{out.name}: {result['kills']} kills, {result['jobs']} jobs", file=sys.stderr, flush=True)
            found = count_rows(out)
            assert found >= present, f"{present} rows before, {found} now"
            result["resumed"] += found > 0
            present = found
        kept = json.loads(report.read_text())
        assert kept in (None, present), f"{present} rows were there, and {kept} were kept"
        assert _digests(out) == unbroken, f"not the result of the unbroken run: {_differences(out, whole)}"
    return result


def _run(is_ready: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    names = ("training.run", "training.trainer") if function is _train else ("data.embedder", "search.index_source")
    for name in names:
        importlib.import_module(f"siglip_hf.{name}")
    is_ready.send(True)
    function(*arguments)


def _train(table: str, out: str, report: str, model: str | None) -> None:
    from siglip_hf.training.run import run_training
    from siglip_hf.training.settings import TrainSettings

    settings = TrainSettings([table], out, model=model, steps=6, batch_size=4, save_every=2, cpu=True, workers=0)
    run_training(settings)
    Path(report).write_text("null")


def _embed(photos: str, out: str, report: str, model: str | None) -> None:
    from siglip_hf.data import store
    from siglip_hf.data.embed import embed_source

    store.PART_ROWS = PART_ROWS
    result = embed_source(photos, out, model=model, device="cpu", batch_size=BATCH_SIZE)
    Path(report).write_text(json.dumps(result.kept))


def _index(embeddings: str, out: str, report: str) -> None:
    from siglip_hf.data.store import EmbeddingStore
    from siglip_hf.search.index_source import index_embeddings

    index_embeddings(EmbeddingStore.open(embeddings), out)
    Path(report).write_text("null")


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


if __name__ == "__main__":
    main()
