"""SigLIP 2's tokenizer against the plain reference: lowercase, then the tokenizer file."""

import json
import pickle
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer as StockTokenizer

import siglip_hf
from siglip_hf import Siglip2Tokenizer
from tiny_gemma import write_gemma_tokenizer

TEXTS = [
    "a photo of a cat",
    "A Photo Of A CAT",
    "EIN GROSSES BILD: Äpfel, ÉTÉ!",
    "ΆΝΘΡΩΠΟΣ Собака",
    "猫の写真 🐈 İstanbul",
    "",
    " ",
    "  two   spaces ",
    "line\nbreak\n\nparagraph\ttab\x00\x7f",
    "<TABLE> <table> <start_of_turn>",
    "</s> [CLS]",
    "...!?",
    "2 CATS! " * 60,
]


def write_folder(folder: Path, model_type: str = "siglip", length: int | None = 12, **fields) -> Path:
    """A folder with a Gemma tokenizer beside the configuration of a model."""
    write_gemma_tokenizer(folder, **fields)
    text = {"vocab_size": 256_000} | ({"max_position_embeddings": length} if length else {})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("siglip2") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Siglip2Tokenizer.from_pretrained(folder)


def reference_ids(folder: Path, text: str, length: int | None = None) -> list[int]:
    """Lowercase, then the tokenizer file, and, with a length, padding and truncation as in training."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if length is not None:
        backend.enable_truncation(length)
        backend.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    return backend.encode(text.lower()).ids


def test_the_tiny_tokenizer_is_of_gemmas_kind(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert backend.encode("a cat").ids != backend.encode("A Cat").ids  # it keeps the case
    assert backend.encode("🐈").tokens == ["<0xF0>", "<0x9F>", "<0x90>", "<0x88>", "<eos>"]
    assert backend.encode("a photo").tokens[0] == "a▁"


def test_ids_are_those_of_the_plain_reference(folder, tokenizer):
    assert tokenizer(TEXTS)["input_ids"] == [reference_ids(folder, text, length=12) for text in TEXTS]
    assert tokenizer(TEXTS, padding=False, truncation=False)["input_ids"] == [
        reference_ids(folder, text) for text in TEXTS
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_to_ask_gives_the_same_ids(folder, tokenizer, text):
    ids = reference_ids(folder, text, length=12)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer([text])["input_ids"] == [ids]
    assert tokenizer.encode(text) == ids
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, add_special_tokens=True)) == reference_ids(
        folder, text
    )


def test_only_input_ids_of_the_models_length_come_out(tokenizer):
    batch = tokenizer(["a cat", "a dog " * 30], return_tensors="pt")
    assert list(batch) == ["input_ids"]
    assert batch["input_ids"].shape == (2, 12)
    assert batch["input_ids"][0, -1] == 0  # <pad>
    assert batch["input_ids"][1, -1] == 1  # <eos> survives truncation
    assert list(tokenizer("a cat", return_attention_mask=True)) == ["input_ids", "attention_mask"]


def test_padding_and_length_can_be_chosen(tokenizer):
    assert len(tokenizer("a cat", padding=False)["input_ids"]) < 12
    assert len(tokenizer("a cat", max_length=20)["input_ids"]) == 20
    assert len(tokenizer("a cat", padding=True)["input_ids"]) == 12
    lengths = {len(ids) for ids in tokenizer(["a cat", "a photo of a dog"], padding="longest")["input_ids"]}
    assert len(lengths) == 1
    assert lengths.pop() < 12


@pytest.mark.parametrize(
    ("saved", "in_config", "expected"),
    [(10**30, 16, 16), (10**30, None, 64), (64, 16, 16), (None, 24, 24), (32, None, 64)],
)
def test_the_length_is_the_models_whatever_the_tokenizer_says(tmp_path, saved, in_config, expected):
    folder = write_folder(tmp_path, length=in_config, model_max_length=saved)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == expected
    assert len(tokenizer("a cat")["input_ids"]) == expected


@pytest.mark.parametrize(("saved", "expected"), [(10**30, 64), (32, 32), (None, 64)])
def test_without_a_model_the_tokenizers_own_length_counts(tmp_path, saved, expected):
    write_gemma_tokenizer(tmp_path, model_max_length=saved)
    assert Siglip2Tokenizer.from_pretrained(tmp_path).model_max_length == expected
    assert Siglip2Tokenizer.from_pretrained(tmp_path, model_max_length=8).model_max_length == 8


def test_punctuation_stays_unless_its_removal_is_asked_for(folder, tokenizer, tmp_path):
    assert tokenizer("a cat!")["input_ids"] != tokenizer("a cat")["input_ids"]
    without = Siglip2Tokenizer.from_pretrained(folder, remove_punctuation=True)
    assert without(f"A {string.punctuation}cat!")["input_ids"] == tokenizer("a cat")["input_ids"]
    without.save_pretrained(tmp_path)
    assert Siglip2Tokenizer.from_pretrained(tmp_path).remove_punctuation is True


@pytest.mark.parametrize("model_type", ["siglip", "siglip2", "siglip_text_model", "siglip2_text_model"])
@pytest.mark.parametrize("name", ["GemmaTokenizerFast", "GemmaTokenizer", "Siglip2Tokenizer", "TokenizersBackend"])
def test_auto_tokenizer_recognises_the_folder(tmp_path, folder, model_type, name):
    write_folder(tmp_path, model_type=model_type, tokenizer_class=name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is Siglip2Tokenizer
    assert tokenizer("A Cat")["input_ids"] == reference_ids(folder, "a cat", length=12)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "paligemma"])
def test_gemma_models_load_as_before(tmp_path, model_type):
    write_gemma_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__module__ == "transformers.models.gemma.tokenization_gemma"
    assert (
        tokenizer("A Cat", add_special_tokens=False)["input_ids"]
        != tokenizer("a cat", add_special_tokens=False)["input_ids"]
    )
    assert "attention_mask" in tokenizer("A Cat")


def test_other_tokenizers_of_siglip_folders_load_as_they_say(tmp_path):
    write_folder(tmp_path, tokenizer_class="CLIPTokenizer")
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__module__.startswith("transformers.models.clip")


def test_saves_and_loads_both_ways_with_stock(folder, tokenizer, tmp_path):
    texts = [text for text in TEXTS if "Σ" not in text and "<TABLE>" not in text]  # see the next test
    tokenizer.save_pretrained(tmp_path / "ours")
    assert Siglip2Tokenizer.from_pretrained(tmp_path / "ours")(TEXTS) == tokenizer(TEXTS)
    stock = StockTokenizer.from_pretrained(tmp_path / "ours")
    options = {"padding": "max_length", "truncation": True, "max_length": 12}
    assert stock(texts, **options)["input_ids"] == tokenizer(texts)["input_ids"]

    stock.save_pretrained(tmp_path / "stock")
    again = Siglip2Tokenizer.from_pretrained(tmp_path / "stock", model_max_length=12)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_where_stocks_lowercasing_differs(folder, tokenizer):
    # Stock lowercases letter by letter and only between added tokens: no final sigma, no "<TABLE>".
    stock = StockTokenizer.from_pretrained(folder)
    for text in ("ΆΝΘΡΩΠΟΣ", "<TABLE>"):
        ids = tokenizer(text, padding=False)["input_ids"]
        assert ids == reference_ids(folder, text)
        assert ids != stock(text)["input_ids"]


def test_pickles_and_takes_a_backend_object(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer))(TEXTS) == tokenizer(TEXTS)
    made = Siglip2Tokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    assert made("A Cat")["input_ids"][:12] == tokenizer("a cat")["input_ids"]
    assert made.model_max_length == 64


def test_model_and_tokenizer_of_a_fixed_resolution_folder(tmp_path):
    folder = write_gemma_tokenizer(tmp_path)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 600, "max_position_embeddings": 12, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    model = siglip_hf.SiglipModel(siglip_hf.SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeds = model.encode_text(tokenizer(["A CAT", "a cat", "a dog"], return_tensors="pt").input_ids)
    torch.testing.assert_close(embeds[0], embeds[1])
    assert not torch.allclose(embeds[1], embeds[2])


OPTIONS = [
    {"padding": "max_length", "truncation": True, "max_length": 9, "return_attention_mask": True},
    {"padding": "longest", "truncation": True, "max_length": 9, "pad_to_multiple_of": 3},
    {"padding": False, "truncation": True, "max_length": 7, "return_special_tokens_mask": True},
    {"padding": False, "truncation": False, "return_offsets_mapping": True},
    {"padding": "max_length", "max_length": 8, "truncation": True, "stride": 2, "return_overflowing_tokens": True},
    {"padding": "max_length", "max_length": 8, "truncation": True, "add_special_tokens": False},
    {"padding": False, "split_special_tokens": True, "truncation": False},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_as_in_stock(folder, tokenizer, options, side):
    stock = StockTokenizer.from_pretrained(folder, truncation_side=side)
    ours = Siglip2Tokenizer.from_pretrained(folder, truncation_side=side)
    texts = [text for text in TEXTS if "Σ" not in text and "<TABLE>" not in text and "İ" not in text]
    options = {"padding_side": side, "return_attention_mask": False, "verbose": False, **options}
    assert dict(ours(texts, **options)) == dict(stock(texts, **options))
    for text in texts:
        assert dict(ours(text, **options)) == dict(stock(text, **options))
    firsts, seconds = texts[:5], ["two words", "x", "", "a very long text indeed " * 5, "a cat"]
    assert dict(ours(firsts, seconds, **options)) == dict(stock(firsts, seconds, **options))
    words = [text.split() for text in texts if text.split()]
    options["is_split_into_words"] = True
    # "</s>" and "[CLS]" are no tokens of this vocabulary, and read as text.
    assert dict(ours(words, **options)) == dict(stock(words, **options))


def test_encodings_as_in_stock(folder, tokenizer):
    stock = StockTokenizer.from_pretrained(folder)
    ours, theirs = (t("a big cat", "two dogs", max_length=12, padding="max_length") for t in (tokenizer, stock))
    for method in ("tokens", "word_ids", "sequence_ids"):
        assert getattr(ours, method)() == getattr(theirs, method)()
    assert tokenizer("a cat").tokens() == stock("a cat", padding="max_length", max_length=12).tokens()


def test_an_added_token_with_capitals_is_found(folder, tmp_path):
    tokenizer = Siglip2Tokenizer.from_pretrained(folder)
    plain = tokenizer("a <img> x", padding=False)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG>", "<IMG>2"]})
    tokenizer.add_tokens(["NewWord"])
    special, longer, word = tokenizer.convert_tokens_to_ids(["<IMG>", "<IMG>2", "NewWord"])
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, Siglip2Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert each.encode("A <IMG> X", padding=False).count(special) == 1
        assert each.encode("A <IMG>2 X", padding=False).count(longer) == 1
        assert each.encode("A <img> X", padding=False) == plain
        assert all(each.encode(text, padding=False).count(word) == 1 for text in ("a NewWord", "A NEWWORD", "newword"))
        assert each.tokenize("<IMG>A")[0] == "<IMG>"


@pytest.mark.parametrize("remove_punctuation", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_offsets_point_into_the_text_as_given(folder, remove_punctuation, words):
    tokenizer = Siglip2Tokenizer.from_pretrained(folder, remove_punctuation=remove_punctuation)
    text = "İİ, a cat! İ dog"
    options = {"padding": False, "return_offsets_mapping": True, "add_special_tokens": False}
    batch = tokenizer(text.split(" "), is_split_into_words=True, **options) if words else tokenizer(text, **options)
    for index, (begin, end) in enumerate(batch["offset_mapping"]):
        whole = text.split(" ")[batch.word_ids()[index]] if words else text
        piece = tokenizer.convert_tokens_to_string([batch.tokens()[index]])
        if "\ufffd" not in piece:
            kept = whole[begin:end].lower()
            if remove_punctuation:
                kept = kept.replace("!", "").replace(",", "")
            assert kept.strip() in ("", "i̇", piece.strip()), (piece, kept)
    assert batch["offset_mapping"][-1][1] == (3 if words else len(text))


def test_an_empty_batch(tokenizer):
    assert tokenizer([])["input_ids"] == []
    assert tokenizer([], return_tensors="pt")["input_ids"].shape == (0, 12)
