"""Tiny NaFlex configurations, inputs, and stock models with the same weights."""

import tempfile
from pathlib import Path

import torch
from transformers.models.siglip2 import configuration_siglip2 as stock_configuration
from transformers.models.siglip2 import modeling_siglip2 as stock_modeling

import siglip_hf
from tiny import TEXT, VISION, shaken
from tiny_gemma import write_gemma_tokenizer

NAFLEX_VISION = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
# Rows and columns: full, with padding, one patch, a strip, an upright one, as many as learned in another grid.
SHAPES = ((4, 5), (3, 2), (1, 1), (1, 20), (9, 2), (2, 8))
LENGTH = 20


def tiny_config(**kwargs) -> siglip_hf.Siglip2Config:
    """A joint configuration of two towers with 2 blocks of width 32, patches of 8 x 8, and 4 x 4 positions."""
    return siglip_hf.Siglip2Config(text_config=dict(TEXT), vision_config=dict(NAFLEX_VISION), **kwargs)


def tiny_pictures(shapes=SHAPES, length: int = LENGTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random patches (B, length, 192) with zeros for padding, their mask (B, length) and their shapes (B, 2)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(shapes)
    mask = (torch.arange(length) < shapes.prod(dim=1, keepdim=True)).int()
    pixels = torch.randn(len(shapes), length, 192, generator=generator) * mask.unsqueeze(-1)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def tiny_texts(texts: int = 2, seed: int = 0) -> torch.Tensor:
    """Random token ids (texts, 16)."""
    return torch.randint(2, TEXT["vocab_size"], (texts, 16), generator=torch.Generator().manual_seed(seed))


def stock_pair(name: str, config=None, attn_implementation: str = "sdpa"):
    """A stock model with random weights and ours, loaded from what stock saved; both in evaluation mode."""
    config = tiny_config() if config is None else config
    stock_config = getattr(stock_configuration, type(config).__name__)(**config.to_dict())
    stock = shaken(getattr(stock_modeling, name)(stock_config))
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        load = {"attn_implementation": attn_implementation, "dtype": torch.float32}
        stock = getattr(stock_modeling, name).from_pretrained(folder, **load).eval()
        ours, info = getattr(siglip_hf, name).from_pretrained(folder, output_loading_info=True, **load)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return stock, ours.eval()


def write_naflex(folder: Path) -> None:
    """A tiny NaFlex repository."""
    write_gemma_tokenizer(folder, tokenizer_class="GemmaTokenizer")
    text = {key: NAFLEX_VISION[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text |= {"vocab_size": len(siglip_hf.Siglip2Tokenizer.from_pretrained(folder)), "pad_token_id": 0}
    config = siglip_hf.Siglip2Config(text_config=text, vision_config=dict(NAFLEX_VISION))
    siglip_hf.Siglip2Model(config).save_pretrained(folder)
    siglip_hf.Siglip2ImageProcessor(patch_size=8).save_pretrained(folder)
