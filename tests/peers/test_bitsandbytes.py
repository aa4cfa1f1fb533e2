"""bitsandbytes in 4 and 8 bits, through transformers: what is quantized, what comes out, what a file holds."""

import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, BitsAndBytesConfig

import siglip_hf

from . import families, tiny

bnb = pytest.importorskip("bitsandbytes")

# Lowest cosine to the embeddings in full precision that a tiny random model should reach. It is far harsher on a
# quantizer than a trained one, whose weights are larger blocks of smoother numbers.
CONFIGS = {
    "fp4": (BitsAndBytesConfig(load_in_4bit=True), bnb.nn.Linear4bit, 0.95),
    "nf4, nested, bfloat16": (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
        bnb.nn.Linear4bit,
        0.97,
    ),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), bnb.nn.Linear8bitLt, 0.999),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    tiny.joint_model().save_pretrained(folder)
    return folder


def cosines(one: siglip_hf.SiglipModel, other: siglip_hf.SiglipModel) -> torch.Tensor:
    images = one.encode_image(tiny.pictures()).float() * other.encode_image(tiny.pictures()).float()
    texts = one.encode_text(tiny.texts()).float() * other.encode_text(tiny.texts()).float()
    return torch.cat([images.sum(-1), texts.sum(-1)])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_linear_is_quantized_and_files_hold_exactly_that(checkpoint, tmp_path, name):
    quantization, kind, cosine = CONFIGS[name]
    reference = tiny.joint_model()
    model = AutoModel.from_pretrained(checkpoint, quantization_config=quantization, device_map="auto")
    assert isinstance(model, siglip_hf.SiglipModel)
    assert tiny.linears(model, kind) == tiny.linears(reference)
    assert {f"vision_model.head.attention.{part}_proj" for part in ("q", "k", "v", "out")} <= tiny.linears(model, kind)
    assert model.get_memory_footprint() < reference.get_memory_footprint() / 2
    assert cosines(model, reference).min() > cosine

    expected = model(**tiny.inputs())
    # Twice: a loaded model must be savable as well.
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        model, info = AutoModel.from_pretrained(folder, device_map="auto", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert tiny.linears(model, kind) == tiny.linears(reference)
        torch.testing.assert_close(
            model(**tiny.inputs()).logits_per_image, expected.logits_per_image, rtol=0, atol=5e-3
        )


@torch.no_grad()
def test_projections_are_quantized_from_their_own_rows(checkpoint):
    """Each third of the packed projection of the file becomes one quantized layer, the right one."""
    model = AutoModel.from_pretrained(checkpoint, quantization_config=CONFIGS["fp4"][0])
    reference = tiny.joint_model().vision_model.head.attention
    for part in "qkv":
        layer = model.vision_model.head.attention.get_submodule(f"{part}_proj")
        weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        original = reference.get_submodule(f"{part}_proj").weight
        assert torch.nn.functional.cosine_similarity(weight.flatten(), original.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", ["fp4", "int8"])
@torch.no_grad()
def test_a_new_classifier_is_not_quantized(checkpoint, tmp_path, name):
    quantization, kind, _ = CONFIGS[name]
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, quantization_config=quantization, device_map="auto", num_labels=3
    )
    assert type(model.classifier) is torch.nn.Linear
    assert model.classifier.weight.is_floating_point()
    assert tiny.linears(model) - tiny.linears(model, kind) == {"classifier"}
    expected = model(tiny.pictures()).logits
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path, device_map="auto")
    assert type(reloaded.classifier) is torch.nn.Linear
    torch.testing.assert_close(reloaded(tiny.pictures()).logits, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("tower", [siglip_hf.SiglipVisionModel, siglip_hf.SiglipTextModel])
@torch.no_grad()
def test_a_tower_alone(checkpoint, tmp_path, tower):
    inputs = tiny.pictures() if tower is siglip_hf.SiglipVisionModel else tiny.texts()
    model = tower.from_pretrained(checkpoint, quantization_config=CONFIGS["fp4"][0], device_map="auto")
    assert tiny.linears(model, bnb.nn.Linear4bit) == tiny.linears(model)
    expected = model(inputs).pooler_output
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(reloaded(inputs).pooler_output, expected, rtol=0, atol=5e-3)


@torch.no_grad()
def test_naflex_in_4_bits(tmp_path):
    """Every linear layer is quantized, the patch embedding and the head's too, and files hold that."""
    reference = families.make("Siglip2Model")
    reference.save_pretrained(tmp_path / "plain")
    quantization, kind, cosine = CONFIGS["nf4, nested, bfloat16"]
    model = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=quantization, device_map="auto")
    assert isinstance(model, siglip_hf.Siglip2Model)
    assert tiny.linears(model, kind) == tiny.linears(reference)
    inputs = families.inputs_of("Siglip2Model")
    expected, exact = model(**inputs), reference(**inputs)
    for name in ("image_embeds", "text_embeds"):
        assert torch.cosine_similarity(expected[name].float(), exact[name]).min() > cosine
    model.save_pretrained(tmp_path / "quantized")
    reloaded, info = AutoModel.from_pretrained(tmp_path / "quantized", device_map="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tiny.linears(reloaded, kind) == tiny.linears(reference)
    torch.testing.assert_close(reloaded(**inputs).logits_per_image, expected.logits_per_image, rtol=0, atol=5e-3)


def test_layers_can_be_left_out(checkpoint):
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_model.head"])
    model = AutoModel.from_pretrained(checkpoint, quantization_config=quantization)
    left = tiny.linears(model) - tiny.linears(model, bnb.nn.Linear4bit)
    assert left == {name for name in tiny.linears(model) if name.startswith("vision_model.head.")}
    original = tiny.joint_model().vision_model.head.attention
    for part in "qkv":
        loaded = model.vision_model.head.attention.get_submodule(f"{part}_proj").weight
        torch.testing.assert_close(loaded, original.get_submodule(f"{part}_proj").weight, rtol=0, atol=0)


@torch.no_grad()
def test_widths_that_fill_no_block(tmp_path):
    """The MLP of so400m has 4304 rows, which bitsandbytes' layout for AVX512 CPUs cannot hold; 136 behaves alike."""
    shape = {"intermediate_size": 136}
    reference = tiny.joint_model(vision_config=shape, text_config=shape)
    reference.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=CONFIGS["fp4"][0])
    assert cosines(model, reference).min() > 0.95


PUBLISHED_SNIPPET = """
import torch
import requests
from PIL import Image
from transformers import AutoProcessor, AutoModel, BitsAndBytesConfig

bnb_config = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModel.from_pretrained("google/siglip-large-patch16-384", quantization_config=bnb_config, device_map="auto", attn_implementation="sdpa")
processor = AutoProcessor.from_pretrained("google/siglip-base-patch16-224")

url = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"
image = Image.open(requests.get(url, stream=True).raw)
candidate_labels = ["a cat", "a rocket", "a pizza"]

texts = [f'This is a photo of {label}.' for label in candidate_labels]

inputs = processor(text=texts, images=image, padding="max_length", return_tensors="pt").to(model.device)

with torch.no_grad():
    outputs = model(**inputs)

logits_per_image = outputs.logits_per_image
probs = torch.sigmoid(logits_per_image)
print(f"{probs[0][0]:.1%} that image 0 is '{candidate_labels[0]}'")
"""  # noqa: E501


def test_published_snippet_on_the_embedded_checkpoint(monkeypatch, capsys):
    """As published; the labels are ours, and the names and the picture are what the network would have given."""
    picture = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures" / "cat.png"
    requests = types.SimpleNamespace(get=lambda url, stream: types.SimpleNamespace(raw=picture.open("rb")))
    monkeypatch.setitem(sys.modules, "requests", requests)
    code = PUBLISHED_SNIPPET
    for name in ("google/siglip-large-patch16-384", "google/siglip-base-patch16-224"):
        code = code.replace(name, siglip_hf.default_checkpoint())
    names: dict = {}
    exec(code, names)
    assert "that image 0 is 'a cat'" in capsys.readouterr().out
    assert tiny.linears(names["model"], bnb.nn.Linear4bit) == tiny.linears(names["model"])
    # The 4-bit model names the picture as the one in full precision does.
    with torch.no_grad():
        model = AutoModel.from_pretrained(siglip_hf.default_checkpoint(), dtype=torch.float32)
        expected = model(**names["inputs"]).logits_per_image
    assert names["logits_per_image"].argmax() == expected.argmax() == 0
    torch.testing.assert_close(names["logits_per_image"].float(), expected, atol=1.0, rtol=0)
