"""Configurations: published defaults, the table of presets, and errors that name the values."""

import json
import logging

import pytest
from transformers.models.siglip import configuration_siglip as stock

from siglip_hf import PRESETS, SiglipConfig, SiglipTextConfig, SiglipVisionConfig


@pytest.mark.parametrize("name", ["SiglipTextConfig", "SiglipVisionConfig", "SiglipConfig"])
def test_defaults_are_the_published_ones(name):
    import siglip_hf

    ours, theirs = getattr(siglip_hf, name)().to_dict(), getattr(stock, name)().to_dict()
    for fields in (ours, ours.get("text_config", {}), theirs, theirs.get("text_config", {})):
        # The one deliberate difference: stock's default ids lie outside its own vocabulary.
        fields.pop("bos_token_id", None)
        fields.pop("eos_token_id", None)
    assert ours == theirs


def test_default_config_warns_about_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        SiglipConfig()
        SiglipTextConfig(bos_token_id=49406, eos_token_id=49407)  # as in the published files
    assert caplog.records == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiglipTextConfig(hidden_size=100), r"hidden_size \(100\).*num_attention_heads \(12\)"),
        (lambda: SiglipVisionConfig(num_attention_heads=7), r"hidden_size \(768\).*num_attention_heads \(7\)"),
        (lambda: SiglipVisionConfig(num_attention_heads=0), "num_attention_heads must be at least 1, got 0"),
        (lambda: SiglipVisionConfig(patch_size=300), r"patch_size \(300\) is larger than image_size \(224\)"),
        (lambda: SiglipVisionConfig(image_size=(8, 224)), r"patch_size \(16\) is larger than .*\(8, 224\)"),
        (lambda: SiglipVisionConfig(patch_size=0), "patch_size must be at least 1, got 0"),
        (lambda: SiglipVisionConfig(image_size=(1, 2, 3)), r"one number or \(height, width\); got \[1, 2, 3\]"),
        (lambda: SiglipTextConfig(pad_token_id=32000), r"pad_token_id \(32000\).*32000 ids"),
        (lambda: SiglipTextConfig(hidden_sizes=64), "'hidden_sizes'; did you mean 'hidden_size'"),
        (lambda: SiglipConfig(vision_confg={}), "'vision_confg'; did you mean 'vision_config'"),
        (
            lambda: SiglipConfig(text_config={"hidden_size": 64, "num_attention_heads": 4}),
            r"projection_size \(64\).*hidden_size \(768\)",
        ),
        (lambda: SiglipConfig.from_preset("siglip-base-224"), "siglip-base-patch16-224"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_keys_of_other_programs_are_kept():
    # PaliGemma puts keys of its own into the vision configuration of its SigLIP tower.
    config = SiglipVisionConfig(projection_dim=2048, num_image_tokens=256)
    assert (config.projection_dim, config.num_image_tokens) == (2048, 256)


def test_from_text_vision_configs_copies_both():
    text = SiglipTextConfig(vocab_size=250_000)
    config = SiglipConfig.from_text_vision_configs(text, SiglipVisionConfig(image_size=256))
    assert (config.text_config.vocab_size, config.vision_config.image_size) == (250_000, 256)
    config.text_config.vocab_size = 7
    assert text.vocab_size == 250_000


@pytest.mark.parametrize("image_size", [64, [32, 64], (32, 64)])
def test_json_round_trip(image_size, tmp_path):
    config = SiglipConfig(vision_config={"image_size": image_size, "patch_size": 8})
    config.save_pretrained(tmp_path)
    again = SiglipConfig.from_pretrained(tmp_path)
    assert again.vision_config.patch_grid == config.vision_config.patch_grid
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # width, blocks, heads, patches, vocabulary, length, embedding; from the published config.json files
        ("siglip-base-patch16-224", (768, 12, 12, (14, 14), 32000, 64, 768)),
        ("siglip-base-patch16-256-multilingual", (768, 12, 12, (16, 16), 250000, 64, 768)),
        ("siglip-large-patch16-384", (1024, 24, 16, (24, 24), 32000, 64, 1024)),
        ("siglip-so400m-patch14-224", (1152, 27, 16, (16, 16), 32000, 16, 1152)),
        ("google/siglip-so400m-patch14-384", (1152, 27, 16, (27, 27), 32000, 64, 1152)),
        ("siglip-so400m-patch16-256-i18n", (1152, 27, 16, (16, 16), 250000, 64, 1152)),
        ("siglip2-giant-opt-patch16-384", (1536, 40, 16, (24, 24), 256000, 64, 1536)),
    ],
)
def test_presets(name, expected):
    config = SiglipConfig.from_preset(name)
    vision, text = config.vision_config, config.text_config
    assert expected == (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.patch_grid,
        text.vocab_size,
        text.max_position_embeddings,
        text.projection_size,
    )


def test_every_preset_is_a_valid_configuration():
    for name in PRESETS:
        assert SiglipConfig.from_preset(name).model_type == "siglip"


def test_saved_towers_hold_what_stock_writes():
    """And none of the defaults that every configuration has, such as id2label."""
    from transformers.models.siglip.configuration_siglip import SiglipConfig as StockConfig

    towers = {"hidden_size": 64, "num_attention_heads": 4}
    ours = json.loads(SiglipConfig(text_config=towers, vision_config=towers).to_json_string())
    stock = json.loads(StockConfig(text_config=towers, vision_config=towers).to_json_string())
    for name in ("text_config", "vision_config"):
        assert set(ours[name]) == set(stock[name])
        assert ours[name]["hidden_size"] == 64
    assert ours["model_type"] == "siglip"
