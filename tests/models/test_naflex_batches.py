"""NaFlex batches: masks inside pictures, packing, and how often the host waits for the device."""

import pytest
import torch

import siglip_hf
from host_reads import HostReads
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


def host_reads(run, inputs, on_host=()) -> int:
    """How often the host waits for the device in `run(**inputs)`, where the inputs lie on the device."""
    with torch.no_grad(), HostReads() as reads:
        inputs = {name: reads.host(value) if name in on_host else value for name, value in inputs.items()}
        run(**inputs)
    return reads.count


def test_the_counter_counts():
    tensor = torch.ones(2)
    with HostReads() as reads:
        assert torch.tensor([1, 2]).sum().item() == 3  # made on the host
        assert reads.count == 0
        assert tensor.tolist() == [1, 1]
        assert tensor.cpu().tolist() == [1, 1]
        assert tensor.sum() > 1
    assert reads.count == 3


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, 2),  # shapes and mask
        ({"packed": False}, 2),
        ({"packed": True}, 2),
        ({"pixel_attention_mask": None}, 1),
        ({"pixel_attention_mask": None, "packed": True}, 1),
        ({"pixel_attention_mask": None, "packed": False}, 1),
    ],
)
def test_each_input_is_read_once(model, options, reads):
    inputs = tiny_pictures() | {key: value for key, value in options.items() if key != "packed"}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    packed = {key: value for key, value in options.items() if key == "packed"}
    assert host_reads(lambda **given: model.encode_image(**given, **packed), inputs) == reads
    # Shapes and masks that have stayed on the host, as the image processor made them, are read there.
    on_host = ("spatial_shapes", "pixel_attention_mask")
    assert host_reads(lambda **given: model.encode_image(**given, **packed), inputs, on_host) == 0


def test_the_rows_are_laid_out_once(model, monkeypatch):
    calls = []
    for module in (naflex, modeling_siglip2):
        monkeypatch.setattr(module, "pack", lambda *args: calls.append(args) or naflex_pack(*args))
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
