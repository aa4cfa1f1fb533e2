"""The pipeline packs the weights of a float32 model once it pays, and nobody notices but by the time that it takes."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from PIL import Image

import siglip_hf
from siglip_hf.inference.optimize import optimization
from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="packed weights are for x86 CPUs",
)


def _float32_pipeline(**options):
    checkpoint = siglip_hf.default_checkpoint()
    return transformers.pipeline(
        "zero-shot-image-classification", model=checkpoint, dtype=torch.float32, device="cpu", **options
    )


def _packed(classifier):
    return [block.packed is not None for block in classifier.model.vision_model.encoder.layers]


@needs_onednn
def test_the_pipeline_packs_its_model_once_it_pays_and_numbers_stay():
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    classifier, plain = _float32_pipeline(), _float32_pipeline(optimize=False)
    for round_number in range(8):
        got = classifier(pictures, candidate_labels=["a cat", "a dog"], named_scores=True, batch_size=3)
        want = plain(pictures, candidate_labels=["a cat", "a dog"], named_scores=True)
        for ours, theirs in zip(got, want, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one["label"] == other["label"]
                assert one["cosine"] == pytest.approx(other["cosine"], abs=1e-5)
        assert all(_packed(classifier)) == (2 + 3 * (round_number + 1) >= 16)
    assert not any(_packed(plain))
    assert classifier.label_bank.texts_encoded == 2  # packing forgets nothing
    state = plain.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in classifier.model.state_dict().items())
    classifier(pictures * 8, candidate_labels=["a cat", "a dog"], batch_size=8)
    assert not any(_packed(classifier))  # who has asked for the weights may ask again


@needs_onednn
def test_many_labels_are_encoded_with_packed_weights():
    classifier = _float32_pipeline()
    classifier(Image.new("RGB", (64, 64)), candidate_labels=[f"thing {i}" for i in range(20)])
    assert all(_packed(classifier))


@needs_onednn
def test_a_model_in_training_is_left_alone():
    model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint())
    processor = siglip_hf.SiglipProcessor.from_pretrained(siglip_hf.default_checkpoint())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classifier = transformers.pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    classifier(Image.new("RGB", (64, 64)), candidate_labels=[f"thing {i}" for i in range(20)])
    assert not any(_packed(classifier))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]


@needs_onednn
def test_optimize_picks_the_dtype_too(monkeypatch):
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda: True)
    classifier = _float32_pipeline(optimize=True)
    assert classifier.model.dtype == torch.bfloat16
    assert all(_packed(classifier))
    assert classifier(Image.new("RGB", (64, 64)), candidate_labels=["a cat", "a dog"])


def test_optimize_is_for_siglip():
    with pytest.raises(ValueError, match=r"optimize=True is for SigLIP models, and this is a CLIPModel"):
        SiglipZeroShotImageClassificationPipeline(model=type("CLIPModel", (), {})(), optimize=True)


@needs_onednn
def test_threads_that_share_a_pipeline_wait_for_the_packing():
    classifier, plain = _float32_pipeline(), _float32_pipeline(optimize=False)
    labels = [f"thing {i}" for i in range(3)]
    pictures = [Image.new("RGB", (64, 64), (i * 9, 90, 255 - i * 9)) for i in range(24)]
    want = plain(pictures, candidate_labels=labels)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda picture: classifier(picture, candidate_labels=labels), pictures))
    for ours, theirs in zip(got, want, strict=True):
        assert [r["label"] for r in ours] == [r["label"] for r in theirs]
        assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in theirs], rel=1e-3)
