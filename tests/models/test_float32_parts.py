"""What is computed in float32 whatever the model's dtype: the softmax of a single query, and resized positions."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import siglip_hf
from siglip_hf.models.embeddings import resize_position_embedding
from siglip_hf.models.naflex import resized_positions
from tiny import shaken, tiny_config, tiny_inputs
from tiny_siglip2 import tiny_config as tiny_naflex_config
from tiny_siglip2 import tiny_pictures

WAYS = ("bfloat16", "autocast")


class SoftmaxDtypes(TorchDispatchMode):
    """Collects the dtypes that softmaxes are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.found.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def model_of(family: str, way: str) -> siglip_hf.SiglipModel:
    if family == "naflex":
        model = siglip_hf.Siglip2Model(tiny_naflex_config())
    else:
        model = siglip_hf.SiglipModel(tiny_config())
    return shaken(model).to(torch.bfloat16 if way == "bfloat16" else torch.float32)


def context(way: str):
    return torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["fixed", "naflex"])
@torch.no_grad()
def test_softmax_of_a_single_query(family, way):
    model = model_of(family, way)
    pictures = tiny_pictures() if family == "naflex" else {"pixel_values": tiny_inputs()["pixel_values"]}
    with context(way), SoftmaxDtypes() as softmaxes:
        model.vision_model(**pictures)
        assert softmaxes.found == [torch.float32]  # the pooling head's; the blocks use torch's fused kernel
        model.encode_text(tiny_inputs()["input_ids"])
        assert softmaxes.found == [torch.float32] * 2  # the last text block's


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_resized_positions(way):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 8, generator=generator)
    table = table.bfloat16() if way == "bfloat16" else table
    shapes, patch_ids = torch.tensor([5, 3]).expand(15, 2), torch.arange(15)
    with context(way):
        naflex = resized_positions(table, (4, 4), shapes, patch_ids)
        fixed = resize_position_embedding(table, (4, 4), (5, 3))
    for got, want in (
        (naflex, resized_positions(table.float(), (4, 4), shapes, patch_ids)),
        (fixed, resize_position_embedding(table.float(), (4, 4), (5, 3))),
    ):
        assert got.dtype == table.dtype
        assert torch.equal(got, want.to(table.dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["fixed", "naflex"])
@torch.no_grad()
def test_positions_inside_the_model(family, way):
    """Patches of zeros and no bias leave the positions alone; they are those of float32, rounded once at most."""
    model = model_of(family, way)
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding.bias.zero_()
    table = embeddings.position_embedding.weight
    side = int(len(table) ** 0.5)
    if family == "naflex":
        shapes, patch_ids = torch.tensor([5, 3]).expand(15, 2), torch.arange(15)
        arguments = torch.zeros(15, embeddings.config.patch_values), shapes, patch_ids
        want = resized_positions(table.float(), (side, side), shapes, patch_ids)
    else:
        patch = embeddings.config.patch_size
        arguments = torch.zeros(1, 3, 5 * patch, 3 * patch), True
        want = resize_position_embedding(table.float(), (side, side), (5, 3))
    with context(way):
        got = embeddings(*arguments).squeeze(0)
    assert got.dtype == table.dtype
    assert torch.equal(got, want.to(table.dtype))
