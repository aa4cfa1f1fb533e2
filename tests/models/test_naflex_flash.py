"""Packed pictures and flash attention: all stand in one row, and the kernel is told where each ends."""

import itertools
import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from peers import families
from tiny_siglip2 import SHAPES, tiny_pictures

COUNTS = [math.prod(shape) for shape in SHAPES]
BOUNDS = [0, *itertools.accumulate(COUNTS)]


def by_picture(query, key, value, query_ends, key_ends, scale):
    """Attention spelt out, (T, H, D / H) each: every picture on its own."""
    outputs = []
    for (q, q_end), (k, k_end) in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q:q_end], key[k:k_end]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k:k_end]))
    return torch.cat(outputs)


@pytest.fixture(params=["attention", "kernel"])
def calls(request, monkeypatch):
    """Notes how it is called in place of flash attention: as transformers calls it, or as it calls flash-attn."""
    noted = []

    def kernel(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        noted.append((q.shape, k.shape, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal))
        return by_picture(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), softmax_scale)

    def attention(module, query, key, value, attention_mask, scaling, dropout, is_causal, **lengths):
        assert attention_mask is None
        q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        assert lengths.keys() == set(names)
        found = kernel(q, k, v, *map(lengths.get, names), dropout, scaling, is_causal)
        return found.unflatten(0, (len(query), -1)), None

    if request.param == "kernel":
        process = modeling_flash_attention_utils._lazy_define_process_function(kernel)
        found = ((None, kernel, None, None, None), (process, process))
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: found)
    AttentionInterface.register(
        "flash_stand_in", attention if request.param == "attention" else flash_attention_forward
    )
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    return noted


@pytest.fixture
def model(calls):
    made = families.make("Siglip2Model")
    made.vision_model.config._attn_implementation = "flash_stand_in"  # the public way asks for flash-attn
    return made


@pytest.fixture(scope="module")
def plain():
    return families.make("Siglip2Model")


@pytest.mark.parametrize("packed", [None, True])
@torch.no_grad()
def test_the_kernel_is_told_where_each_picture_ends(model, plain, calls, packed):
    expected = plain.get_image_features(**tiny_pictures())
    embeds = model.encode_image(**tiny_pictures(), packed=packed, normalize=False)
    torch.testing.assert_close(embeds, expected.pooler_output, atol=1e-5, rtol=0)
    *blocks, head = calls
    assert len(blocks) == 2
    for call in blocks:
        assert call[:2] == ((sum(COUNTS), 4, 16), (sum(COUNTS), 4, 16))
        assert call[2].tolist() == call[3].tolist() == BOUNDS
        assert call[4:] == (max(COUNTS), max(COUNTS), 0.0, False)
    assert head[:2] == ((len(COUNTS), 4, 16), (sum(COUNTS), 4, 16))
    assert (head[2].tolist(), head[3].tolist()) == (list(range(len(COUNTS) + 1)), BOUNDS)
    assert head[4:] == (1, max(COUNTS), 0.0, False)
    assert {bounds.dtype for call in calls for bounds in call[2:4]} == {torch.int32}  # what the kernels take


@torch.no_grad()
def test_the_states_are_those_of_the_padded_batch(model, plain):
    inputs = tiny_pictures()
    kept = inputs["pixel_attention_mask"].bool()
    states = model.vision_model(**inputs, packed=True).last_hidden_state
    torch.testing.assert_close(states[kept], plain.vision_model(**inputs).last_hidden_state[kept], atol=1e-5, rtol=0)
    assert (states[~kept] == 0).all()


@torch.no_grad()
def test_patches_masked_inside_a_picture_are_left_out(model, plain, calls):
    inputs = tiny_pictures()
    inputs["pixel_attention_mask"][0, 3:9] = inputs["pixel_attention_mask"][4, 1::2] = 0
    expected = plain.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(model.encode_image(**inputs, normalize=False), expected, atol=1e-5, rtol=0)
    assert calls[0][2][-1] == inputs["pixel_attention_mask"].sum() < sum(COUNTS)


@torch.no_grad()
def test_one_picture_and_pictures_of_one_patch(model, plain, calls):
    for shapes in (((4, 5),), ((1, 1),), ((1, 1), (1, 1))):
        inputs = tiny_pictures(shapes)
        expected = plain.encode_image(**inputs, packed=False)
        torch.testing.assert_close(model.encode_image(**inputs, packed=True), expected, atol=1e-5, rtol=0)
    assert len(calls) == 9


def test_gradients_are_those_of_the_padded_batch(model, plain):
    grads = []
    for each, packed in ((model, True), (plain, False)):
        each.zero_grad()
        each.encode_image(**tiny_pictures(), packed=packed).square().sum(0).norm().backward()
        grads.append({name: value.grad for name, value in each.vision_model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-3)


def test_weights_are_computed_by_eager_as_ever(model, plain):
    with torch.no_grad():
        found = model.vision_model(**tiny_pictures(), packed=True, output_attentions=True)
        expected = plain.vision_model(**tiny_pictures(), packed=True, output_attentions=True)
    torch.testing.assert_close(found.attentions, expected.attentions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
