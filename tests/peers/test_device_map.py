"""accelerate: models spread over memory and disk give the outputs of the whole model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import siglip_hf

from . import families, tiny

JOINT = ["SiglipModel", "Siglip2Model"]


def assert_same_outputs(model: Any, name: str) -> None:
    """The outputs of the whole model: the tokens bit for bit, and what comes out of the pooling head but for rounding.

    Hooks keep the head from folding its query into the keys.
    """
    reference = families.make(name)
    output, expected = families.outputs_of(model, name), families.outputs_of(reference, name)
    families.assert_rounds_alike(output, expected, torch.float32)
    for key in ("last_hidden_state", "logits", "text_embeds"):
        assert key not in expected or torch.equal(output[key], expected[key]), key


@pytest.fixture(params=[False, True], ids=["one file", "shards"])
def checkpoint(request, tmp_path):
    """Saves a model of a class, and gives the folder."""

    def save(name: str) -> Path:
        folder = tmp_path / name
        families.make(name).save_pretrained(folder, max_shard_size="100KB" if request.param else "1GB")
        assert (folder / "model.safetensors.index.json").exists() == request.param
        return folder

    return save


PER_MODULE = {
    "logit_scale": "cpu",
    "logit_bias": "cpu",
    "text_model": "cpu",
    "vision_model.embeddings": "cpu",
    "vision_model.encoder.layers.0": "disk",
    "vision_model.encoder.layers.1": "cpu",
    "vision_model.post_layernorm": "disk",
    "vision_model.head": "disk",
}


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize(
    ("device_map", "expected_devices"),
    [
        ("auto", {"cpu"}),
        ("cpu", {"cpu"}),
        ("sequential", {"cpu"}),
        ({"": "disk"}, {"disk"}),
        (PER_MODULE, {"cpu", "disk"}),
        (
            {"logit_scale": "cpu", "logit_bias": "cpu", "text_model": "disk", "vision_model": "cpu"},
            {"cpu", "disk"},
        ),
    ],
    ids=["auto", "cpu", "sequential", "all on disk", "per module", "a tower on disk"],
)
def test_device_map(name, checkpoint, tmp_path, device_map, expected_devices):
    model = AutoModel.from_pretrained(checkpoint(name), device_map=device_map, offload_folder=tmp_path)
    assert set(getattr(model, "hf_device_map", {"": "cpu"}).values()) == expected_devices
    offloaded = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert bool(offloaded) == ("disk" in expected_devices)
    assert_same_outputs(model, name)


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("device_map", ["auto", "sequential", "balanced"])
def test_max_memory_forces_a_part_to_disk(name, checkpoint, tmp_path, device_map):
    limit = families.make(name).get_memory_footprint() // 2
    model = AutoModel.from_pretrained(
        checkpoint(name), device_map=device_map, max_memory={"cpu": limit}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    in_memory = sum(p.numel() * 4 for p in model.parameters() if p.device.type != "meta")
    assert 0 < in_memory <= limit
    assert_same_outputs(model, name)


@pytest.mark.parametrize("name", families.CLASSES)
def test_no_layer_is_split(name, folder_of, tmp_path):
    """However small the memory, a residual block, the embeddings and the pooling head stay in one place each."""
    model_class, folder = families.model_class(name), folder_of(name)
    reference = model_class.from_pretrained(folder)
    together = set(reference._no_split_modules)
    blocks = [name for name, module in reference.named_modules() if type(module).__name__ in together]
    assert len([name for name in blocks if ".layers." in f".{name}"]) in (2, 4)
    footprint = reference.get_memory_footprint()
    for part in (0.3, 0.5, 0.7, 0.9):
        memory = {"cpu": int(footprint * part)}
        model = model_class.from_pretrained(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path)
        assert "disk" in model.hf_device_map.values()
        inside = [key for key in model.hf_device_map for block in blocks if key.startswith(f"{block}.")]
        assert inside == []
        assert_same_outputs(model, name)


@pytest.fixture(params=JOINT)
def offloaded(request, folder_of, tmp_path):
    """A joint model on disk, and the same in memory."""
    model = AutoModel.from_pretrained(folder_of(request.param), device_map={"": "disk"}, offload_folder=tmp_path)
    return model, families.make(request.param)


@torch.no_grad()
def test_offloaded_models_encode(offloaded):
    model, reference = offloaded
    inputs = families.inputs_of(type(model).__name__)
    texts = inputs.pop("input_ids")
    calls = [lambda model: model.encode_text(texts), lambda model: model.encode_image(**inputs)]
    if isinstance(model, siglip_hf.Siglip2Model):
        rng = np.random.default_rng(0)
        pictures = [
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (9, 90), (8, 8))
        ]
        calls.append(lambda model: model.encode_image(**inputs, packed=True))
        calls.append(lambda model: model.encode_image(pictures))
    else:
        large = tiny.pictures(height=48, width=40)
        calls.append(lambda model: model.encode_image(large, interpolate_pos_encoding=True))
    for call in calls:
        torch.testing.assert_close(call(model), call(reference), rtol=0, atol=1e-5)


def test_pooling_attention_of_offloaded_models(offloaded):
    inputs = families.inputs_of(type(offloaded[0]).__name__)
    del inputs["input_ids"]
    maps, expected = (siglip_hf.pooling_attention(model, inputs) for model in offloaded)
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("embedded", [siglip_hf.default_checkpoint, siglip_hf.naflex_checkpoint])
def test_the_pipeline_with_an_offloaded_model(embedded, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    scores = []
    device_map = {"logit_scale": "cpu", "logit_bias": "cpu", "text_model": "disk", "vision_model": "disk"}
    for options in ({}, {"device_map": device_map, "model_kwargs": {"offload_folder": str(tmp_path)}}):
        classify = pipeline("zero-shot-image-classification", model=embedded(), dtype=torch.float32, **options)
        scores.append({one["label"]: one["logit"] for one in classify(picture, ["cat", "dog"], named_scores=True)})
    assert next(classify.model.vision_model.parameters()).is_meta
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_an_offloaded_model_is_saved_whole(name, folder_of, tmp_path, max_shard_size):
    model = AutoModel.from_pretrained(folder_of(name), device_map=PER_MODULE, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    tensors = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        tensors |= load_file(file)
    assert "vision_model.head.attention.in_proj_weight" in tensors
    assert not [name for name in tensors if "head.attention.q_proj" in name]
    index = tmp_path / "saved" / "model.safetensors.index.json"
    if index.exists():
        # transformers keeps the names from before the conversion in this index, too; those in the files must be there.
        assert tensors.keys() <= json.loads(index.read_text())["weight_map"].keys()
    assert_same_outputs(AutoModel.from_pretrained(tmp_path / "saved"), name)


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_a_new_classifier_on_an_offloaded_tower(family, folder_of, tmp_path):
    """A layer that no file holds gets its first values in memory, while the tower stays on disk."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(
        folder_of(f"{family}Model"),
        num_labels=3,
        device_map={"vision_model": "disk", "classifier": "cpu"},
        offload_folder=tmp_path,
    )
    name = f"{family}ForImageClassification"
    reference = families.make(name)
    reference.classifier.load_state_dict(model.classifier.state_dict())
    reference.vision_model.load_state_dict(families.make(f"{family}Model").vision_model.state_dict())
    families.assert_same(families.outputs_of(model, name), families.outputs_of(reference, name))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: pytest -m gpu tests/peers")
@pytest.mark.parametrize("name", JOINT)
def test_two_gpus(name, folder_of):
    footprint = families.make(name).get_memory_footprint()
    model = AutoModel.from_pretrained(
        folder_of(name), device_map="auto", max_memory={0: int(footprint * 0.6), 1: int(footprint * 0.8)}
    )
    assert set(model.hf_device_map.values()) == {0, 1}
    with torch.no_grad():
        output = model(**{key: value.to(0) for key, value in families.inputs_of(name).items()})
        expected = families.make(name)(**families.inputs_of(name))
    torch.testing.assert_close(output.logits_per_image.cpu(), expected.logits_per_image, rtol=1e-4, atol=1e-4)
