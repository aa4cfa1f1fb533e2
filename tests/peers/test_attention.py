"""Attention implementations: the same numbers from all, switching after loading, attention weights on request."""

import logging

import pytest
import torch
from transformers import AutoModel

import siglip_hf
from siglip_hf.models.layers import _MultiHeadAttention

from . import tiny

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")


@pytest.fixture(autouse=True)
def without_compiling():
    """flex_attention compiles itself, which takes a C++ compiler and long; its plain form has the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def model():
    return tiny.joint_model()


@pytest.fixture
def warnings_given(caplog):
    """Messages that the models log, from now on."""
    siglip_hf.models.modeling_siglip.logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_same_numbers(model, implementation, tmp_path):
    expected = tiny.joint_model()
    expected.set_attn_implementation("eager")
    expected = expected(**tiny.inputs())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for each in (model, loaded):
        layers = [module for module in each.modules() if isinstance(module, _MultiHeadAttention)]
        assert len(layers) == 5  # two blocks in each tower, and the pooling head
        assert {layer.config._attn_implementation for layer in layers} == {implementation}
        output = each(**tiny.inputs())
        for name in ("image_embeds", "text_embeds", "logits_per_image"):
            torch.testing.assert_close(output[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_masked_text(model, implementation):
    """A mask is not how SigLIP was trained, but where one is given all implementations obey it alike."""
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 5:] = 0
    outputs = []
    for each in ("eager", implementation):
        model.set_attn_implementation(each)
        outputs.append(model.text_model(tiny.texts(), attention_mask=mask).pooler_output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    unmasked = model.text_model(tiny.texts()).pooler_output
    assert (unmasked - outputs[0]).abs().amax(-1)[1] > 0.1
    torch.testing.assert_close(unmasked[[0, 2]], outputs[0][[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_attention_weights(model, implementation, masked, warnings_given):
    """Every implementation gives the weights, all but eager by switching to it, with one warning."""
    mask = torch.ones(3, 16, dtype=torch.long)
    if masked:
        mask[:, 12:] = 0
    kwargs = {"attention_mask": mask} if masked else {}
    model.set_attn_implementation("eager")
    expected = model(**tiny.inputs(), **kwargs, output_attentions=True)
    assert [message for message in warnings_given() if "attention weights" in message] == []

    model.set_attn_implementation(implementation)
    for _ in range(2):
        output = model(**tiny.inputs(), **kwargs, output_attentions=True)
    given = [message for message in warnings_given() if "attention weights" in message]
    assert len(given) == (0 if implementation == "eager" else 1)
    assert all(repr(implementation) in message and "'eager'" in message for message in given)
    assert model.config._attn_implementation == implementation

    text, image = output.text_model_output, output.vision_model_output
    assert [tuple(weights.shape) for weights in text.attentions] == [(3, 4, 16, 16)] * 2
    assert [tuple(weights.shape) for weights in image.attentions] == [(2, 4, 16, 16)] * 2
    assert [tuple(weights.shape) for weights in image.cross_attentions] == [(2, 4, 1, 16)]
    for weights in (*text.attentions, *image.attentions, *image.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)
    if masked:
        assert text.attentions[0][..., 12:].abs().max() == 0
    torch.testing.assert_close(text.attentions, expected.text_model_output.attentions)
    torch.testing.assert_close(image.attentions, expected.vision_model_output.attentions)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooling_weights_are_those_that_pool(model):
    """The pooled vector can be computed again from the weights that are returned."""
    output = model.vision_model(tiny.pictures(), output_attentions=True)
    head = model.vision_model.head
    (weights,) = output.cross_attentions  # (B, H, 1, N)
    value = head.attention.v_proj(output.last_hidden_state).unflatten(-1, (4, 16)).transpose(1, 2)
    pooled = head.attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    pooled = pooled + head.mlp(head.layernorm(pooled))
    torch.testing.assert_close(pooled[:, 0], output.pooler_output, rtol=1e-5, atol=1e-5)


def test_flex_attention_says_that_it_cannot_train_on_a_cpu(model):
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model(**tiny.inputs())


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_without_its_package_is_refused_by_name(model, version):
    if torch.cuda.is_available():
        pytest.skip("flash attention may be installed here")
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        model.set_attn_implementation(f"flash_attention_{version}")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu tests/peers")
@pytest.mark.parametrize("version", [2, 3, 4])
@torch.no_grad()
def test_flash_attention(model, version):
    try:
        model.set_attn_implementation(f"flash_attention_{version}")
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    model = model.to("cuda", torch.bfloat16)
    output = model(**{key: value.cuda() for key, value in tiny.inputs().items()})
    expected = tiny.joint_model()(**tiny.inputs())
    for name in ("image_embeds", "text_embeds"):
        assert torch.nn.functional.cosine_similarity(output[name].float().cpu(), expected[name]).min() > 0.999


def test_gradients_are_those_of_eager(model):
    gradients = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(input_ids=tiny.texts(2), pixel_values=tiny.pictures(2), return_loss=True).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
