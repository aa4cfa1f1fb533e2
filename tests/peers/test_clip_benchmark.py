"""CLIP_benchmark itself: its readers and its metrics, over folders that it wrote, on the same weights as ours.

It imports torchvision, for which a stand-in serves; `make test-layouts` installs it beside open_clip and runs this.
"""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from bench.stand_in import import_peer
from siglip_hf.cli.main import main
from tiny_checkpoint import write_tiny_checkpoint

builder = import_peer("clip_benchmark.datasets.builder")
writer = import_peer("clip_benchmark.webdataset_builder")
pytestmark = pytest.mark.skipif(builder is None, reason="CLIP_benchmark is not installed: make test-layouts")
CLASSES = ["bird", "tree", "a cat", "dog", "red house", "moon", "fish"]
CAPTIONS = [
    [f"a {size} {colour} {thing}" for colour in ("red", "green", "blue")]
    for size, thing in product(("small", "big"), ("cat", "dog", "fish", "car", "sun", "moon"))
]


class Samples(list):
    """Pictures with what belongs to them, in the form that CLIP_benchmark converts."""

    classes, templates = CLASSES, ["a photo of the {c}.", "{c}, a small drawing"]


def pictures(count: int) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    encode = writer.PIL_to_bytes("png")
    return [encode(Image.fromarray(small).resize((40, 40), Image.Resampling.NEAREST)) for small in noise]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def theirs(folder):
    """The checkpoint as CLIP_benchmark has its models: the model, the transform of a picture, and the tokenizer."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)

    def transform(picture):
        return processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def tokenizer(texts):
        return processor(text=texts, return_tensors="pt")["input_ids"]

    return model, transform, tokenizer


def ours(data, folder, capsys) -> dict[str, float]:
    capsys.readouterr()
    assert main(["evaluate", str(data), "--model", str(folder), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)["clip_benchmark"]


def loaded(data, transform, task, collate=None):
    dataset = builder.build_dataset("wds/ours", root=str(data), transform=transform, split="test", task=task)
    return torch.utils.data.DataLoader(dataset, batch_size=16, collate_fn=collate)


def test_classification(tmp_path, folder, theirs, capsys, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output, target, topk):
        best = output.topk(max(topk), dim=1).indices
        return [(best[:, :k] == target[:, None]).sum().item() / len(target) for k in topk]

    # Theirs makes a number of an array with one element, which numpy refuses since 2.4.
    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    model, transform, tokenizer = theirs
    numbers = [n * n % 6 for n in range(40)]
    writer.convert_dataset(
        Samples(zip(pictures(40), numbers, strict=True)), "test", tmp_path, image_format="png", max_count=25
    )
    assert len(list((tmp_path / "test").glob("*.tar"))) == 2
    loader = loaded(tmp_path, transform, "zeroshot_classification")
    expected = zeroshot_classification.evaluate(
        model, loader, tokenizer, loader.dataset.classes, loader.dataset.templates, "cpu", amp=False
    )
    assert ours(tmp_path, folder, capsys) == pytest.approx(expected)
    assert 0 < expected["acc1"] < expected["acc5"] < 1


def test_retrieval(tmp_path, folder, theirs, capsys):
    from clip_benchmark.metrics import zeroshot_retrieval

    model, transform, tokenizer = theirs
    samples = list(zip(pictures(12), CAPTIONS, strict=True))
    writer.convert_retrieval_dataset(samples, "test", tmp_path, image_format="png", max_count=7)
    loader = loaded(tmp_path, transform, "zeroshot_retrieval", builder.image_captions_collate_fn)
    expected = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert ours(tmp_path, folder, capsys) == pytest.approx(expected)
    assert len(set(expected.values())) > 3
