"""The joint processor: padded text by default, either order of arguments, every option obeyed or refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.processing_siglip import SiglipProcessor as StockProcessor

from siglip_hf import (
    SiglipConfig,
    SiglipImageProcessor,
    SiglipImageProcessorFast,
    SiglipProcessor,
    SiglipTokenizer,
    SiglipTokenizerFast,
)
from siglip_hf.preprocessing.image_intake import PictureError

SPIECE = Path(__file__).parents[1] / "fixtures" / "spiece.model"
LENGTH = 12
SIZE = {"height": 16, "width": 24}
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.fixture(params=[(SiglipImageProcessor, SiglipTokenizer), (SiglipImageProcessorFast, SiglipTokenizerFast)])
def processor(request):
    image_processor_class, tokenizer_class = request.param
    tokenizer = tokenizer_class(str(SPIECE), model_max_length=LENGTH)
    return SiglipProcessor(image_processor_class(size=SIZE), tokenizer)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]))


# ---- what comes out


def test_pictures_and_texts(processor, picture):
    inputs = processor(images=[picture, picture], text=TEXTS, return_tensors="pt")
    assert list(inputs) == ["input_ids", "pixel_values"]
    assert inputs["input_ids"].shape == (2, LENGTH)
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["pixel_values"].shape == (2, 3, 16, 24)
    assert inputs["pixel_values"].dtype == torch.float32
    expected = processor.tokenizer(TEXTS, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(inputs["input_ids"], expected)
    pixels = processor.image_processor([picture, picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=0)
    assert inputs.to(torch.float64)["pixel_values"].dtype == torch.float64


def test_one_part_alone(processor, picture):
    assert list(processor(text="a cat", return_tensors="pt")) == ["input_ids"]
    assert processor(text="a cat", return_tensors="pt")["input_ids"].shape == (1, LENGTH)
    assert list(processor(images=picture, return_tensors="pt")) == ["pixel_values"]


def test_text_is_padded_and_truncated_to_the_checkpoints_length(processor):
    long = "cat " * 50
    for text in ("cat", long):
        assert processor(text=[text], return_tensors="np")["input_ids"].shape == (1, LENGTH)
    processor.tokenizer.model_max_length = 5
    assert processor(text=["cat", long], return_tensors="np")["input_ids"].shape == (2, 5)
    assert processor(text=["cat", long], max_length=7, return_tensors="np")["input_ids"].shape == (2, 7)


def test_options_of_text_are_obeyed(processor):
    short = processor(text="cat", padding=False)["input_ids"]
    assert short == processor.tokenizer("cat", padding=False)["input_ids"]
    assert 1 < len(short) < LENGTH
    assert {len(ids) for ids in processor(text=TEXTS, padding=True)["input_ids"]} == {LENGTH}
    assert len(processor(text="cat", common_kwargs={"padding": True})["input_ids"]) == LENGTH
    lengths = {len(ids) for ids in processor(text=TEXTS, padding="longest")["input_ids"]}
    assert len(lengths) == 1
    assert lengths.pop() < LENGTH
    counted = processor(text="cat", add_special_tokens=False)["input_ids"]
    assert counted == processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize("cat"))
    assert len(processor(text="cat " * 50, padding=False, truncation=False)["input_ids"]) > LENGTH
    assert processor(text="cat", padding=None)["input_ids"] == processor(text="cat")["input_ids"]
    masked = processor(text="cat", return_attention_mask=True)
    assert sum(masked["attention_mask"]) in (len(short), LENGTH)
    assert "attention_mask" not in processor(text="cat")


def test_options_of_pictures_are_obeyed(processor, picture):
    inputs = processor(images=picture, size={"height": 8, "width": 8}, do_normalize=False, return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert inputs["pixel_values"].min() >= 0


def test_options_of_one_part(processor, picture):
    inputs = processor(
        images=picture,
        text=TEXTS,
        text_kwargs={"max_length": 9, "return_tensors": "np"},
        images_kwargs={"size": {"height": 4, "width": 4}, "return_tensors": "pt"},
    )
    assert isinstance(inputs["input_ids"], np.ndarray)
    assert inputs["input_ids"].shape == (2, 9)
    assert isinstance(inputs["pixel_values"], torch.Tensor)
    assert inputs["pixel_values"].shape == (1, 3, 4, 4)
    same(
        processor(picture, TEXTS, common_kwargs={"return_tensors": "np"}),
        processor(picture, TEXTS, return_tensors="np"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paddding": "max_length"}, "paddding; did you mean padding"),
        ({"do_rezise": True}, "do_rezise; did you mean do_resize"),
        ({"text_kwargs": {"max_lenght": 3}}, "max_lenght; did you mean max_length"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding is given twice"),
        ({"videos": [1]}, "videos was given, but SigLIP takes pictures and texts"),
        ({"audio": np.zeros(9)}, "audio was given"),
    ],
)
def test_misspelled_options_are_named(processor, picture, options, message):
    with pytest.raises(ValueError, match=message):
        processor(images=picture, text="a cat", **options)


@pytest.fixture
def ignored(monkeypatch):
    said = []
    monkeypatch.setattr("siglip_hf.preprocessing.options.logger.warning_once", said.append)
    return said


@pytest.mark.parametrize(
    "options",
    [
        {"videos_kwargs": {}, "audio_kwargs": {}, "videos": None, "audio": None},
        {"videos_kwargs": None, "audio_kwargs": None, "text_kwargs": None, "common_kwargs": None},
        {"return_mm_token_type_ids": False, "return_text_replacement_offsets": False},
    ],
)
def test_what_is_empty_is_accepted(processor, picture, options, ignored):
    same(processor(picture, TEXTS, **options), processor(picture, TEXTS))
    assert ignored == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"anything": 1}, "anything"),
        ({"sampling_rate": 16000}, "sampling_rate"),
        ({"return_mm_token_type_ids": True}, "return_mm_token_type_ids"),
        ({"videos_kwargs": {"fps": 2}}, "fps"),
        ({"text_kwargs": {"size": 3}}, "size"),
        ({"images_kwargs": {"padding": True}}, "padding"),
    ],
)
def test_unknown_options_are_ignored_with_a_warning(processor, picture, options, name, ignored):
    same(processor(picture, TEXTS, **options), processor(picture, TEXTS))
    assert [name in message for message in ignored] == [True]


def test_a_switch_that_is_none_is_off(processor, picture):
    off = processor(picture, do_normalize=False, return_tensors="np")
    same(processor(picture, do_normalize=None, return_tensors="np"), off)


def test_the_processor_keeps_what_its_tokenizer_was_built_with(processor, tmp_path):
    tokenizer = type(processor.tokenizer)(str(SPIECE), model_max_length=LENGTH, max_length=9)
    built = SiglipProcessor(processor.image_processor, tokenizer)
    built.save_pretrained(tmp_path)
    for each in (built, SiglipProcessor.from_pretrained(tmp_path)):
        assert len(each(text="cat")["input_ids"]) == 9
        assert len(each(text="cat", max_length=7)["input_ids"]) == 7


# ---- which is which


def test_either_order(processor, picture, tmp_path):
    path = tmp_path / "a.png"
    picture.save(path)
    content = path.read_bytes()
    expected = processor(images=picture, text=TEXTS, return_tensors="np")
    for source in (
        picture,
        [picture],
        np.asarray(picture),
        torch.from_numpy(np.array(picture)),
        content,
        path,
        str(path),
    ):
        same(processor(source, TEXTS, return_tensors="np"), expected)
        same(processor(TEXTS, source, return_tensors="np"), expected)
        same(processor(text=source, images=TEXTS, return_tensors="np"), expected)
    same(processor(text=picture, return_tensors="np"), processor(images=picture, return_tensors="np"))
    same(processor(None, picture, return_tensors="np"), processor(images=picture, return_tensors="np"))
    assert list(processor([str(path)], [str(path)], return_tensors="np")) == ["input_ids", "pixel_values"]


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, None, "Nothing to process"),
        ("a cat", None, "images='a cat' is neither a file nor a URL.*text="),
        (["a cat"], ["a dog"], "images='a cat' is neither"),
        ([], ["a dog"], "No pictures given"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), "Both arguments are pictures"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images, text)


def test_wrong_texts_and_files_are_named(processor, picture):
    with pytest.raises(ValueError, match="empty list"):
        processor(images=picture, text=[])
    for wrong in (["a", float("nan")], pd.Series(["a", None], dtype=object)):
        with pytest.raises(ValueError, match=r"text\[1\] is (nan|None) of type"):
            processor(text=wrong)
        with pytest.raises(ValueError, match=r"text\[1\] is (nan|None) of type"):
            processor(images=picture, text=wrong)
    with pytest.raises(ValueError, match=r"text is nan of type float"):
        processor(text=float("nan"))
    with pytest.raises(PictureError, match=r"'missing.png'.*no such file"):
        processor(images=["missing.png"], text="a cat")
    with pytest.raises(PictureError, match=r"picture 1 \('missing.png'\)"):
        processor(images=[picture, "missing.png"])


@pytest.mark.parametrize("make", [iter, pd.Series, np.array, lambda x: datasets.Dataset.from_dict({"x": x})["x"]])
def test_any_sequence_of_texts_and_paths(processor, picture, tmp_path, make):
    picture.save(tmp_path / "a.png")
    paths = [str(tmp_path / "a.png")] * 2
    expected = processor(images=paths, text=TEXTS, return_tensors="np")
    same(processor(images=make(paths), text=make(TEXTS), return_tensors="np"), expected)
    same(processor(make(TEXTS), make(paths), return_tensors="np"), expected)
    same(processor(text=make(TEXTS)), processor(text=TEXTS))


def test_a_column_of_pictures(processor, picture):
    column = datasets.Dataset.from_dict({"image": [picture, picture]}).cast_column("image", datasets.Image())["image"]
    same(processor(images=column, return_tensors="np"), processor(images=[picture, picture], return_tensors="np"))


def test_a_word_at_a_time(processor):
    words = [["a", "cat"], ["dogs"]]
    ids = processor(text=words, is_split_into_words=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(
        ids, processor.tokenizer(words, is_split_into_words=True, return_tensors="np")["input_ids"]
    )


# ---- with a model


def fitting_config(processor, **changes):
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": LENGTH, **changes.get("text", {})}
    vision = {"image_size": (16, 24), **changes.get("vision", {})}
    return SimpleNamespace(text_config=SimpleNamespace(**text), vision_config=SimpleNamespace(**vision))


def test_a_model_that_fits(processor):
    config = fitting_config(processor)
    processor.check_fits(config)
    processor.check_fits(SimpleNamespace(config=config))
    processor.check_fits(config.text_config)
    processor.check_fits(config.vision_config)
    processor.check_fits(fitting_config(processor, text={"vocab_size": len(processor.tokenizer) + 60}))
    processor.check_fits(fitting_config(processor, vision={"image_size": 64}), interpolate_pos_encoding=True)
    processor.image_processor.size = {"height": 64, "width": 64}
    processor.check_fits(fitting_config(processor, vision={"image_size": 64}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"vocab_size": 250000}}, "tokens, but the model's vocab_size is 250000"),
        ({"text": {"vocab_size": 10}}, "vocab_size is 10"),
        ({"text": {"max_position_embeddings": 64}}, "model_max_length is 12.*64 tokens"),
        ({"vision": {"image_size": 224}}, r"\{'height': 16, 'width': 24\}.*image_size is 224"),
        ({"vision": {"image_size": (24, 16)}}, r"image_size is \(24, 16\)"),
    ],
)
def test_a_model_that_does_not_fit(processor, changes, message):
    with pytest.raises(ValueError, match=message):
        processor.check_fits(fitting_config(processor, **changes))


def test_a_real_configuration(processor):
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": LENGTH}
    config = SiglipConfig(text_config=text, vision_config={"image_size": [16, 24], "patch_size": 8})
    processor.check_fits(config)
    with pytest.raises(ValueError, match="image_size is 224"):
        processor.check_fits(SiglipConfig(text_config=text))


# ---- files


def test_saves_and_loads(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == SIZE
    expected = processor(images=picture, text=TEXTS, return_tensors="np")
    for auto in (SiglipProcessor, AutoProcessor):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is SiglipProcessor
        assert again.tokenizer.model_max_length == LENGTH
        loaded = again(images=picture, text=TEXTS, return_tensors="np")
        np.testing.assert_array_equal(loaded["input_ids"], expected["input_ids"])
        np.testing.assert_allclose(loaded["pixel_values"], expected["pixel_values"], atol=2 / 255 + 1e-6)
    same(
        SiglipImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np"),
        SiglipImageProcessor(size=SIZE)(picture, return_tensors="np"),
    )


def test_equals_stock(picture):
    tokenizer = SiglipTokenizer(str(SPIECE), model_max_length=LENGTH)
    ours = SiglipProcessor(SiglipImageProcessor(size=SIZE), tokenizer)
    stock = StockProcessor(SiglipImageProcessorPil(size=SIZE), tokenizer)
    options = {"images": [picture], "text": TEXTS, "padding": "max_length", "return_tensors": "pt"}
    same(ours(**options), stock(**options))


def test_with_a_tokenizer_that_emits_masks(picture):
    """Stock's tokenizer gives an attention mask, and no padding, unless told otherwise."""
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as StockTokenizer

    tokenizer = StockTokenizer(str(SPIECE), model_max_length=LENGTH)
    inputs = SiglipProcessor(SiglipImageProcessor(size=SIZE), tokenizer)(picture, TEXTS, return_tensors="pt")
    assert sorted(inputs) == ["input_ids", "pixel_values"]
    assert inputs["input_ids"].shape == (2, LENGTH)


def test_decoding_and_names(processor):
    ids = processor(text=TEXTS)["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == processor.tokenizer.batch_decode(
        ids, skip_special_tokens=True
    )
    assert "cat" in processor.decode(ids[0])
    assert set(processor.model_input_names) == {"input_ids", "pixel_values"}
    with pytest.raises(TypeError, match="image_processor"):
        SiglipProcessor(processor.tokenizer, processor.image_processor)
