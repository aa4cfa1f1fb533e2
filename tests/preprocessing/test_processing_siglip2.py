"""The NaFlex processor, what it makes of hub folders, and the pipeline on top of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from siglip_hf import (
    Siglip2Config,
    Siglip2ImageProcessorFast,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipProcessor,
)
from tiny import shaken
from tiny_gemma import write_gemma_tokenizer
from tiny_siglip2 import NAFLEX_VISION

TEXT_LENGTH = 64


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (90, 20), (7, 7))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A NaFlex repository as published, with a patch size and a budget that are not the defaults."""
    folder = write_gemma_tokenizer(tmp_path_factory.mktemp("naflex") / "model", tokenizer_class="GemmaTokenizer")
    tokens = len(Siglip2Tokenizer.from_pretrained(folder))
    text = {"vocab_size": tokens, "max_position_embeddings": TEXT_LENGTH, "pad_token_id": 0, "hidden_size": 32}
    text |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = shaken(Siglip2Model(Siglip2Config(text_config=text, vision_config=dict(NAFLEX_VISION))))
    model.save_pretrained(folder)
    preprocessor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Siglip2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_num_patches": 32,
        "patch_size": 8,
        "processor_class": "Siglip2Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="module")
def processor(folder) -> Siglip2Processor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder) -> Siglip2Model:
    return AutoModel.from_pretrained(folder).eval()


def test_auto_processor_uses_ours_and_obeys_the_saved_values(processor):
    assert type(processor) is Siglip2Processor
    assert type(processor.tokenizer) is Siglip2Tokenizer
    inputs = processor(images=pictures(), text=["A Cat", "a dog"], return_tensors="pt")
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, TEXT_LENGTH),
        "pixel_values": (3, 32, 192),
        "pixel_attention_mask": (3, 32),
        "spatial_shapes": (3, 2),
    }
    assert torch.equal(inputs["input_ids"][0], processor(text="a cat", return_tensors="pt")["input_ids"][0])
    more = processor(images=pictures()[0], return_tensors="pt", max_num_patches=64)
    assert more["pixel_values"].shape == (1, 64, 192)


def test_the_snippet_of_the_model_card_runs(folder):
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = pictures()[0]
    candidate_labels = ["a cat", "a dog"]
    texts = [f"This is a photo of {label}." for label in candidate_labels]
    inputs = processor(text=texts, images=image, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    probs = torch.sigmoid(outputs.logits_per_image)
    assert probs.shape == (1, 2)
    expected = model.encode_image([image], max_num_patches=32) @ model.encode_text(inputs["input_ids"]).t()
    expected = torch.sigmoid(expected * model.logit_scale.exp() + model.logit_bias)
    torch.testing.assert_close(probs, expected, rtol=1e-3, atol=1e-4)  # AutoProcessor may resize with Pillow


def test_saves_and_loads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = Siglip2Processor.from_pretrained(tmp_path)
    assert (again.image_processor.patch_size, again.image_processor.max_num_patches) == (8, 32)
    expected = processor(images=pictures(), text="A Cat!", return_tensors="pt")
    for name, value in again(images=pictures(), text="A Cat!", return_tensors="pt").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(folder, model, processor, batch_size):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = ["cat", "dog", "bird"]
    results = classify(pictures(), candidate_labels=labels, batch_size=batch_size)
    texts = [f"This is a photo of {label}." for label in labels]
    with torch.no_grad():
        outputs = model(**processor(images=pictures(), text=texts, return_tensors="pt"))
    for result, logits in zip(results, outputs.logits_per_image, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert [scores[label] for label in labels] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    encoded = classify.label_bank.texts_encoded
    classify(pictures()[0], candidate_labels=labels)
    assert classify.label_bank.texts_encoded == encoded == 3


def test_processor_and_model_that_do_not_fit_are_refused(processor, model):
    processor.check_fits(model)
    processor.check_fits(model.config)
    processor.check_fits(model.vision_model)
    other = Siglip2Processor(Siglip2ImageProcessorFast(patch_size=16), processor.tokenizer)
    with pytest.raises(ValueError, match="patch_size is 16, but the model's is 8"):
        other.check_fits(model)
    with pytest.raises(ValueError, match="image_size=224, but this processor makes NaFlex patches"):
        processor.check_fits(SiglipConfig())
    config = model.config.to_dict()
    config["text_config"]["vocab_size"] = 256_000
    with pytest.raises(ValueError, match="vocab_size is 256000"):
        processor.check_fits(Siglip2Config(**config))
    config = model.config.to_dict()
    config["text_config"]["max_position_embeddings"] = 16
    with pytest.raises(ValueError, match="model_max_length is 64, but the model was trained on texts of 16"):
        processor.check_fits(Siglip2Config(**config))
    assert issubclass(Siglip2Processor, SiglipProcessor)
