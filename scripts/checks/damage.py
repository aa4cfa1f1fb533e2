"""Damages every kind of file that the package reads, and counts what becomes of it: found and named, or not.

Bits are flipped and files cut off, with fixed seeds; hostile texts, files that are none, and full disks come on top.
Inputs run in a worker, which is killed when one takes too long. It prints a table and fails if anything passed in
silence, ended in an error that is not one line, or hung. What carries no checksum (a picture, a table, published
weights) cannot tell that a number in it has changed; there, a whole result counts as right.
Run: python scripts/checks/damage.py --inputs 3000
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tiny models of the tests

VERDICTS = ("right", "named", "silent", "traceback", "hung")
PICTURES = 6
_SECONDS = 60  # for one input; more is a hang
_CUTS = 5  # one input in so many is cut off, the others have a bit flipped
_HOSTILE = (
    "a\0b",
    "\ud800",
    "\udce9",
    "a\u2028b",
    "a\x85b",
    "\u202etac",
    "{0.__class__}",
    "{:>9999999}",
    "x" * 200_000,
)


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        share: of all inputs, in parts of the sum.
        make: writes what is to be damaged into a folder, and gives the files.
        use: reads the folder; gives what must not change, None if it says that something is wrong.
        checked: the file tells when a bit of it has changed.
        cuts: a file that is cut off must be noticed.
    """

    share: int
    make: Callable[[Path], list[Path]]
    use: Callable[[Path], Any]
    checked: bool = False
    cuts: bool = True


def main() -> int:
    """Parses the options, runs, prints the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    counts = run(options.inputs, options.seed, options.kinds)
    print(table(counts))
    return 1 if any(count[verdict] for count in counts.values() for verdict in VERDICTS[2:]) else 0


def run(inputs: int, seed: int, kinds: list[str]) -> dict[str, Counter[str]]:
    """What became of about so many inputs, by kind."""
    total = sum(KINDS[name].share for name in kinds)
    counts = {}
    for name in kinds:
        counts[name] = Counter(_run_kind(name, max(1, round(inputs * KINDS[name].share / total)), seed))
        print(f"{name}: {dict(counts[name])}", file=sys.stderr, flush=True)
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """The counts as Markdown."""
    lines = [f"| kind | tried | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 2) + "|"]
    for name, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"| {name} | {count.total()} | {' | '.join(str(count[verdict]) for verdict in VERDICTS)} |")
    return "\n".join(lines)


def _run_kind(name: str, inputs: int, seed: int) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    start = 0
    while start < inputs:
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, name, start, inputs, seed))
        worker.start()
        there.close()
        verdict = "hung"
        try:
            here.poll(10 * _SECONDS) and here.recv()  # it is ready
            while start < inputs and here.poll(_SECONDS):
                verdict, what = here.recv()
                start += 1
                if verdict in VERDICTS[2:]:
                    print(f"{name}: {verdict}: {what}", file=sys.stderr, flush=True)
                yield verdict
                verdict = "hung"
        except EOFError:
            verdict = "traceback"  # the process has crashed
        if start < inputs:
            print(f"{name}: {verdict}: input {start}", file=sys.stderr, flush=True)
            start += 1
            yield verdict
        worker.join(0 if start < inputs else _SECONDS)
        worker.kill()
        worker.join()


def _work(pipe: Any, name: str, start: int, inputs: int, seed: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the bars and warnings of libraries
    with tempfile.TemporaryDirectory() as place:
        judged = judge(name, Path(place), range(start, inputs), seed)
        pipe.send(next(judged))
        for result in judged:
            pipe.send(result)


def judge(name: str, place: Path, numbers: range, seed: int) -> Iterator[tuple[str, str]]:
    """Damages files of a kind again and again.

    Args:
        name: the kind.
        place: a folder to work in.
        numbers: of the inputs; each is the same in every run.
        seed: of all inputs.

    Yields:
        "ready", then for each input its verdict, and in words what was damaged and what was said.
    """
    import torch

    torch.set_num_threads(1)
    _MODELS[:] = [_tiny_model(place / "tiny")]
    kind = KINDS[name]
    whole, folder = place / "whole", place / "damaged"
    whole.mkdir()
    files = [file.relative_to(whole) for file in kind.make(whole)]
    shutil.copytree(whole, folder)
    right = kind.use(folder)
    assert right is not None, f"{name}: the whole files are not read"
    yield "ready", ""
    for number in numbers:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        rng = random.Random(f"{seed} {name} {number}")
        file = rng.choice(files)
        is_cut, what = _damage(folder / file, rng)
        verdict, said = _judge(kind, folder, right, is_cut)
        yield verdict, f"{file} {what}: {said}"


def _damage(file: Path, rng: random.Random) -> tuple[bool, str]:
    content = bytearray(file.read_bytes())
    if rng.randrange(_CUTS) == 0:
        size = rng.randrange(len(content))
        file.write_bytes(content[:size])
        return True, f"cut off after {size} of {len(content)} bytes"
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return False, f"bit {place} flipped"


def _judge(kind: Kind, folder: Path, right: Any, is_cut: bool) -> tuple[str, str]:
    try:
        found = kind.use(folder)
    except (ValueError, OSError) as error:  # what the command line prints as one line
        return ("named", str(error)) if str(error).strip() else ("traceback", repr(error))
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if found is None:
        return "named", ""
    if found == right or not (kind.checked or (is_cut and kind.cuts)):
        return "right", ""
    return "silent", f"{found} is not {right}"[:500]


# --- what is read


def _cli(*arguments: object) -> str | None:
    """The output of a command; None if it has named something.

    Raises:
        RuntimeError: if it ends in an error that is not meant for users.
    """
    from siglip_hf.cli.main import main as command_line

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line([str(argument) for argument in arguments])
    said = err.getvalue()
    if "Traceback" in said or "a fault in version" in said or (code and not said.strip()):
        raise RuntimeError(said[-500:])
    return None if code else out.getvalue()


_EMBEDDER: list[Any] = []
_MODELS: list[Path] = []  # a tiny one, outside of the folder that is made again for each input


def _embed(source: Path, out: Path, kind: str = "image") -> Any:
    """Ids of the rows and their number; None if one has an error."""
    from siglip_hf.search import SiglipEmbedder, embed_source

    if not _EMBEDDER:
        _EMBEDDER.append(SiglipEmbedder(_MODELS[0], device="cpu", fast=False, workers=1))
    shutil.rmtree(out, ignore_errors=True)
    result = embed_source(str(source), out, kind=kind, embedder=_EMBEDDER[0])
    return None if result.errors else result.manifest.rows


def _tiny_model(folder: Path) -> Path:
    from tiny_checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(folder / "model")


def _pictures(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = []
    for number, suffix in zip(range(PICTURES), ("jpg", "png", "webp", "gif", "bmp", "tif"), strict=True):
        pixels = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((40, 32))
        pixels.save(folder / f"{number}.{suffix}")
        files.append(folder / f"{number}.{suffix}")
    return files


def _make_pictures(folder: Path) -> list[Path]:
    return _pictures(folder / "photos")


def _use_pictures(folder: Path) -> Any:
    return _embed(folder / "photos", folder / "emb")


def _make_store(folder: Path) -> list[Path]:
    _pictures(folder / "photos")
    _embed(folder / "photos", folder / "emb")
    return sorted((folder / "emb").glob("[!.]*"))


def _use_store(folder: Path) -> Any:
    from siglip_hf.search import EmbeddingStore

    store = EmbeddingStore.open(folder / "emb")
    return store.rows(["id", "sha256"]).to_pylist(), hashlib.sha256(store.vectors().tobytes()).hexdigest()


def _mend_store(folder: Path) -> Any:
    """Embeds again: whatever was damaged, the rows are those of the whole store."""
    from siglip_hf.search import EmbeddingStore, embed_source

    embed_source(str(folder / "photos"), folder / "emb", embedder=_EMBEDDER[0])
    store = EmbeddingStore.open(folder / "emb")
    return sorted(store.rows(["id"])["id"].to_pylist()), len(store)


def _make_index(folder: Path) -> list[Path]:
    _make_store(folder)
    assert _cli("index", folder / "emb", "--out", folder / "idx") is not None
    return sorted((folder / "idx").glob("[!.]*"))


def _use_index(folder: Path) -> Any:
    return _cli("duplicates", folder / "idx", "--threshold", "0.01", "--json")


def _make_model(folder: Path) -> list[Path]:
    _pictures(folder / "photos")
    return [file for file in sorted(_tiny_model(folder).iterdir()) if file.is_file()]


def _use_model(folder: Path) -> Any:
    found = _cli(
        "classify", folder / "photos" / "0.jpg", "--labels", "a cat, a dog", "--model", folder / "model", "--json"
    )
    return None if found is None else len(json.loads(found))


def _make_npz(folder: Path) -> list[Path]:
    import big_vision_reference

    big_vision_reference.save(folder / "a.npz", big_vision_reference.random_params(big_vision_reference.Sizes()))
    return [folder / "a.npz"]


def _use_npz(folder: Path) -> Any:
    from siglip_hf.integrations.big_vision import convert

    convert(folder / "a.npz", folder / "out", overwrite=True)
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()


def _make_tables(folder: Path) -> list[Path]:
    names = [f"photos/{file.name}" for file in _pictures(folder / "photos")]
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "text"], *([name, f"picture {name}"] for name in names)])
    rows = [{"path": name, "text": f"picture {name}"} for name in names]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "d.txt").write_text("\n".join(names), encoding="utf-8")
    return sorted(folder.glob("?.*"))


def _use_tables(folder: Path) -> Any:
    found = [_embed(file, folder / "emb", "text") for file in sorted(folder.glob("?.*"))]
    return None if None in found else found


def _make_tar(folder: Path) -> list[Path]:
    _pictures(folder / "photos")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for file in sorted((folder / "photos").iterdir()):
            tar.add(file, file.name)
            for suffix, content in ((".txt", b"a text"), (".json", b'{"caption": "a text"}'), (".cls", b"a")):
                member = tarfile.TarInfo(file.stem + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [folder / "a.tar"]


def _make_hostile(folder: Path) -> list[Path]:
    """Texts and paths of table rows that no file should hold, beside a good one, and files that are none."""
    _pictures(folder / "photos")
    (folder / "seeds").write_bytes(bytes(8))  # what is damaged chooses the text
    return [folder / "seeds"]


def _use_hostile(folder: Path) -> Any:
    seed = (folder / "seeds").read_bytes()
    if seed == bytes(8):
        return 1
    rng = random.Random(seed)
    text = rng.choice(_HOSTILE)
    suffix = rng.choice((".csv", ".jsonl", ".txt", ".fifo", ".device", ".folder", ".link"))
    place = folder / f"a{suffix}"
    if suffix == ".csv":
        with open(place, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            csv.writer(file).writerows(
                [["path", "text"], ["photos/0.jpg", "good"], ["photos/1.png", text], [text, "b"]]
            )
    elif suffix == ".jsonl":
        rows = [{"path": "photos/0.jpg", "text": "good"}, {"path": text, "text": text}]
        place.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif suffix == ".txt":
        place.write_text(f"good\n{text}", encoding="utf-8", errors="backslashreplace")
    else:
        target = folder / "photos" / "z.jpg"
        {
            ".fifo": lambda: os.mkfifo(target),
            ".device": lambda: target.symlink_to("/dev/zero"),
            ".folder": lambda: target.mkdir(),
            ".link": lambda: target.symlink_to(folder / "gone.jpg"),
        }[suffix]()
        return _embed(folder / "photos", folder / "emb")
    return _embed(place, folder / "emb", rng.choice(("image", "text")) if suffix != ".txt" else "text")


def _make_naflex(folder: Path) -> list[Path]:
    from tiny_siglip2 import write_naflex

    _pictures(folder / "photos")
    (folder / "model").mkdir()
    write_naflex(folder / "model")
    return [file for file in sorted((folder / "model").iterdir()) if file.is_file()]


def _make_head(folder: Path) -> list[Path]:
    for number, picture in enumerate(_pictures(folder / "photos")):
        (folder / "photos" / f"c{number % 2}").mkdir(exist_ok=True)
        shutil.copy(picture, folder / "photos" / f"c{number % 2}" / f"x{picture.name}")
        picture.rename(folder / "photos" / f"c{number % 2}" / picture.name)
    assert _cli("learn", folder / "photos", "--out", folder / "head", "--model", _tiny_model(folder)) is not None
    shutil.rmtree(folder / "head.emb")
    return [file for file in sorted((folder / "head").iterdir()) if file.is_file()]


def _use_head(folder: Path) -> Any:
    found = _cli("classify", folder / "photos" / "c0" / "0.jpg", "--head", folder / "head", "--json")
    return None if found is None else len(json.loads(found))


def _make_onnx(folder: Path) -> list[Path]:
    _pictures(folder / "photos")
    assert _cli("export", _tiny_model(folder), "--out", folder / "onnx") is not None
    return [file for file in sorted((folder / "onnx").iterdir()) if file.is_file()]


def _use_onnx(folder: Path) -> Any:
    found = _cli(
        "classify", folder / "photos" / "0.jpg", "--labels", "a cat, a dog", "--onnx", folder / "onnx", "--json"
    )
    return None if found is None else len(json.loads(found))


def _make_run(folder: Path) -> list[Path]:
    """A run of two steps with a checkpoint after each, stopped before it was finished."""
    names = [f"photos/{file.name}" for file in _pictures(folder / "photos")]
    (folder / "a.csv").write_text("path,text\n" + "".join(f"{name},picture {name}\n" for name in names))
    assert _train(folder) is not None
    (folder / "run" / "report.json").unlink()
    return [file for file in sorted((folder / "run" / "checkpoint-2").rglob("*")) if file.is_file()]


def _train(folder: Path) -> str | None:
    options = ("--steps", 2, "--batch-size", 4, "--save-every", 1, "--cpu", "--workers", 0)
    return _cli("train", folder / "a.csv", "--out", folder / "run", "--model", _MODELS[0], *options)


def _use_run(folder: Path) -> Any:
    """What a run would go on from; going on reads it all again."""
    from siglip_hf.training.run import _last_checkpoint

    last, damaged = _last_checkpoint(folder / "run", remove=False)
    return None if damaged else Path(str(last)).name


def _make_options(folder: Path) -> list[Path]:
    (folder / "labels.txt").write_text("a cat\na dog\n")
    (folder / "truth.json").write_text(json.dumps({"a.png": "a cat", "b.png": "a dog"}))
    (folder / "config.json").write_text(json.dumps({"data": ["a"], "steps": 2, "learning_rate": 1e-3, "cpu": True}))
    (folder / "config.yaml").write_text("data: [a, b]\nsteps: 2\nlearning_rate: 1e-3\nfreeze: [image, text]\n")
    return sorted(folder.iterdir())


def _use_options(folder: Path) -> Any:
    from siglip_hf.inference.classify import read_labels_file, read_truth_file
    from siglip_hf.training.settings import read_config

    configs = [read_config(folder / f"config.{suffix}") for suffix in ("json", "yaml")]
    return len(read_labels_file(folder / "labels.txt")), len(read_truth_file(folder / "truth.json")), len(configs)


def _make_datasets(folder: Path) -> list[Path]:
    import datasets

    names = [str(file) for file in _pictures(folder / "photos")]
    rows = {"image": [Path(name).read_bytes() for name in names], "text": [f"picture {name}" for name in names]}
    data = datasets.Dataset.from_dict(rows)
    data.save_to_disk(str(folder / "saved"))
    data.to_parquet(str(folder / "a.parquet"))
    return sorted([folder / "a.parquet", *(folder / "saved").iterdir()])


def _use_datasets(folder: Path) -> Any:
    found = [_embed(place, folder / "emb") for place in (folder / "a.parquet", folder / "saved")]
    return None if None in found else found


def _make_words(folder: Path) -> list[Path]:
    """What stands on a command line."""
    _make_index(folder)
    (folder / "seeds").write_bytes(bytes(8))
    return [folder / "seeds"]


def _use_words(folder: Path) -> Any:
    seed = (folder / "seeds").read_bytes()
    if seed == bytes(8):
        return 1
    rng = random.Random(seed)
    text, picture = rng.choice([word for word in _HOSTILE if "\0" not in word]), folder / "photos" / "0.jpg"
    lines: list[tuple[object, ...]] = [
        ("classify", picture, "--labels", f"{text},b", "--model", _MODELS[0]),
        ("classify", picture, text, "--labels", "a", "--model", _MODELS[0]),
        ("classify", picture, "--labels", "a", "--template", text, "--model", _MODELS[0]),
        ("classify", picture, "--labels-file", text, "--model", _MODELS[0]),
        ("classify", picture, "--truth", text, "--model", _MODELS[0]),
        ("classify", picture, "--labels", "a", "--model", text),
        ("classify", picture, "--labels", "a", "--sheet", text, "--model", _MODELS[0]),
        ("search", folder / "idx", text),
        ("search", folder / "idx", "--image", text),
        ("search", folder / "idx", "a", "--not", text),
        ("search", folder / "idx", "a", "--path", text),
        ("search", text, "a"),
        ("duplicates", text),
        ("clusters", folder / "idx", "--words", text),
        ("embed", text, "--out", folder / "e", "--model", _MODELS[0]),
        ("index", text, "--out", folder / "i", "--model", _MODELS[0]),
        ("evaluate", text, "--model", _MODELS[0]),
        ("evaluate", folder / "photos", "--template", text, "--model", _MODELS[0]),
        ("train", text, "--out", folder / "run", "--model", _MODELS[0], "--cpu"),
        ("learn", text, "--out", folder / "head", "--model", _MODELS[0]),
        ("convert", text, "--out", folder / "o"),
        ("export", text, "--out", folder / "o"),
        ("verify", text),
    ]
    return None if _cli(*rng.choice(lines)) is None else 1


def _make_full(folder: Path) -> list[Path]:
    import big_vision_reference

    _make_store(folder)
    _make_tables(folder)
    sizes = big_vision_reference.Sizes()
    big_vision_reference.save(folder / "a.npz", big_vision_reference.random_params(sizes))
    (folder / "seeds").write_bytes(bytes(8))
    return [folder / "seeds"]


def _use_full(folder: Path) -> Any:
    """A command that may write files of so many bytes only; and again without a limit, which must end as always."""
    import resource

    seed = (folder / "seeds").read_bytes()
    if seed == bytes(8):
        return "whole"
    rng = random.Random(seed)
    name, line = rng.choice(
        [
            ("out.emb", ("embed", folder / "photos", "--model", _MODELS[0], "--out", folder / "out.emb")),
            ("out.idx", ("index", folder / "emb", "--out", folder / "out.idx")),
            ("converted", ("convert", folder / "a.npz", "--out", folder / "converted")),
            ("run", ("train", folder / "a.csv", "--steps", 1, "--cpu", "--model", _MODELS[0], "--out", folder / "run")),
            (
                "s.png",
                ("classify", folder / "photos", "--labels", "a,b", "--model", _MODELS[0], "--sheet", folder / "s.png"),
            ),
        ]
    )
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** rng.uniform(1, 6)), hard))
    try:
        stopped = _cli(*line) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if not stopped:
        return "whole"
    if name == "s.png":
        assert not (folder / name).exists(), "a sheet is whole or not there"
    if _cli(*line) is None:
        return "cannot go on"
    left = [path for path in folder.iterdir() if ".partial" in path.name]
    return f"left {left}" if left else None


KINDS = {
    "store": Kind(6, _make_store, _use_store, checked=True),
    "store, embedded again": Kind(3, _make_store, _mend_store, checked=True),
    "index": Kind(5, _make_index, _use_index, checked=True),
    ".npz": Kind(3, _make_npz, _use_npz, checked=True),
    "model folder": Kind(3, _make_model, _use_model, cuts=False),
    "tables": Kind(4, _make_tables, _use_tables, cuts=False),
    "tar": Kind(4, _make_tar, lambda folder: _embed(folder / "a.tar", folder / "emb")),
    "pictures": Kind(4, _make_pictures, _use_pictures),
    "hostile": Kind(2, _make_hostile, _use_hostile, cuts=False),
    "NaFlex model folder": Kind(1, _make_naflex, _use_model, cuts=False),
    "learned classes": Kind(1, _make_head, _use_head, cuts=False),
    "ONNX export": Kind(1, _make_onnx, _use_onnx, cuts=False),
    "training checkpoint": Kind(2, _make_run, _use_run, checked=True),
    "files of options": Kind(3, _make_options, _use_options, cuts=False),
    "Parquet and datasets": Kind(2, _make_datasets, _use_datasets, cuts=False),
    "hostile words": Kind(2, _make_words, _use_words, cuts=False),
    "full disk": Kind(1, _make_full, _use_full, checked=True),
}

if __name__ == "__main__":
    sys.exit(main())
