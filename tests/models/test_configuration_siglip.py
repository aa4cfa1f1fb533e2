"""Configurations: published defaults, the table of presets, and errors that name the values."""

import json
import logging

import pytest
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.siglip import configuration_siglip as stock

from siglip_hf import (
    PRESETS,
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from siglip_hf.models.configuration_siglip import logger


def as_in_stock(fields):
    """Without the field that stock has since transformers 5.23, if this is an older one."""
    if "vision_use_head" in stock.SiglipVisionConfig.__dataclass_fields__:
        return fields
    if isinstance(fields, dict):
        return {key: as_in_stock(value) for key, value in fields.items() if key != "vision_use_head"}
    return fields


@pytest.mark.parametrize("name", ["SiglipTextConfig", "SiglipVisionConfig", "SiglipConfig"])
def test_defaults_are_the_published_ones(name):
    import siglip_hf

    ours, theirs = getattr(siglip_hf, name)().to_dict(), getattr(stock, name)().to_dict()
    for fields in (ours, ours.get("text_config", {}), theirs, theirs.get("text_config", {})):
        # The one deliberate difference: stock's default ids lie outside its own vocabulary.
        fields.pop("bos_token_id", None)
        fields.pop("eos_token_id", None)
    assert as_in_stock(ours) == theirs


def test_default_config_warns_about_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        SiglipConfig()
        SiglipTextConfig(bos_token_id=49406, eos_token_id=49407)  # as in the published files
    assert caplog.records == []


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (SiglipTextConfig, {"hidden_size": 100}, r"hidden_size \(100\).*num_attention_heads \(12\)"),
        (SiglipVisionConfig, {"num_attention_heads": 7}, r"hidden_size \(768\).*num_attention_heads \(7\)"),
        (SiglipVisionConfig, {"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        (SiglipVisionConfig, {"num_hidden_layers": -1}, "num_hidden_layers must be at least 0, got -1"),
        (SiglipTextConfig, {"intermediate_size": 0}, "intermediate_size must be at least 1, got 0"),
        (SiglipTextConfig, {"hidden_act": "gelu_tanh"}, "no hidden_act 'gelu_tanh'; the nearest are .*gelu"),
        (SiglipVisionConfig, {"num_channels": 0}, "num_channels must be at least 1, got 0"),
        (SiglipVisionConfig, {"patch_size": 300}, r"patch_size \(300\) is larger than image_size \(224\)"),
        (SiglipVisionConfig, {"image_size": (8, 224)}, r"patch_size \(16\) is larger than .*\(8, 224\)"),
        (SiglipVisionConfig, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (SiglipVisionConfig, {"image_size": (1, 2, 3)}, r"one number or \(height, width\); got \[1, 2, 3\]"),
        (SiglipTextConfig, {"pad_token_id": 32000}, r"pad_token_id \(32000\).*32000 ids"),
        (
            SiglipConfig,
            {"text_config": {"hidden_size": 64, "num_attention_heads": 4}},
            r"projection_size \(64\).*hidden_size \(768\)",
        ),
        (SiglipConfig, {"vision_config": {"num_attention_heads": 7}}, r"num_attention_heads \(7\)"),
        (Siglip2VisionConfig, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (Siglip2VisionConfig, {"num_channels": 0}, "num_channels must be at least 1, got 0"),
        (Siglip2VisionConfig, {"num_patches": 200}, "num_patches must be a square number .*200"),
        (Siglip2TextConfig, {"num_hidden_layers": -1}, "num_hidden_layers must be at least 0, got -1"),
        (Siglip2Config, {"text_config": {"projection_size": 64}}, r"projection_size \(64\).*hidden_size \(768\)"),
    ],
)
def test_impossible_values_are_named_when_a_model_is_built(config_class, fields, message):
    """Not before: a configuration also stands in those of other models, where nothing is built of it."""
    config = config_class(**fields)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(config)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="siglip-base-patch16-224"):
        SiglipConfig.from_preset("siglip-base-224")


def test_configurations_of_all_models_are_as_without_this_package(monkeypatch):
    """Many hold a SigLIP configuration, and some write values into it that no SigLIP model could have."""

    def construct(name):
        try:
            return as_in_stock(CONFIG_MAPPING[name]().to_dict())
        except Exception as error:  # a few cannot be made without arguments, with stock's either
            return type(error)

    names = [name for name in CONFIG_MAPPING_NAMES if not name.startswith("siglip")]
    assert type(CONFIG_MAPPING["aya_vision"]().vision_config) is SiglipVisionConfig
    with_ours = {name: construct(name) for name in names}
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    assert type(CONFIG_MAPPING["aya_vision"]().vision_config) is stock.SiglipVisionConfig
    assert with_ours == {name: construct(name) for name in names}
    assert sum(isinstance(fields, dict) for fields in with_ours.values()) > 400


@pytest.mark.parametrize(
    ("config_class", "key", "field"),
    [
        (SiglipTextConfig, "hidden_sizes", "hidden_size"),
        (SiglipVisionConfig, "num_channel", "num_channels"),
        (SiglipConfig, "vision_confg", "vision_config"),
        (Siglip2VisionConfig, "num_patchs", "num_patches"),
    ],
)
def test_a_misspelt_key_is_named_once(config_class, key, field, caplog):
    logging.getLogger("transformers").propagate = True
    logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="siglip_hf"):
        for _ in range(2):
            assert getattr(config_class(**{key: 3}), key) == 3
    assert [record.message for record in caplog.records] == [
        f"{config_class.__name__} has no field {key!r}; did you mean {field!r}?"
    ]


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
    towers = {"hidden_size": 64, "num_attention_heads": 4}
    ours = json.loads(SiglipConfig(text_config=towers, vision_config=towers).to_json_string())
    theirs = json.loads(stock.SiglipConfig(text_config=towers, vision_config=towers).to_json_string())
    for name in ("text_config", "vision_config"):
        assert set(as_in_stock(ours[name])) == set(theirs[name])
        assert ours[name]["hidden_size"] == 64
    assert ours["model_type"] == "siglip"
