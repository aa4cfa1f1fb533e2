"""The embedded checkpoints: folders, sizes, cards, and that they name pictures of a style they have never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor, pipeline

import siglip_hf
from siglip_hf.cli.main import main
from siglip_hf.preprocessing.image_intake import load_picture

PICTURES = Path(__file__).parents[1] / "src" / "siglip_hf" / "apps" / "pictures"
LABELS = json.loads((PICTURES / "labels.json").read_text(encoding="utf-8"))
FOLDER = Path(siglip_hf.default_checkpoint())
SENTENCE_TRANSFORMERS = {
    "1_Normalize",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
}
NAFLEX = Path(siglip_hf.naflex_checkpoint())
# How many times as wide and as tall as the picture its canvas is.
SHAPES = ((1, 1), (2, 1), (1, 3), (4, 1), (3, 2), (1, 2), (2, 3))


@pytest.fixture(scope="module")
def model():
    return siglip_hf.SiglipModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return siglip_hf.SiglipProcessor.from_pretrained(FOLDER)


def test_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        *SENTENCE_TRANSFORMERS,
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "spiece.model",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 20e6
    preprocessor = json.loads((FOLDER / "preprocessor_config.json").read_text())
    tokenizer = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert preprocessor["image_processor_type"] == "SiglipImageProcessor"
    assert tokenizer["tokenizer_class"] == "SiglipTokenizer"
    config = json.loads((FOLDER / "config.json").read_text())
    assert tokenizer["model_max_length"] == config["text_config"]["max_position_embeddings"]


def test_weights_are_half_precision_under_published_names():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
        names = set(file.keys())
    assert "vision_model.head.attention.in_proj_weight" in names
    assert not any("head.attention.q_proj" in name for name in names)


def test_stock_transformers_loads_it_and_agrees(model, processor):
    from transformers.models.siglip.modeling_siglip import SiglipModel

    stock, report = SiglipModel.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = processor(images=[PICTURES / "cat.png"], text=["cat", "dog"], return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits_per_image, stock.eval()(**inputs).logits_per_image
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_pictures_of_an_unseen_style_get_their_label(model, processor):
    labels = list(LABELS.values())
    assert len(set(labels)) == 24
    inputs = processor(images=[PICTURES / name for name in LABELS], text=labels, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits_per_image  # (24, 24), the right label on the diagonal
    right = (logits.argmax(1) == torch.arange(24)).sum().item()
    assert right >= 20  # 21 when it was trained; chance is 1
    scores = logits.sigmoid()
    assert scores.diagonal().median() > 0.9  # 0.99
    assert scores[~torch.eye(24, dtype=torch.bool)].median() < 0.2  # 0.13


def test_text_is_read_in_several_languages(model, processor):
    texts = ["cat", "Katze", "고양이", "猫", "rocket", "Rakete", "로켓", "火箭"]
    with torch.inference_mode():
        embeds = model.encode_text(processor(text=texts, return_tensors="pt")["input_ids"])
    cosines = embeds @ embeds.T
    assert cosines[:4, :4].min() > cosines[:4, 4:].max()


@pytest.mark.parametrize("folder", [FOLDER, NAFLEX], ids=["square", "naflex"])
def test_card_names_every_source_and_licence(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for package in ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast"):
        assert f"@iconify-json/{package} " in card
    for package in ("emojione", "emojione-monotone", "streamline-emojis", "fxemoji", "openmoji"):
        assert f"@iconify-json/{package} " in card
    for text in ("@lobehub/fluent-emoji-3d ", "emojibase-data ", "Apache-2.0", "CC-BY-4.0", "MIT", "CC-BY-SA-4.0"):
        assert text in card


# NaFlex


@pytest.fixture(scope="module")
def naflex() -> siglip_hf.Siglip2Model:
    return siglip_hf.Siglip2Model.from_pretrained(NAFLEX, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def naflex_processor():
    return siglip_hf.Siglip2Processor.from_pretrained(NAFLEX)


@pytest.fixture(scope="module")
def label_embeds(naflex, naflex_processor) -> torch.Tensor:
    """(24, E) of the labels of the fixtures."""
    with torch.inference_mode():
        return naflex.encode_text(naflex_processor(text=list(LABELS.values()), return_tensors="pt")["input_ids"])


def on_canvas(name: str, wide: int, tall: int) -> Image.Image:
    """A fixture in the middle of a white canvas, `wide` and `tall` times its size."""
    picture = load_picture(PICTURES / name)
    canvas = Image.new("RGB", (wide * picture.width, tall * picture.height), "white")
    canvas.paste(picture, ((wide - 1) * picture.width // 2, (tall - 1) * picture.height // 2))
    return canvas


def number_right(embeds: torch.Tensor, labels: torch.Tensor) -> int:
    return int(((embeds @ labels.T).argmax(1) == torch.arange(len(labels))).sum())


def test_naflex_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in NAFLEX.iterdir()}
    assert set(files) == {
        *SENTENCE_TRANSFORMERS,
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 10e6
    config = json.loads((NAFLEX / "config.json").read_text())
    preprocessor = json.loads((NAFLEX / "preprocessor_config.json").read_text())
    tokenizer = json.loads((NAFLEX / "tokenizer_config.json").read_text())
    assert config["model_type"] == "siglip2"
    assert preprocessor["image_processor_type"] == "Siglip2ImageProcessor"
    assert preprocessor["patch_size"] == config["vision_config"]["patch_size"]
    assert preprocessor["max_num_patches"] == config["vision_config"]["num_patches"] == 64
    assert tokenizer["tokenizer_class"] == "Siglip2Tokenizer"
    assert tokenizer["model_max_length"] == config["text_config"]["max_position_embeddings"] == 64


def test_naflex_weights_are_half_precision_under_published_names():
    with safe_open(NAFLEX / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
        assert "vision_model.head.attention.in_proj_weight" in file.keys()  # noqa: SIM118
        assert file.get_slice("vision_model.embeddings.patch_embedding.weight").get_shape() == [192, 768]


def test_auto_classes_know_the_naflex_checkpoint():
    assert type(AutoModel.from_pretrained(NAFLEX)) is siglip_hf.Siglip2Model
    processor = AutoProcessor.from_pretrained(NAFLEX)
    assert type(processor) is siglip_hf.Siglip2Processor
    assert type(processor.tokenizer) is siglip_hf.Siglip2Tokenizer


def test_stock_transformers_agrees_on_naflex(naflex, naflex_processor):
    from transformers.models.siglip2.modeling_siglip2 import Siglip2Model

    stock, report = Siglip2Model.from_pretrained(
        NAFLEX, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pictures = [on_canvas("cat.png", 1, 1), on_canvas("dog.png", 3, 1), on_canvas("whale.png", 1, 2)]
    inputs = naflex_processor(images=pictures, text=["Cat", "dog"], return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = naflex(**inputs).logits_per_image, stock.eval()(**inputs).logits_per_image
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# Of 24, where 1 is chance; one more was right when it was trained.
@pytest.mark.parametrize(("budget", "least"), [(16, 19), (36, 16), (64, 14)])
def test_naflex_names_pictures_of_an_unseen_style(naflex, label_embeds, budget, least):
    with torch.inference_mode():
        embeds = naflex.encode_image([PICTURES / name for name in LABELS], max_num_patches=budget)
    assert number_right(embeds, label_embeds) >= least


@pytest.mark.parametrize(("canvas", "least"), [((2, 1), 15), ((1, 2), 11), ((4, 1), 11), ((1, 4), 14)])
def test_naflex_names_pictures_that_are_not_square(model, processor, naflex, label_embeds, canvas, least):
    pictures = [on_canvas(name, *canvas) for name in LABELS]
    with torch.inference_mode():
        right = number_right(naflex.encode_image(pictures), label_embeds)
        inputs = processor(images=pictures, text=list(LABELS.values()), return_tensors="pt")
        squashed = number_right(model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"]))
    assert right >= least
    if max(canvas) == 4:  # what the square checkpoint's processor squashes beyond recognition
        assert right > 2 * squashed


def test_real_pictures_packed_padded_and_alone_agree(naflex, naflex_processor):
    pictures = [on_canvas(name, *shape) for name, shape in zip(LABELS, SHAPES, strict=False)]
    budgets = [64, 16, 36, 64, 25, 50, 9]
    inputs = naflex_processor(images=pictures, max_num_patches=budgets, return_tensors="pt")
    with torch.inference_mode():
        padded = naflex.encode_image(**inputs, packed=False)
        others = [
            naflex.encode_image(**inputs, packed=True),
            naflex.encode_image(pictures, max_num_patches=budgets),
            torch.cat(
                [
                    naflex.encode_image([picture], max_num_patches=budget)
                    for picture, budget in zip(pictures, budgets, strict=True)
                ]
            ),
        ]
    assert len(set(map(tuple, inputs["spatial_shapes"].tolist()))) == len(pictures)
    for index, other in enumerate(others):
        # The list's processor resizes with torch, which may round a level of 255 otherwise.
        torch.testing.assert_close(other, padded, atol=1e-5 if index == 0 else 5e-3, rtol=0)
    torch.testing.assert_close(others[2], others[1], atol=1e-5, rtol=0)


def test_pipeline_and_command_line_take_the_naflex_checkpoint(capsys):
    files, labels = [str(PICTURES / name) for name in LABELS], list(LABELS.values())
    classify = pipeline("zero-shot-image-classification", model=str(NAFLEX))
    results = classify(files, candidate_labels=labels, hypothesis_template="{}")
    assert sum(scores[0]["label"] == label for scores, label in zip(results, labels, strict=True)) >= 14
    arguments = ["--labels", ",".join(labels), "--template", "{}", "--model", str(NAFLEX), "--no-fast", "--json"]
    assert main(["classify", *files, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    for scores, result in zip(results, printed, strict=True):
        assert result["labels"][0]["label"] == scores[0]["label"]
        assert result["labels"][0]["sigmoid"] == pytest.approx(scores[0]["score"], abs=5e-3)
