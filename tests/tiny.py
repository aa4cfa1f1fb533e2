"""Tiny configurations and stock models with the same weights, shared by the tests."""

import tempfile

import torch
from transformers.models.siglip import configuration_siglip as stock_configuration
from transformers.models.siglip import modeling_siglip as stock_modeling

import siglip_hf

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_config(**kwargs) -> siglip_hf.SiglipConfig:
    """A joint configuration of two towers with 2 blocks of width 32."""
    return siglip_hf.SiglipConfig(text_config=dict(TEXT), vision_config=dict(VISION), **kwargs)


def tiny_inputs(images: int = 3, texts: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels (images, 3, 32, 32) and token ids (texts, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(images, 3, VISION["image_size"], VISION["image_size"], generator=generator),
        "input_ids": torch.randint(2, TEXT["vocab_size"], (texts, 16), generator=generator),
    }


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with random values in every parameter: biases of zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.shape[-1], 16) ** -0.5)
    return model.eval()


def stock_pair(name: str, config=None, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32):
    """A stock model with random weights and ours, loaded from what stock saved.

    Args:
        name: Name of the class, the same in both.
        config: Our configuration; the joint tiny one by default.

    Returns:
        `(stock, ours)`, both in evaluation mode.
    """
    config = tiny_config() if config is None else config
    stock_config = getattr(stock_configuration, type(config).__name__)(**config.to_dict())
    # Stock keeps a plain float32 copy of what both load, so that both start from the same file.
    stock = shaken(getattr(stock_modeling, name)(stock_config))
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        load = {"attn_implementation": attn_implementation, "dtype": dtype}
        stock = getattr(stock_modeling, name).from_pretrained(folder, **load).eval()
        ours, info = getattr(siglip_hf, name).from_pretrained(folder, output_loading_info=True, **load)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return stock, ours.eval()
