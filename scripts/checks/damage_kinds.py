"""What `damage.py` damages: files of every kind that the package reads, how they are made, and how they are read."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tiny models of the tests

PICTURES = 6
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
MODELS: list[Path] = []  # a tiny one, outside of the folder that is made again for each input


def _embed(source: Path, out: Path, kind: str = "image") -> Any:
    """Ids of the rows and their number; None if one has an error."""
    from siglip_hf.search import SiglipEmbedder, embed_source

    if not _EMBEDDER:
        _EMBEDDER.append(SiglipEmbedder(MODELS[0], device="cpu", fast=False, workers=1))
    shutil.rmtree(out, ignore_errors=True)
    result = embed_source(str(source), out, kind=kind, embedder=_EMBEDDER[0])
    return None if result.errors else result.manifest.rows


def tiny_model(folder: Path) -> Path:
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
    return [file for file in sorted(tiny_model(folder).iterdir()) if file.is_file()]


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
    assert _cli("learn", folder / "photos", "--out", folder / "head", "--model", tiny_model(folder)) is not None
    shutil.rmtree(folder / "head.emb")
    return [file for file in sorted((folder / "head").iterdir()) if file.is_file()]


def _use_head(folder: Path) -> Any:
    found = _cli("classify", folder / "photos" / "c0" / "0.jpg", "--head", folder / "head", "--json")
    return None if found is None else len(json.loads(found))


def _make_onnx(folder: Path) -> list[Path]:
    _pictures(folder / "photos")
    assert _cli("export", tiny_model(folder), "--out", folder / "onnx") is not None
    return [file for file in sorted((folder / "onnx").iterdir()) if file.is_file()]


def _use_onnx(folder: Path) -> Any:
    found = _cli(
        "classify", folder / "photos" / "0.jpg", "--labels", "a cat, a dog", "--onnx", folder / "onnx", "--json"
    )
    return None if found is None else len(json.loads(found))


def _make_other_layouts(folder: Path) -> list[Path]:
    """An image tower as timm keeps it, and one in a pickle without its configuration."""
    import torch
    from safetensors.torch import load_file

    assert _cli("convert", tiny_model(folder), "--to", "timm", "--out", folder / "timm") is not None
    shutil.copytree(folder / "timm", folder / "pickle")
    torch.save(
        {"state_dict": load_file(folder / "timm" / "model.safetensors")}, folder / "pickle" / "pytorch_model.bin"
    )
    (folder / "pickle" / "model.safetensors").unlink()
    return [file for name in ("timm", "pickle") for file in sorted((folder / name).iterdir())]


def _use_other_layouts(folder: Path) -> Any:
    for name in ("timm", "pickle"):
        if _cli("convert", folder / name, "--out", folder / "out", "--overwrite") is None:
            return None
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()


def _rows() -> dict[str, np.ndarray]:
    return {f"key {number}": np.full(64, number, np.float32) for number in range(100)}


def _make_label_bank(folder: Path) -> list[Path]:
    from siglip_hf.inference.label_store import LabelStore

    LabelStore(folder / "bank").put(_rows())
    return [folder / "bank" / "labels.sqlite"]


def _use_label_bank(folder: Path) -> Any:
    """Wrong rows, and how many there are once those that were lost are computed and kept again."""
    from siglip_hf.inference.label_store import LabelStore

    rows, store = _rows(), LabelStore(folder / "bank")
    found: dict[str, np.ndarray] = {}
    wrong = set()
    for _ in range(4):  # damage may show when rows are written
        store.put({key: row for key, row in rows.items() if key not in found})
        found = store.get(list(rows))
        wrong |= {key for key, row in found.items() if not np.array_equal(row, rows[key])}
    return wrong, len(found)


_SERVERS: list[Any] = []
_BOUNDARY = "a-boundary-between-parts"


def _make_requests(folder: Path) -> list[Path]:
    """Bodies of requests, each in a file named as its endpoint."""
    uri = "data:image/png;base64," + base64.b64encode(_pictures(folder / "photos")[1].read_bytes()).decode()
    bodies: dict[str, Any] = {
        "embeddings": {"input": ["a cat", {"type": "image_url", "image_url": {"url": uri}}]},
        "classify": {"images": [uri, uri], "labels": ["cat", "dog"], "template": ["a {}", "{}"], "top_k": 1},
        "rerank": {"query": "cat", "documents": ["house", {"text": "cat"}], "top_n": 1, "return_documents": True},
        "search": {"index": "idx", "text": "cat", "k": 2, "filter": "*.png"},
    }
    for name, body in bodies.items():
        (folder / name).write_text(json.dumps(body))
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    upload = head.encode() + (folder / "photos" / "1.png").read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode()
    (folder / "embeddings.form").write_bytes(upload)
    return [folder / name for name in (*bodies, "embeddings.form")]


def _use_requests(folder: Path) -> Any:
    """Status and number of results of each; None if one is refused. A server is never at fault."""
    import serving_client
    from siglip_hf.serving.app import create_app
    from siglip_hf.serving.settings import Settings

    if not _SERVERS:
        _SERVERS.append(create_app(Settings(model=str(MODELS[0]), fast=False)))
    form = f"multipart/form-data; boundary={_BOUNDARY}"
    kinds = dict.fromkeys(("embeddings", "classify", "rerank", "search"), "application/json")
    statuses = []
    for name, kind in {**kinds, "embeddings.form": form}.items():
        content = (folder / name).read_bytes()
        endpoint = f"/v1/{name.partition('.')[0]}"
        status, said = serving_client.ask(_SERVERS[0], endpoint, content=content, headers={"content-type": kind})
        if status >= 500 or not said:
            raise RuntimeError(f"{endpoint}: {status}: {said}")
        statuses.append(status)
    return tuple(statuses) if statuses == [200, 200, 200, 404, 200] else None  # there is no such index


def _make_run(folder: Path) -> list[Path]:
    """A run of two steps with a checkpoint after each, stopped before it was finished."""
    names = [f"photos/{file.name}" for file in _pictures(folder / "photos")]
    (folder / "a.csv").write_text("path,text\n" + "".join(f"{name},picture {name}\n" for name in names))
    assert _train(folder) is not None
    (folder / "run" / "report.json").unlink()
    return [file for file in sorted((folder / "run" / "checkpoint-2").rglob("*")) if file.is_file()]


def _train(folder: Path) -> str | None:
    options = ("--steps", 2, "--batch-size", 4, "--save-every", 1, "--cpu", "--workers", 0)
    return _cli("train", folder / "a.csv", "--out", folder / "run", "--model", MODELS[0], *options)


def _use_run(folder: Path) -> Any:
    """What a run would go on from; going on reads it all again."""
    from siglip_hf.training.run import _last_checkpoint

    last, damaged = _last_checkpoint(folder / "run", remove=False)
    return None if damaged else Path(str(last)).name


def _make_options(folder: Path) -> list[Path]:
    (folder / "labels.txt").write_text("a cat\na dog\n")
    (folder / "truth.json").write_text(json.dumps({"a.png": "a cat", "b.png": "a dog"}))
    (folder / "config.json").write_text(json.dumps({"data": ["a"], "steps": 2, "learning_rate": 1e-3, "cpu": True}))
    (folder / "keys.txt").write_text("# keys\nabcdefghijklmnop\n")
    (folder / "config.yaml").write_text("data: [a, b]\nsteps: 2\nlearning_rate: 1e-3\nfreeze: [image, text]\n")
    return sorted(folder.iterdir())


def _use_options(folder: Path) -> Any:
    from siglip_hf.inference.classify import read_labels_file, read_truth_file
    from siglip_hf.serving.security import read_keys
    from siglip_hf.training.settings import read_config

    for suffix in ("json", "yaml"):
        read_config(folder / f"config.{suffix}")
    read_keys(folder / "keys.txt", {})
    return len(read_labels_file(folder / "labels.txt")), len(read_truth_file(folder / "truth.json"))


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
        ("classify", picture, "--labels", f"{text},b", "--model", MODELS[0]),
        ("classify", picture, text, "--labels", "a", "--model", MODELS[0]),
        ("classify", picture, "--labels", "a", "--template", text, "--model", MODELS[0]),
        ("classify", picture, "--labels-file", text, "--model", MODELS[0]),
        ("classify", picture, "--truth", text, "--model", MODELS[0]),
        ("classify", picture, "--labels", "a", "--model", text),
        ("classify", picture, "--labels", "a", "--sheet", text, "--model", MODELS[0]),
        ("search", folder / "idx", text),
        ("search", folder / "idx", "--image", text),
        ("search", folder / "idx", "a", "--not", text),
        ("search", folder / "idx", "a", "--path", text),
        ("search", text, "a"),
        ("duplicates", text),
        ("clusters", folder / "idx", "--words", text),
        ("embed", text, "--out", folder / "e", "--model", MODELS[0]),
        ("index", text, "--out", folder / "i", "--model", MODELS[0]),
        ("evaluate", text, "--model", MODELS[0]),
        ("evaluate", folder / "photos", "--template", text, "--model", MODELS[0]),
        ("train", text, "--out", folder / "run", "--model", MODELS[0], "--cpu"),
        ("learn", text, "--out", folder / "head", "--model", MODELS[0]),
        ("convert", text, "--out", folder / "o"),
        ("export", text, "--out", folder / "o"),
        ("verify", text),
    ]
    return None if _cli(*rng.choice(lines)) is None else 1


def _make_full(folder: Path) -> list[Path]:
    import big_vision_reference

    _make_store(folder)
    _make_tables(folder)
    for number, picture in enumerate(sorted((folder / "photos").iterdir())):
        (folder / "classes" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / "classes" / f"c{number % 2}")
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
            ("out.emb", ("embed", folder / "photos", "--model", MODELS[0], "--out", folder / "out.emb")),
            ("out.idx", ("index", folder / "emb", "--out", folder / "out.idx")),
            ("converted", ("convert", folder / "a.npz", "--out", folder / "converted")),
            ("timm", ("convert", MODELS[0], "--to", "timm", "--out", folder / "timm")),
            ("head", ("learn", folder / "classes", "--model", MODELS[0], "--out", folder / "head")),
            ("run", ("train", folder / "a.csv", "--steps", 1, "--cpu", "--model", MODELS[0], "--out", folder / "run")),
            (
                "s.png",
                ("classify", folder / "photos", "--labels", "a,b", "--model", MODELS[0], "--sheet", folder / "s.png"),
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
    "other layouts": Kind(3, _make_other_layouts, _use_other_layouts, cuts=False),
    "label bank": Kind(4, _make_label_bank, _use_label_bank, checked=True),
    "HTTP requests": Kind(4, _make_requests, _use_requests, cuts=False),
    "training checkpoint": Kind(2, _make_run, _use_run, checked=True),
    "files of options": Kind(3, _make_options, _use_options, cuts=False),
    "Parquet and datasets": Kind(2, _make_datasets, _use_datasets, cuts=False),
    "hostile words": Kind(2, _make_words, _use_words, cuts=False),
    "full disk": Kind(1, _make_full, _use_full, checked=True),
}
