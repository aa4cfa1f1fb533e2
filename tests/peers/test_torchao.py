"""torchao through transformers' TorchAoConfig: 8 bits, and 4 bits where this CPU has kernels for them."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, TorchAoConfig

import siglip_hf

from . import tiny

quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8 weight-only": (quantization.Int8WeightOnlyConfig(), 0.999),
    "int8 dynamic": (quantization.Int8DynamicActivationInt8WeightConfig(), 0.999),
    "int4 weight-only": (
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
        0.97,
    ),
    "int4 weights, int8 activations": (
        quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
        ),
        0.97,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    tiny.joint_model().save_pretrained(folder)
    return folder


def quantized(model: torch.nn.Module) -> set[str]:
    """Names of the linear layers whose weight is one of torchao's tensors."""
    return {
        name
        for name in tiny.linears(model)
        if type(model.get_submodule(name).weight) not in (torch.Tensor, torch.nn.Parameter)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_linear_is_quantized_and_files_hold_exactly_that(checkpoint, tmp_path, name, dtype):
    config, cosine = CONFIGS[name]
    reference = tiny.joint_model()
    model = AutoModel.from_pretrained(checkpoint, quantization_config=TorchAoConfig(config), dtype=dtype)
    assert isinstance(model, siglip_hf.SiglipModel)
    assert quantized(model) == tiny.linears(reference)
    expected = model(**tiny.inputs())
    assert expected.image_embeds.dtype == dtype
    original = reference(**tiny.inputs())
    for embeds in ("image_embeds", "text_embeds"):
        assert torch.nn.functional.cosine_similarity(expected[embeds].float(), original[embeds]).min() > cosine

    # Twice: a loaded model must be savable as well.
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert quantized(model) == tiny.linears(reference)
        torch.testing.assert_close(
            model(**tiny.inputs()).logits_per_image, expected.logits_per_image, rtol=0, atol=5e-3
        )
        torch.testing.assert_close(model.logit_scale, reference.logit_scale.to(dtype), rtol=0, atol=0)


@torch.no_grad()
def test_projections_are_quantized_from_their_own_rows(checkpoint):
    """Each third of the packed projection of the file becomes one quantized layer, the right one."""
    model = AutoModel.from_pretrained(checkpoint, quantization_config=TorchAoConfig(CONFIGS["int8 weight-only"][0]))
    for part in "qkv":
        loaded, original = (
            each.vision_model.head.attention.get_submodule(f"{part}_proj") for each in (model, tiny.joint_model())
        )
        torch.testing.assert_close(loaded.weight.dequantize(), original.weight, rtol=0, atol=0.02)
        torch.testing.assert_close(loaded.bias, original.bias, rtol=0, atol=0)


@torch.no_grad()
def test_sharded(checkpoint, tmp_path):
    model = AutoModel.from_pretrained(checkpoint, quantization_config=TorchAoConfig(CONFIGS["int8 weight-only"][0]))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reloaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        reloaded(**tiny.inputs()).logits_per_image, model(**tiny.inputs()).logits_per_image, rtol=0, atol=5e-3
    )


@torch.no_grad()
def test_a_new_classifier_is_not_quantized(checkpoint, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, quantization_config=TorchAoConfig(CONFIGS["int8 weight-only"][0]), num_labels=3
    )
    assert tiny.linears(model) - quantized(model) == {"classifier"}
    expected = model(tiny.pictures()).logits
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tiny.pictures()).logits, expected, rtol=0, atol=5e-3)
