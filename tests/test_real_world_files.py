"""Configuration files as people have them: old dumps, conversions, other programs' keys. Each loads, with one meaning.

A row changes the files of a checkpoint folder; model, processor and tokenizer must load through the Auto classes and
give the numbers of the unchanged folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor

import siglip_hf
from tiny_checkpoint import write_tiny_checkpoint

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
TEXTS = ["a photo of the cat", "A DOG"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    naflex = folder / "naflex"
    shutil.copytree(siglip_hf.naflex_checkpoint(), naflex)
    return {"siglip": write_tiny_checkpoint(folder / "siglip"), "siglip2": naflex}


def outputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(model).__module__.startswith("siglip_hf.")
    assert type(processor).__module__.startswith("siglip_hf.")
    inputs = processor(images=PICTURE, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    return output.image_embeds, output.text_embeds


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {family: outputs(folder) for family, folder in folders.items()}


def edit(folder: Path, file: str, change: Any) -> None:
    """Applies a function, or a dict of new values (`...` removes the key), to a JSON file."""
    content = json.loads((folder / file).read_text())
    if callable(change):
        change(content)
    else:
        for key, value in change.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value
    (folder / file).write_text(json.dumps(content))


# What version 4 of transformers wrote into config.json, also into each tower's part.
VERSION_4 = {
    "_name_or_path": "/home/someone/checkpoint",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "torch_dtype": "float32",
    "torchscript": False,
    "transformers_version": "4.37.2",
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def in_towers(values: dict[str, Any]) -> Any:
    def change(config: dict[str, Any]) -> None:
        for tower in ("text_config", "vision_config"):
            config[tower] = values | config[tower]

    return change


def into_processor_config(folder: Path) -> None:
    """transformers 5 writes the image processor into processor_config.json."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    name = settings.pop("processor_class", "Siglip2Processor")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings, "processor_class": name}))


def without_names(folder: Path) -> None:
    """A folder whose classes only `model_type` tells."""
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        edit(folder, file, {"processor_class": ..., "image_processor_type": ..., "tokenizer_class": ...})


CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer_config.json"
BOTH = ("siglip", "siglip2")
# (name, families, file or function of the folder, change)
QUIRKS: list[tuple[str, tuple[str, ...], Any, Any]] = [
    ("a dump of transformers 4", BOTH, CONFIG, VERSION_4),
    ("a dump of transformers 4 in the towers", BOTH, CONFIG, in_towers(VERSION_4)),
    ("another program's plural", BOTH, CONFIG, in_towers({"hidden_sizes": [8, 8]})),
    ("another program's singular", BOTH, CONFIG, in_towers({"num_channel": 3})),
    ("HF-M4 navit keys", BOTH, CONFIG, in_towers({"_flash_attn_2_enabled": True, "use_resampler": False})),
    ("PaliGemma's keys", BOTH, CONFIG, in_towers({"projection_dim": 2048, "num_image_tokens": 256})),
    ("LLaVA's keys", BOTH, CONFIG, in_towers({"mm_hidden_size": 1152, "select_layer": -2})),
    ("nulls for what is optional", BOTH, CONFIG, {"initializer_factor": 1.0, "text_config_dict": None}),
    ("old copies of the towers", BOTH, CONFIG, {"text_config_dict": {}, "vision_config_dict": {}}),
    ("checkpointing asked for by the file", BOTH, CONFIG, {"gradient_checkpointing": True}),
    ("checkpointing asked for by the towers", BOTH, CONFIG, in_towers({"gradient_checkpointing": True})),
    ("a dropout that is an integer", BOTH, CONFIG, in_towers({"attention_dropout": 0})),
    ("no model_type in the towers", BOTH, CONFIG, lambda config: config["vision_config"].pop("model_type", None)),
    ("the wrong attention implementation", BOTH, CONFIG, {"_attn_implementation_autoset": True}),
    ("torch_dtype in the towers", BOTH, CONFIG, in_towers({"torch_dtype": "float32"})),
    ("bos and eos outside the vocabulary", BOTH, CONFIG, in_towers({"bos_token_id": 49406, "eos_token_id": 49407})),
    ("published ids in the text tower", ("siglip",), CONFIG, lambda config: config["text_config"].pop("pad_token_id")),
    ("MedSigLIP's rescale_factor", BOTH, PREPROCESSOR, {"rescale_factor": 0.00392156862}),
    ("do_convert_rgb: null", BOTH, PREPROCESSOR, {"do_convert_rgb": None}),
    ("a fast class by name", ("siglip",), PREPROCESSOR, {"image_processor_type": "SiglipImageProcessorFast"}),
    ("a Pil class by name", ("siglip",), PREPROCESSOR, {"image_processor_type": "SiglipImageProcessorPil"}),
    ("a fast NaFlex class", ("siglip2",), PREPROCESSOR, {"image_processor_type": "Siglip2ImageProcessorFast"}),
    ("a Pil NaFlex class", ("siglip2",), PREPROCESSOR, {"image_processor_type": "Siglip2ImageProcessorPil"}),
    ("no image_processor_type", BOTH, PREPROCESSOR, {"image_processor_type": ...}),
    ("a feature extractor", BOTH, PREPROCESSOR, {"feature_extractor_type": "SiglipFeatureExtractor"}),
    ("keys of a fast processor", BOTH, PREPROCESSOR, {"device": None, "input_data_format": None, "crop_size": None}),
    ("processor_config.json of version 5", BOTH, into_processor_config, None),
    ("no class names at all", BOTH, without_names, None),
    ("a fast tokenizer by name", ("siglip",), TOKENIZER, {"tokenizer_class": "SiglipTokenizerFast"}),
    ("the generic tokenizer", ("siglip2",), TOKENIZER, {"tokenizer_class": "TokenizersBackend"}),
    ("Gemma's tokenizer", ("siglip2",), TOKENIZER, {"tokenizer_class": "GemmaTokenizer"}),
    ("Gemma's fast tokenizer", ("siglip2",), TOKENIZER, {"tokenizer_class": "GemmaTokenizerFast"}),
    ("Gemma's length", ("siglip2",), TOKENIZER, {"model_max_length": 1000000000000000019884624838656}),
    ("no tokenizer_class", BOTH, TOKENIZER, {"tokenizer_class": ...}),
    ("a tokenizer that would pad otherwise", BOTH, TOKENIZER, {"padding": True, "clean_up_tokenization_spaces": True}),
]


@pytest.mark.parametrize(
    ("family", "target", "change"),
    [
        pytest.param(family, target, change, id=f"{family}: {name}")
        for name, families, target, change in QUIRKS
        for family in families
    ],
)
def test_loads_with_the_same_numbers(family, target, change, folders, expected, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders[family], folder)
    if callable(target):
        target(folder)
    else:
        edit(folder, target, change)
    for found, want in zip(outputs(folder), expected[family], strict=True):
        # MedSigLIP's rescale_factor has eleven digits, and the fast and the Pillow processor round differently.
        torch.testing.assert_close(found, want, rtol=0, atol=2e-2 if target == PREPROCESSOR else 1e-6)


@pytest.mark.parametrize("suffix", ["", "Pil", "Fast"])
@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json", "vision only"])
@pytest.mark.parametrize("family", BOTH)
def test_every_name_of_an_image_processor_gives_ours(family, layout, suffix, folders, tmp_path):
    folder, name = tmp_path / "checkpoint", f"{family.capitalize()}ImageProcessor"
    shutil.copytree(folders[family], folder)
    edit(folder, PREPROCESSOR, {"image_processor_type": name + suffix})
    if layout == "processor_config.json":
        into_processor_config(folder)
    if layout == "vision only":
        (folder / CONFIG).unlink()
        (folder / TOKENIZER).unlink()
    for backend, ending in (("pil", ""), ("torchvision", "Fast")):
        found = AutoImageProcessor.from_pretrained(folder, backend=backend)
        assert type(found) is getattr(siglip_hf, name + ending)
    if layout != "vision only":
        assert type(AutoProcessor.from_pretrained(folder).image_processor).__module__.startswith("siglip_hf.")


@pytest.mark.parametrize("family", BOTH)
def test_the_processor_of_a_vision_only_folder(family, folders, tmp_path):
    """AutoProcessor gives what there is, the image processor."""
    model = AutoModel.from_pretrained(folders[family]).vision_model
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folders[family]).save_pretrained(tmp_path)
    processor, tower = AutoProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    assert type(processor).__module__.startswith("siglip_hf.preprocessing.image_processing")
    inputs = processor(images=PICTURE, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(tower(**inputs).pooler_output, model.eval()(**inputs).pooler_output)


def test_size_as_a_number(folders, tmp_path):
    """The length of the shorter side, as in stock; the same as height and width for square pictures only."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders["siglip"], folder)
    edit(folder, PREPROCESSOR, lambda preprocessor: preprocessor.update(size=preprocessor["size"]["height"]))
    plain, numbered = AutoProcessor.from_pretrained(folders["siglip"]), AutoProcessor.from_pretrained(folder)
    square = PICTURE.resize((45, 45))
    found, want = (one(images=square, return_tensors="pt").pixel_values for one in (numbered, plain))
    torch.testing.assert_close(found, want)
    assert numbered(images=PICTURE, return_tensors="pt").pixel_values.shape == (1, 3, 32, 40)


@pytest.mark.parametrize("family", BOTH)
def test_towers_without_a_head(family, folders, tmp_path):
    """`vision_use_head: false`, as vision-language models save their towers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders[family], folder)
    edit(folder, CONFIG, lambda config: config["vision_config"].update(vision_use_head=False))
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    assert not any("head.probe" in name for name, _ in model.named_parameters())
    assert AutoConfig.from_pretrained(folder).vision_config.vision_use_head is False


def test_the_text_tower_of_the_giant(tmp_path):
    """Its text tower is narrower than the image tower, so that only `projection_size` makes the embeddings fit."""
    config = siglip_hf.SiglipConfig.from_preset("siglip2-giant-opt-patch16-256")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.text_config.hidden_size, loaded.text_config.projection_size) == (1152, 1536)
    loaded.check()
