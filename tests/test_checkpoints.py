"""The embedded checkpoint: its folder, its size, its card, and that it names pictures of a style it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import siglip_hf

PICTURES = Path(__file__).parent / "fixtures" / "pictures"
LABELS = json.loads((PICTURES / "labels.json").read_text(encoding="utf-8"))
FOLDER = Path(siglip_hf.default_checkpoint())


@pytest.fixture(scope="module")
def model():
    return siglip_hf.SiglipModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return siglip_hf.SiglipProcessor.from_pretrained(FOLDER)


def test_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
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
    assert right >= 18  # 19 when it was trained; chance is 1
    scores = logits.sigmoid()
    assert scores.diagonal().median() > 0.5
    assert scores[~torch.eye(24, dtype=torch.bool)].median() < 0.01


def test_text_is_read_in_several_languages(model, processor):
    texts = ["cat", "Katze", "고양이", "猫", "rocket", "Rakete", "로켓", "火箭"]
    with torch.inference_mode():
        embeds = model.encode_text(processor(text=texts, return_tensors="pt")["input_ids"])
    cosines = embeds @ embeds.T
    assert cosines[:4, :4].min() > cosines[:4, 4:].max()


def test_card_names_every_source_and_licence():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for package in ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast"):
        assert f"@iconify-json/{package} " in card
    for package in ("emojione", "emojione-monotone", "streamline-emojis", "fxemoji", "openmoji"):
        assert f"@iconify-json/{package} " in card
    for text in ("@lobehub/fluent-emoji-3d ", "emojibase-data ", "Apache-2.0", "CC-BY-4.0", "MIT", "CC-BY-SA-4.0"):
        assert text in card
