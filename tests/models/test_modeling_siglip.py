"""Models: the same numbers as stock on the same weights, and the behaviours stock does not have."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_hf import (
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from tiny import TEXT, VISION, shaken, stock_pair, tiny_config, tiny_inputs


def assert_close(ours: torch.Tensor, stock: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, stock, atol=tolerance, rtol=0)


@pytest.fixture
def model() -> SiglipModel:
    return shaken(SiglipModel(tiny_config()))


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    """The warnings that transformers' logger gives, also those it gives once per process."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("siglip_hf"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


# Parity with stock


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_joint_model_equals_stock(attn_implementation):
    stock, ours = stock_pair("SiglipModel", attn_implementation=attn_implementation)
    inputs = tiny_inputs()
    with torch.no_grad():
        want = stock(**inputs, output_hidden_states=True)
        got = ours(**inputs, output_hidden_states=True)
    for name in ("image_embeds", "text_embeds"):
        assert_close(got[name], want[name])
    for name in ("logits_per_image", "logits_per_text"):
        assert_close(got[name], want[name], 1e-4)
    for tower in ("text_model_output", "vision_model_output"):
        assert_close(got[tower].last_hidden_state, want[tower].last_hidden_state)
        assert_close(got[tower].pooler_output, want[tower].pooler_output)
        assert len(got[tower].hidden_states) == len(want[tower].hidden_states) == 3
        for ours_state, stock_state in zip(got[tower].hidden_states, want[tower].hidden_states, strict=True):
            assert_close(ours_state, stock_state)


def test_attention_weights_equal_stock():
    stock, ours = stock_pair("SiglipModel", attn_implementation="eager")
    inputs = tiny_inputs()
    want, got = stock(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    for tower in ("text_model_output", "vision_model_output"):
        assert len(got[tower].attentions) == len(want[tower].attentions) == 2
        for ours_weights, stock_weights in zip(got[tower].attentions, want[tower].attentions, strict=True):
            assert_close(ours_weights, stock_weights)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_mask_equals_stock(attn_implementation):
    stock, ours = stock_pair("SiglipTextModel", tiny_config().text_config, attn_implementation)
    input_ids = tiny_inputs()["input_ids"]
    mask = torch.ones_like(input_ids)
    mask[0, 9:] = 0
    want, got = (m(input_ids, attention_mask=mask).last_hidden_state for m in (stock, ours))
    assert_close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("size", [(48, 48), (24, 24), (32, 64), (40, 24), (35, 51)])
def test_interpolated_positions_equal_stock(size):
    stock, ours = stock_pair("SiglipVisionModel", tiny_config().vision_config)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    want, got = (m(pixels, interpolate_pos_encoding=True).pooler_output for m in (stock, ours))
    assert_close(got, want)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2, 1])])
def test_image_classification_equals_stock(labels):
    stock, ours = stock_pair("SiglipForImageClassification", tiny_config(num_labels=3))
    pixels = tiny_inputs()["pixel_values"]
    want, got = stock(pixels, labels=labels), ours(pixels, labels=labels)
    assert_close(got.logits, want.logits)
    if labels is not None:
        assert_close(got.loss, want.loss)


@pytest.mark.parametrize("preset", ["siglip-base-patch16-224", "siglip-so400m-patch14-384"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_shapes_equal_stock(preset, dtype):
    config = SiglipConfig.from_preset(preset)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    config.text_config.vocab_size = 1000  # the width of the table does not matter, its memory does
    stock, ours = stock_pair("SiglipModel", config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    inputs = {
        "pixel_values": torch.randn(1, 3, size, size, generator=generator).to(dtype),
        "input_ids": torch.randint(0, 1000, (2, length), generator=generator),
    }
    with torch.no_grad():
        want, got = stock(**inputs), ours(**inputs)
    for name in ("image_embeds", "text_embeds"):
        if dtype == torch.float32:
            assert_close(got[name], want[name])
            assert_close(got.logits_per_image, want.logits_per_image, 1e-4)
        else:
            cosine = torch.cosine_similarity(got[name].double(), want[name].double())
            assert cosine.min() >= 0.9999


# The short way of a single query


def attend_plainly(attention, queries, states, mask=None):
    """The attention of a layer with keys and values made for each token."""
    with torch.enable_grad():  # which turns the short way off
        return attention._attend(queries, states, mask)[0].detach()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_without_keys_and_values_equals_the_plain_way(model, masked, dtype):
    attention = model.vision_model.head.attention.to(dtype)
    generator = torch.Generator().manual_seed(3)
    queries, states = (torch.randn(3, n, 32, generator=generator).to(dtype) for n in (1, 9))
    mask = torch.rand(3, 1, 1, 9, generator=generator) > 0.4 if masked else None
    want = attend_plainly(attention, queries, states, mask)
    with torch.no_grad():
        assert attention._can_fold(mask, None)
        got, weights = attention._attend(queries, states, mask)
    assert weights is None
    assert got.shape == (3, 1, 32)
    assert_close(got, want, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_the_short_way_steps_aside(model, tower):
    attention = model.vision_model.head.attention if tower == "vision_model" else model.text_model.encoder.layers[-1]
    attention = getattr(attention, "self_attn", attention)
    assert not attention._can_fold(None, None)  # with gradients every parameter gets one
    with torch.no_grad():
        assert attention._can_fold(None, None)
        assert not attention._can_fold(None, "eager")
        assert not attention._can_fold(torch.zeros(1, 1, 1, 4), None)
        hook = attention.v_proj.register_forward_hook(lambda *args: None)
        assert not attention._can_fold(None, None)
        hook.remove()
        attention.k_proj = torch.nn.Sequential(attention.k_proj)  # as a wrapper for LoRA or quantization would
        assert not attention._can_fold(None, None)


def test_embeddings_follow_changed_weights(model):
    inputs = tiny_inputs()
    with torch.no_grad():
        before = model.encode_image(inputs["pixel_values"])
        model.vision_model.head.attention.v_proj.weight.data.neg_()
        after = model.encode_image(inputs["pixel_values"])
    plain = model.encode_image(inputs["pixel_values"]).detach()
    assert (before - after).abs().max() > 1e-3
    assert_close(after, plain)


# Embeddings


def test_encode_image_and_text_are_the_joint_embeddings(model):
    inputs = tiny_inputs()
    output = model(**inputs)
    assert_close(model.encode_image(inputs["pixel_values"]), output.image_embeds, 1e-6)
    # encode_text skips what the last position does not need; the result must not show it.
    assert_close(model.encode_text(inputs["input_ids"]), output.text_embeds, 1e-6)
    raw = model.encode_text(inputs["input_ids"], normalize=False)
    assert_close(raw, output.text_model_output.pooler_output, 1e-6)
    assert_close(raw / raw.norm(dim=-1, keepdim=True), output.text_embeds, 1e-6)


def test_logits_come_from_scale_and_bias(model):
    output = model(**tiny_inputs())
    cosine = output.image_embeds.double() @ output.text_embeds.double().T
    want = cosine * model.logit_scale.double().exp() + model.logit_bias.double()
    assert_close(output.logits_per_image.double(), want, 1e-5)


def test_one_tower_alone(model):
    inputs = tiny_inputs()
    both = model(**inputs)
    image, text = model(pixel_values=inputs["pixel_values"]), model(input_ids=inputs["input_ids"])
    assert_close(image.image_embeds, both.image_embeds, 1e-6)
    assert_close(text.text_embeds, both.text_embeds, 1e-6)
    assert image.logits_per_image is None
    assert text.vision_model_output is None
    with pytest.raises(ValueError, match="input_ids, pixel_values or both"):
        model()


def test_model_without_pooling_head():
    config = tiny_config()
    config.vision_config.vision_use_head = False
    model = shaken(SiglipModel(config))
    output = model(**tiny_inputs())
    assert output.vision_model_output.last_hidden_state.shape == (3, 16, 32)
    assert output.image_embeds is None
    assert output.text_embeds.shape == (2, 32)
    with pytest.raises(ValueError, match="no pooling head"):
        model.encode_image(tiny_inputs()["pixel_values"])


# The loss


def test_return_loss_is_the_sigmoid_loss_of_the_paper(model):
    output = model(**tiny_inputs(images=3, texts=3), return_loss=True)
    labels = 2 * torch.eye(3, dtype=torch.float64) - 1
    want = torch.nn.functional.softplus(-labels * output.logits_per_image.double()).sum() / 3
    assert_close(output.loss.double(), want)
    single = model(**tiny_inputs(images=1, texts=1), return_loss=True)
    assert_close(single.loss, torch.nn.functional.softplus(-single.logits_per_image).squeeze())


@pytest.mark.parametrize(("images", "texts"), [(3, 2), (1, 2), (3, 1)])
def test_return_loss_refuses_what_is_not_pairs(model, images, texts):
    with pytest.raises(ValueError, match=f"{images} images and {texts} texts"):
        model(**tiny_inputs(images, texts), return_loss=True)


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model(**tiny_inputs(3, 3), return_loss=True).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    # Key biases shift all scores of a query alike, which softmax does not see: their gradient is rounding only.
    dead = [n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-12 and "k_proj.bias" not in n]
    assert dead == []


def test_gradient_checkpointing_changes_no_gradient(model):
    inputs = tiny_inputs(3, 3)
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs, return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, want[name], 1e-6)


# Pictures of another size


@pytest.mark.parametrize("size", [(16, 64), (64, 64), (32, 40), (4, 4)])
def test_wrong_grid_is_refused(model, size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels.*expects 32x32.*interpolate_pos_encoding"):
        model.encode_image(torch.zeros(1, 3, *size))


def test_non_square_image_size():
    config = tiny_config()
    vision = SiglipVisionConfig(**{**VISION, "image_size": (16, 32)})
    model = shaken(SiglipModel(SiglipConfig.from_text_vision_configs(config.text_config, vision)))
    assert model.vision_model.embeddings.num_positions == 8
    assert model.encode_image(torch.zeros(1, 3, 16, 32)).shape == (1, 32)
    with pytest.raises(ValueError, match="expects 16x32"):
        model.encode_image(torch.zeros(1, 3, 32, 16))
    # Twice as large in both directions, from the model's own 2 x 4 grid.
    assert model.encode_image(torch.zeros(1, 3, 32, 64), interpolate_pos_encoding=True).isfinite().all()


@pytest.mark.parametrize("image_size", [64, 24, [32, 64]])
def test_configured_size_resizes_the_checkpoints_positions(model, image_size, tmp_path):
    model.save_pretrained(tmp_path)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    resized = SiglipModel.from_pretrained(tmp_path, vision_config={**VISION, "image_size": image_size})
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    assert_close(resized.encode_image(pixels), model.encode_image(pixels, interpolate_pos_encoding=True), 1e-6)


# Text


def test_texts_and_pictures_instead_of_tensors_are_named(model):
    for texts in (["a cat"], "a cat", [[1, 2]], np.ones((1, 16), int), {"input_ids": torch.ones(1, 16, dtype=int)}):
        with pytest.raises(ValueError, match=rf"input_ids.*\b{type(texts).__name__}\b.*processor\(text="):
            model.encode_text(texts)
    for pictures in ([Image.new("RGB", (32, 32))], Image.new("RGB", (32, 32)), []):
        with pytest.raises(ValueError, match=rf"pixel_values.*\b{type(pictures).__name__}\b.*processor\(images="):
            model.encode_image(pictures)


def test_too_long_text_is_refused(model):
    with pytest.raises(ValueError, match=r"17 tokens.*max_position_embeddings=16.*truncation=True"):
        model.encode_text(torch.ones(1, 17, dtype=torch.long))


def test_short_text_warns_once_and_says_why(model, warnings_of_transformers):
    for _ in range(2):
        model.encode_text(torch.ones(1, 5, dtype=torch.long))
    (record,) = warnings_of_transformers.records
    assert 'padding="max_length", max_length=16' in record.getMessage()


def test_attention_mask_warns_once_and_says_why(model, warnings_of_transformers):
    input_ids = tiny_inputs()["input_ids"]
    for _ in range(2):
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    (record,) = warnings_of_transformers.records
    assert "Leave attention_mask out" in record.getMessage()


# Outputs


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attentions_are_never_empty(attn_implementation, warnings_of_transformers):
    model = shaken(SiglipModel._from_config(tiny_config(), attn_implementation=attn_implementation))
    inputs = tiny_inputs()
    output = model(**inputs, output_attentions=True)
    vision, text = output.vision_model_output, output.text_model_output
    assert [tuple(weights.shape) for weights in vision.attentions] == [(3, 4, 16, 16)] * 2
    assert [tuple(weights.shape) for weights in text.attentions] == [(2, 4, 16, 16)] * 2
    assert [tuple(weights.shape) for weights in vision.cross_attentions] == [(3, 4, 1, 16)]
    for weights in (*vision.attentions, *text.attentions, *vision.cross_attentions):
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    messages = [record.getMessage() for record in warnings_of_transformers.records]
    assert len(messages) == (1 if attn_implementation == "sdpa" else 0)
    assert all("'eager'" in message for message in messages)
    assert_close(output.image_embeds, model(**inputs).image_embeds)


def test_pooling_attention_is_that_of_the_head(model):
    """What the head returns as weights is what mixes its values."""
    pixels = tiny_inputs()["pixel_values"]
    output = model.vision_model(pixels, output_attentions=True)
    head = model.vision_model.head
    values = head.attention.v_proj(output.last_hidden_state).unflatten(-1, (4, 8))  # (B, N, H, D / H)
    mixed = torch.einsum("bhn,bnhd->bhd", output.cross_attentions[0][:, :, 0], values).flatten(1)
    pooled = head.attention.out_proj(mixed)
    assert_close(pooled + head.mlp(head.layernorm(pooled)), output.pooler_output)


def test_hidden_states_by_config_reach_both_towers(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = SiglipModel.from_pretrained(tmp_path, output_hidden_states=True)
    output = again(**tiny_inputs())
    assert len(output.vision_model_output.hidden_states) == len(output.text_model_output.hidden_states) == 3
    last = output.vision_model_output.hidden_states[-1]
    # The last hidden state is the last block's output, before the final layer norm.
    assert_close(again.vision_model.post_layernorm(last), output.vision_model_output.last_hidden_state)


def test_return_dict_false_gives_the_same_tensors(model):
    inputs = tiny_inputs()
    output, values = model(**inputs), model(**inputs, return_dict=False)
    assert_close(values[0], output.logits_per_image)
    assert isinstance(values, tuple)
    assert_close(model.vision_model(inputs["pixel_values"], return_dict=False)[1], output.vision_model_output[1])


# Initial values


def test_initial_values_are_those_of_the_paper():
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={**TEXT, "hidden_size": 256, "intermediate_size": 512},
        vision_config={**VISION, "hidden_size": 256, "intermediate_size": 512, "image_size": 128},
    )
    model = SiglipModel(config)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10.0
    vision, block = model.vision_model, model.vision_model.encoder.layers[0]
    assert vision.embeddings.position_embedding.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    xavier = math.sqrt(6 / (256 + 256))
    for attention in (block.self_attn, vision.head.attention):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            assert projection.weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
            assert projection.bias.abs().max().item() == 0
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (256 + 512)), rel=0.01)
    assert 0 < block.mlp.fc1.bias.std().item() < 3e-6
    assert vision.head.probe.abs().max().item() == pytest.approx(math.sqrt(6 / 257), rel=0.05)
    assert model.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(1 / 16, rel=0.05)


# Image classification


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0]]), None),
        (torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0]]), "multi_label_classification"),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]]), "multi_label_classification"),
    ],
)
def test_multi_label_takes_integers(labels, problem_type):
    model = shaken(SiglipForImageClassification(tiny_config(num_labels=3, problem_type=problem_type)))
    output = model(tiny_inputs()["pixel_values"], labels=labels)
    want = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels.float())
    assert_close(output.loss, want)


def test_no_labels_gives_pooled_features():
    model = shaken(SiglipForImageClassification(tiny_config(num_labels=0)))
    pixels = tiny_inputs()["pixel_values"]
    assert_close(model(pixels).logits, model.vision_model(pixels).last_hidden_state.mean(1))


def test_classifier_trains_no_unused_parameter():
    model = shaken(SiglipForImageClassification(tiny_config(num_labels=3))).train()
    model(tiny_inputs()["pixel_values"], labels=torch.tensor([0, 1, 2])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# Loading


@pytest.mark.parametrize("cls", [SiglipTextModel, SiglipVisionModel])
def test_one_tower_of_a_joint_checkpoint(model, cls, tmp_path):
    model.save_pretrained(tmp_path)
    tower, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    inputs = tiny_inputs()
    if cls is SiglipTextModel:
        got, want = tower(inputs["input_ids"]), model.text_model(inputs["input_ids"])
    else:
        got, want = tower(inputs["pixel_values"]), model.vision_model(inputs["pixel_values"])
    assert_close(got.pooler_output, want.pooler_output, 1e-6)


def test_load_state_dict_takes_the_published_form():
    """As the Trainer does it when it resumes or takes the best checkpoint: the file's tensors, not converted."""
    trained, other = (SiglipModel(tiny_config()) for _ in range(2))
    published = dict(trained.state_dict())
    prefix = "vision_model.head.attention"
    for kind in ("weight", "bias"):
        parts = [published.pop(f"{prefix}.{name}_proj.{kind}") for name in "qkv"]
        published[f"{prefix}.in_proj_{kind}"] = torch.cat(parts)
    other.load_state_dict(published, strict=True)
    for name, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert f"{prefix}.in_proj_weight" in published  # the caller's dict is left as it was
