"""What we save, stock transformers loads without a missing or unexpected key, and the reverse, with equal outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.siglip import modeling_siglip as stock

import siglip_hf

from . import tiny

CLASSES = ["SiglipModel", "SiglipTextModel", "SiglipVisionModel", "SiglipForImageClassification"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(name: str) -> torch.nn.Module:
    """One of our models with random weights."""
    if name == "SiglipForImageClassification":
        return tiny.classifier()
    joint = tiny.joint_model()
    return {"SiglipModel": joint, "SiglipTextModel": joint.text_model, "SiglipVisionModel": joint.vision_model}[name]


def inputs_for(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": tiny.texts(), "pixel_values": tiny.pictures().to(dtype)}
    if name == "SiglipTextModel":
        del inputs["pixel_values"]
    elif name != "SiglipModel":
        del inputs["input_ids"]
    return inputs


def tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever files they lie in."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@torch.no_grad()
def assert_same_outputs(one: torch.nn.Module, other: torch.nn.Module, dtype: torch.dtype) -> None:
    inputs = inputs_for(type(one).__name__, dtype)
    output, expected = one.eval()(**inputs), other.eval()(**inputs)
    compared = 0
    for key in ("logits_per_image", "image_embeds", "text_embeds", "last_hidden_state", "pooler_output", "logits"):
        if expected.get(key) is not None:
            a, b = output[key].float(), expected[key].float()
            if dtype == torch.float32:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            else:
                assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
            compared += 1
    assert compared


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name, dtype, shards, tmp_path):
    """Ours is saved, loaded by stock, saved by stock and loaded by us: the same tensors all the way."""
    size = "60KB" if shards else "1GB"
    model = make(name).to(dtype)
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == shards

    theirs, info = getattr(stock, name).from_pretrained(tmp_path / "ours", dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype
    assert_same_outputs(model, theirs, dtype)

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, info = getattr(siglip_hf, name).from_pretrained(tmp_path / "theirs", dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(ours, theirs, dtype)

    first, second = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=0)
    for key, parameter in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_from_a_joint_checkpoint(name, tmp_path):
    """Every class also starts from the joint checkpoint that the hub holds, ours and theirs with equal outputs."""
    tiny.joint_model().save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = getattr(siglip_hf, name).from_pretrained(tmp_path)
    theirs = getattr(stock, name).from_pretrained(tmp_path)
    if name == "SiglipForImageClassification":
        theirs.classifier.load_state_dict(ours.classifier.state_dict())
    assert_same_outputs(ours, theirs, torch.float32)


def test_a_process_without_this_package(tmp_path):
    """The same, in a process that cannot import this package at all."""
    model = tiny.joint_model()
    model.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    torch.save(tiny.inputs(), tmp_path / "inputs.pt")
    printed = tiny.run_without_siglip_hf(
        "import json, sys, torch\n"
        "from transformers import AutoModel\n"
        "model, info = AutoModel.from_pretrained(sys.argv[1] + '/ours', output_loading_info=True)\n"
        "assert type(model).__module__ == 'transformers.models.siglip.modeling_siglip'\n"
        "model.save_pretrained(sys.argv[1] + '/theirs')\n"
        "with torch.no_grad(): logits = model(**torch.load(sys.argv[1] + '/inputs.pt')).logits_per_image\n"
        "print(json.dumps([logits.tolist(), {key: sorted(map(str, value)) for key, value in info.items()}]))",
        tmp_path,
    )
    logits, info = json.loads(printed.splitlines()[-1])
    assert not any(info.values())
    reloaded = siglip_hf.SiglipModel.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(**tiny.inputs()).logits_per_image
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reloaded(**tiny.inputs()).logits_per_image, expected, rtol=0, atol=1e-5)
