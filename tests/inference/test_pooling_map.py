import pytest
import torch
from PIL import Image

import siglip_hf
import tiny
import tiny_siglip2
from siglip_hf import pooling_attention
from siglip_hf.inference.pooling_map import draw_heat_map


@pytest.fixture(scope="module")
def model():
    return tiny.shaken(siglip_hf.SiglipModel(tiny.tiny_config()))


def test_equals_the_projections_spelt_out(model):
    pixels = tiny.tiny_inputs()["pixel_values"]
    maps = pooling_attention(model, {"pixel_values": pixels})
    tokens = model.vision_model(pixels).last_hidden_state
    head = model.vision_model.head
    query = head.attention.q_proj(head.probe).unflatten(-1, (4, 8))[0, 0]  # (H, D / H)
    keys = head.attention.k_proj(tokens).unflatten(-1, (4, 8))  # (B, N, H, D / H)
    scores = torch.einsum("hd,bnhd->bhn", query, keys) * 8**-0.5
    torch.testing.assert_close(torch.stack(maps).flatten(1), scores.softmax(-1).mean(1))


def test_is_that_of_eager_attention_and_sums_to_one(model):
    pixels = tiny.tiny_inputs()["pixel_values"]
    maps = torch.stack(pooling_attention(model, {"pixel_values": pixels}))
    (eager,) = model.vision_model(pixels, output_attentions=True).cross_attentions  # (B, H, 1, N)
    torch.testing.assert_close(maps.flatten(1), eager[:, :, 0].mean(1))
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))


def test_the_tower_alone_and_pictures_of_another_size(model):
    pixels = tiny.tiny_inputs()["pixel_values"]
    torch.testing.assert_close(
        pooling_attention(model.vision_model, {"pixel_values": pixels})[1],
        pooling_attention(model, {"pixel_values": pixels})[1],
    )
    (wide,) = pooling_attention(model, {"pixel_values": torch.randn(1, 3, 32, 48), "interpolate_pos_encoding": True})
    assert wide.shape == (4, 6)


def test_naflex_pictures_have_their_own_grids_and_no_padding():
    model = tiny.shaken(siglip_hf.Siglip2Model(tiny_siglip2.tiny_config()))
    inputs = tiny_siglip2.tiny_pictures()
    maps = pooling_attention(model, inputs)
    assert tuple(tuple(map_.shape) for map_ in maps) == tiny_siglip2.SHAPES
    torch.testing.assert_close(torch.stack([map_.sum() for map_ in maps]), torch.ones(len(maps)))


def test_without_a_pooling_head_there_is_nothing_to_show():
    config = siglip_hf.SiglipVisionConfig(**tiny.VISION, vision_use_head=False)
    with pytest.raises(ValueError, match="no pooling head"):
        pooling_attention(siglip_hf.SiglipVisionModel(config), {"pixel_values": torch.zeros(1, 3, 32, 32)})


def test_the_drawing_is_brightest_where_attention_is():
    attention = torch.zeros(4, 4)
    attention[0, 3] = 1
    drawing = draw_heat_map(Image.new("RGB", (100, 50), "white"), attention, side=64)
    assert drawing.size == (64, 32)
    grey = drawing.convert("L")
    assert grey.getpixel((60, 3)) > grey.getpixel((3, 28)) + 50
