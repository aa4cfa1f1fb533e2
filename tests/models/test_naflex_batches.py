"""NaFlex batches: masks inside pictures, packing, and how often the host waits for the device."""

import pytest
import torch

import siglip_hf
from peers import families
from siglip_hf.models import modeling_siglip2, naflex
from tiny_siglip2 import LENGTH, SHAPES, tiny_pictures


@pytest.fixture(scope="module")
def model() -> siglip_hf.Siglip2Model:
    return families.make("Siglip2Model")


def masked_pictures(beyond: bool = False) -> dict[str, torch.Tensor]:
    """Pictures with patches masked inside, at the start, in the middle and at the end; or with padding let in."""
    inputs = tiny_pictures()
    mask = inputs["pixel_attention_mask"]
    mask[0, 3:9] = mask[1, 0] = mask[3, 19] = mask[4, 1::2] = 0
    if beyond:  # contradicts the shapes; the mask decides, as in stock
        mask[1, 6:8] = 1
        inputs["pixel_values"][1, 6:8] = 0.5
    return inputs


@pytest.mark.parametrize("beyond", [False, True], ids=["inside", "padding let in"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_masked_patches_count_for_nothing_however_they_are_packed(implementation, beyond):
    model = families.make("Siglip2Model")
    model.set_attn_implementation(implementation)
    inputs = masked_pictures(beyond)
    expected = model.get_image_features(**inputs).pooler_output
    whole = model.get_image_features(**tiny_pictures()).pooler_output
    assert ((expected - whole)[[0, 1, 4]].abs().amax(dim=1) > 0.01).all()  # the masks matter
    for packed in (None, True, False):
        embeds = model.encode_image(**inputs, packed=packed, normalize=False)
        torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)
    packed_states = model.vision_model(**inputs, packed=True).last_hidden_state
    padded_states = model.vision_model(**inputs).last_hidden_state
    kept = inputs["pixel_attention_mask"].bool()
    torch.testing.assert_close(packed_states[kept], padded_states[kept], atol=1e-5, rtol=0)
    assert (packed_states[~kept] == 0).all()
    for picture in range(len(SHAPES)):  # whatever the batch
        one = {name: value[picture : picture + 1] for name, value in inputs.items()}
        embeds = model.encode_image(**one, packed=True, normalize=False)
        torch.testing.assert_close(embeds, expected[picture : picture + 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_classifier_packs_masked_patches():
    model, inputs = families.make("Siglip2ForImageClassification"), masked_pictures()
    torch.testing.assert_close(model(**inputs, packed=True).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_a_picture_without_a_patch_cannot_be_packed(model):
    inputs = tiny_pictures()
    inputs["pixel_attention_mask"][2] = 0
    with pytest.raises(ValueError, match="picture 2 has no patch"):
        model.encode_image(**inputs)


# The host and the device


@pytest.mark.parametrize(
    ("call", "reads"),
    [("encode_image", 1), ("features", 1), ("classifier", 1), ("encode_image without a mask", 1), ("a list", 0)],
)
@pytest.mark.parametrize("packed", ["by itself", "packed", "padded"])
def test_the_host_waits_once_for_shapes_and_mask(on_accelerator, call, reads, packed):
    told = on_accelerator["naflex"]
    facts = told[f"{call}, {packed}"]
    assert (facts["fetchs"], facts["reads"], facts["blocking"]) == (reads, 0, reads)
    assert facts["apart"] < 1e-5
    # Shapes and masks that have stayed on the host, as the image processor made them, are read there.
    facts = told[f"{call}, {packed}, on the host"]
    assert (facts["fetchs"], facts["reads"], facts["blocking"]) == (0, 0, 0)
    assert facts["pinned"]
    assert facts["sends"] <= 4  # shapes, mask (for the mean of a classifier too), all places of packed rows together
    assert facts["apart"] < 1e-5


@pytest.mark.parametrize("call", ["Siglip2Model", "Siglip2Model packed", "SiglipModel"])
def test_a_tower_split_over_devices(on_accelerator, call):
    facts = on_accelerator["split"][call]
    assert facts["devices"] == ["cpu", "gpu:0", "gpu:1"]
    assert facts["apart"] < 1e-5


def test_the_rows_are_laid_out_once(model, monkeypatch):
    calls = []
    for module in (naflex, modeling_siglip2):
        monkeypatch.setattr(module, "pack", lambda *args, **kwargs: calls.append(args) or naflex_pack(*args, **kwargs))
    inputs = tiny_pictures()
    model.encode_image(**inputs)
    del inputs["pixel_attention_mask"]
    model.encode_image(**inputs)
    model.vision_model(**inputs, packed=True)
    assert len(calls) == 3


naflex_pack = naflex.pack


def test_places_follow_the_states_to_their_device():
    """The blocks of a split tower lie on several devices; the places were made for the first of them."""
    packing = naflex.pack([LENGTH, 6, 1])
    rows = packing.fill(torch.ones(27, 3, device="meta"))
    assert rows.device.type == "meta"
    assert packing.by_picture(torch.ones(2, LENGTH, 3), LENGTH).shape == (3, LENGTH, 3)
    assert packing.by_picture(rows, LENGTH).device.type == "meta"
    assert packing.take(torch.ones(3, LENGTH, 2, device="meta")).shape == (27, 2)
