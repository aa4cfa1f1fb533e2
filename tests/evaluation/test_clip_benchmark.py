"""Folders in CLIP_benchmark's layout, measured as it measures: its definitions, written out plainly."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from siglip_hf.cli.main import main
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.evaluation import as_clip_benchmark, evaluate, open_benchmark
from tiny_checkpoint import write_tiny_checkpoint

# The number of a class is its line here, whatever it is called.
CLASSES = ("1", "tree", "a cat", "dog", "red house", "moon", "fish")
TEMPLATES = ("a photo of the {c}.", "{c}, a small drawing")


def write_shard(path: Path, samples: list[tuple[Image.Image, str, str]]) -> None:
    """Pictures with their text, under the ending that is given, as a WebDataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (picture, ending, text) in enumerate(samples):
            encoded = io.BytesIO()
            picture.save(encoded, "PNG")
            for name, content in (("png", encoded.getvalue()), (ending, text.encode())):
                member = tarfile.TarInfo(f"s{number:07d}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [Image.fromarray(small).resize((40, 40), Image.Resampling.NEAREST) for small in noise]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def classes(tmp_path):
    """40 pictures in two shards; the last class has none, and the others not equally many."""
    numbers = [n * n % 6 for n in range(40)]
    samples = [(picture, "cls", str(n)) for picture, n in zip(pictures(40), numbers, strict=True)]
    write_shard(tmp_path / "wds" / "test" / "0.tar", samples[:25])
    write_shard(tmp_path / "wds" / "test" / "1.tar", samples[25:])
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("2\n")
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "wds" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return tmp_path / "wds", numbers


CAPTIONS = [
    [f"a {size} {colour} {thing}" for colour in ("red", "green")] + ["a house"] * (number % 3)
    for number, (size, thing) in enumerate(product(("small", "big"), ("cat", "dog", "fish", "car", "sun", "moon")))
]


@pytest.fixture
def captions(tmp_path):
    """Twelve pictures with two captions each, some also with one or two that others have as well."""
    samples = [(picture, "txt", "\n".join(texts)) for picture, texts in zip(pictures(12), CAPTIONS, strict=True)]
    write_shard(tmp_path / "wds" / "test" / "0.tar", samples)
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval\n")
    return tmp_path / "wds"


@torch.no_grad()
def embed(checkpoint, images, texts):
    """Unit embeddings by the model and the processor alone."""
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding="max_length")
    return model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])


def test_classification_is_clip_benchmarks(checkpoint, classes, capsys):
    folder, numbers = classes
    prompts = [template.format(c=name) for name in CLASSES for template in TEMPLATES]
    images, texts = embed(checkpoint, pictures(40), prompts)
    mean = torch.nn.functional.normalize(texts.unflatten(0, (len(CLASSES), 2)).mean(dim=1), dim=-1)
    best, truth = (images @ mean.T).topk(5).indices, torch.tensor(numbers)
    recalls = [(best[truth == n, 0] == n).double().mean().item() for n in sorted(set(numbers))]
    expected = {
        "acc1": (best[:, 0] == truth).double().mean().item(),
        "acc5": (best == truth[:, None]).any(dim=1).double().mean().item(),
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    assert expected["acc1"] != expected["mean_per_class_recall"]
    assert main(["evaluate", str(folder), "--model", str(checkpoint), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clip_benchmark"] == pytest.approx(expected)
    assert (found["source"], found["pictures"]) == (f"{folder} (test)", 40)
    assert {row["label"]: row["pictures"] for row in found["zero_shot"]["classes"]} == {
        CLASSES[n]: numbers.count(n) for n in set(numbers)
    }


def test_retrieval_is_clip_benchmarks(checkpoint, captions):
    owner = torch.tensor([n for n, texts in enumerate(CAPTIONS) for _ in texts])
    images, texts = embed(checkpoint, pictures(12), [text for texts in CAPTIONS for text in texts])
    cosines = texts @ images.T  # (texts, pictures)
    # Equal texts are equally similar, and which of them topk takes is chance: the places after them decide nothing.
    of_texts = (cosines.topk(5).indices == owner[:, None]).any(dim=1)
    found = evaluate(SiglipEmbedder(checkpoint, device="cpu", dtype="float32"), open_benchmark(captions).source)
    numbers = as_clip_benchmark(found)
    assert set(numbers) == {f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)}
    assert numbers["image_retrieval_recall@5"] == pytest.approx(of_texts.double().mean().item())
    assert 0 < numbers["image_retrieval_recall@5"] < 1
    assert (found.retrieval.images, found.retrieval.texts) == (12, len(owner))


def test_retrieval_without_equal_texts(checkpoint, captions, capsys):
    plain = [texts[:2] for texts in CAPTIONS]
    samples = [(picture, "txt", "\n".join(texts)) for picture, texts in zip(pictures(12), plain, strict=True)]
    write_shard(captions / "test" / "0.tar", samples)
    images, texts = embed(checkpoint, pictures(12), [text for texts in plain for text in texts])
    owner = torch.arange(12).repeat_interleave(2)
    expected = {}
    for k in (1, 5, 10):
        to_image = (texts @ images.T).topk(k).indices == owner[:, None]
        to_text = owner[(images @ texts.T).topk(k).indices] == torch.arange(12)[:, None]
        expected[f"image_retrieval_recall@{k}"] = to_image.any(dim=1).double().mean().item()
        expected[f"text_retrieval_recall@{k}"] = to_text.any(dim=1).double().mean().item()
    assert len(set(expected.values())) > 3
    assert main(["evaluate", str(captions), "--model", str(checkpoint), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["clip_benchmark"] == pytest.approx(expected)


def test_what_is_asked_for_goes_before_what_the_folder_has(checkpoint, classes, tmp_path, capsys):
    folder, _ = classes
    (tmp_path / "other.txt").write_text("\n".join(f"{name} picture" for name in CLASSES))
    line = ["evaluate", str(folder), "--model", str(checkpoint), "--json", "--device", "cpu"]
    assert main([*line, "--labels-file", str(tmp_path / "other.txt"), "--template", "a {}"]) == 0
    found = json.loads(capsys.readouterr().out)["zero_shot"]
    benchmark = open_benchmark(folder)
    assert (benchmark.labels, benchmark.templates) == (CLASSES, ("a photo of the {}.", "{}, a small drawing"))
    embedder = SiglipEmbedder(checkpoint, device="cpu", dtype="float32")
    names = [f"{name} picture" for name in CLASSES]
    expected = evaluate(embedder, benchmark.source, labels=names, templates=["a {}"], numbered=True)
    assert found == expected.zero_shot.as_dict()


@pytest.mark.parametrize(
    ("file", "content", "options", "said"),
    [
        ("test/nshards.txt", "two", [], "holds 'two'; it should be the number of shards"),
        ("test/nshards.txt", "3", [], "2.tar: no such file or folder"),
        ("dataset_type.txt", "multilabel", [], "says 'multilabel'; classification and retrieval are measured"),
        ("classnames.txt", "1\n0\n\ncat", [], "classnames.txt: line 3 is empty"),
        ("classnames.txt", "1\n0", [], "are not among the 2 labels given"),
        ("zeroshot_classification_templates.txt", "a photo", [], "has no single '{}'"),
        (
            "train/nshards.txt",
            "1",
            ["--split", "val"],
            "no split 'val' with a file nshards.txt; it has test, train",
        ),
        ("train/nshards.txt", "1", ["--label-column", "class"], "has no columns; leave 'class' out"),
    ],
)
def test_mistakes_are_told_in_one_line(checkpoint, classes, capsys, file, content, options, said):
    folder, _ = classes
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    assert main(["evaluate", str(folder), "--model", str(checkpoint), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_names_of_classes(checkpoint, classes, capsys):
    folder, _ = classes
    (folder / "classnames.txt").unlink()
    assert main(["evaluate", str(folder), "--model", str(checkpoint), "--device", "cpu"]) == 2
    assert "give their names, in that order, as labels (--labels-file)" in capsys.readouterr().err
