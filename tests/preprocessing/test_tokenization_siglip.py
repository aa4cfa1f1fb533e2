"""Both tokenizers against stock, on small SentencePiece models of the two published kinds."""

import copy
import json
import logging
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as StockTokenizer

import corpus
import siglip_hf
from siglip_hf.preprocessing.text_cleaning import canonicalize_text
from siglip_hf.preprocessing.tokenization_siglip import SiglipTokenizer
from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast

FIXTURES = Path(__file__).parents[1] / "fixtures"
TRAINED = sorted((Path(siglip_hf.__file__).parent / "checkpoints").glob("*/spiece.model"))
MODELS = {path.stem: path for path in sorted(FIXTURES.glob("*.model"))} | {path.parent.name: path for path in TRAINED}
LINES = corpus.corpus(20_000)
OURS = (SiglipTokenizer, SiglipTokenizerFast)

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has")  # what stock says of "a cat</s>"


@pytest.fixture(params=list(MODELS))
def model(request):
    return str(MODELS[request.param])


@pytest.fixture
def english():
    return str(FIXTURES / "spiece.model")


@pytest.fixture(params=OURS)
def tokenizer(request, english):
    return request.param(english)


@pytest.fixture
def warnings_of():
    """Messages of the tokenizers' logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("siglip_hf.preprocessing.tokenization_base")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_corpus_is_large_varied_and_stable():
    assert len(LINES) == 20_000
    assert len(set(LINES)) > 15_000
    assert corpus.corpus(100) == LINES[:100]
    assert "" in LINES
    assert max(map(len, LINES)) > 2000
    for wanted in ("</s>", "<unk>", "▁", "é", "猫", "ق", "👩‍🚀", "\x00", "\x1f", "\u3000", "   ", "ﷺ"):
        assert any(wanted in line for line in LINES), wanted


def test_fixture_follows_the_published_vocabulary(english):
    pieces = SiglipTokenizer(english).sp_model
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert pieces.bos_id() == -1
    tokenizer = SiglipTokenizer(english)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 1, 2)


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_are_those_of_stock_on_the_whole_corpus(model, split_special_tokens):
    lines = LINES[:3000] if split_special_tokens else LINES
    options = {"padding": False, "truncation": False, "split_special_tokens": split_special_tokens, "verbose": False}
    expected = StockTokenizer(model)(lines, **options)["input_ids"]
    for cls in OURS:
        ids = cls(model)(lines, **options)["input_ids"]
        assert [line for line, a, b in zip(lines, ids, expected, strict=True) if a != b] == []


def test_single_texts_pieces_and_encodings_agree_with_the_batch(model):
    lines = LINES[:2000]
    stock, slow, fast = StockTokenizer(model), SiglipTokenizer(model), SiglipTokenizerFast(model)
    batch = slow(lines)["input_ids"]
    encodings = fast(lines).encodings
    for line, ids, encoding in zip(lines, batch, encodings, strict=True):
        pieces = stock.tokenize(line)
        assert slow.tokenize(line) == pieces
        assert fast.tokenize(line) == pieces
        assert slow(line)["input_ids"] == fast(line)["input_ids"] == encoding.ids == ids


def test_very_long_texts(model):
    texts = ["a" * 3000, "ha" * 2000, "0" * 1000, "a " * 2000, "猫" * 2000, "cat" + " " * 3000 + "dog", "é" * 999]
    options = {"padding": False, "truncation": False, "verbose": False}
    expected = StockTokenizer(model)(texts, **options)["input_ids"]
    for cls in OURS:
        assert cls(model)(texts, **options)["input_ids"] == expected
        assert np.shape(cls(model)(texts)["input_ids"]) == (len(texts), 64)


def test_a_batch_is_one_call_of_sentencepiece(tokenizer):
    slow = getattr(tokenizer, "slow_tokenizer", tokenizer)
    calls = []

    class Spy:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            return getattr(self.model, name)

        def encode(self, text, **options):
            calls.append(text)
            return self.model.encode(text, **options)

    slow.sp_model = Spy(slow.sp_model)
    tokenizer([f"cat number {i}" for i in range(100)], return_tensors="pt")
    assert [len(call) for call in calls if isinstance(call, list)] == [100]
    assert len(calls) <= 2  # the other finds the length of the unknown token


def test_defaults_are_what_the_model_was_trained_on(tokenizer, english):
    texts = ["A photo of a cat.", "two dogs " * 50, ""]
    batch = tokenizer(texts, return_tensors="pt")
    assert list(batch) == ["input_ids"]
    assert batch["input_ids"].shape == (3, 64)
    assert batch["input_ids"].dtype == torch.int64
    expected = StockTokenizer(english)(texts, padding="max_length", truncation=True, return_tensors="pt")
    torch.testing.assert_close(batch["input_ids"], expected["input_ids"], rtol=0, atol=0)
    assert batch["input_ids"][1, -1] == tokenizer.eos_token_id  # the end survives the cut
    assert len(tokenizer("cat")["input_ids"]) == len(tokenizer.encode("cat")) == 64
    assert len(tokenizer("cat", padding=None, truncation=None)["input_ids"]) == 64
    assert tokenizer("cat", return_tensors="np")["input_ids"].shape == (1, 64)
    assert tokenizer([], return_tensors="pt")["input_ids"].shape == (0, 64)


def test_explicit_padding_and_truncation_are_obeyed(tokenizer):
    assert tokenizer("cat", padding=False)["input_ids"] == tokenizer.encode("cat", padding=False)
    assert len(tokenizer("cat", padding=False)["input_ids"]) < 64
    assert len(tokenizer("cat " * 100, truncation=False, verbose=False)["input_ids"]) > 100
    assert (
        len(tokenizer("cat", max_length=16)["input_ids"]) == len(tokenizer("a b " * 99, max_length=16).input_ids) == 16
    )
    lengths = [len(ids) for ids in tokenizer(["cat", "a cat and a dog"], padding="longest")["input_ids"]]
    assert lengths[0] == lengths[1] < 64
    with pytest.raises(ValueError, match="padding"):
        tokenizer(["cat", "a cat and a dog"], padding=False, return_tensors="pt")


OPTIONS = [
    {"padding": "max_length", "truncation": True, "return_attention_mask": True, "return_special_tokens_mask": True},
    {"padding": "max_length", "truncation": True, "max_length": 5, "return_token_type_ids": True},
    {"padding": "longest", "truncation": False, "return_attention_mask": True, "return_token_type_ids": True},
    {"padding": "longest", "truncation": True, "max_length": 9, "pad_to_multiple_of": 3, "return_attention_mask": True},
    {"padding": "max_length", "truncation": False, "max_length": 12, "return_special_tokens_mask": True},
    {"padding": False, "truncation": True, "max_length": 1, "return_attention_mask": True},
    {"padding": "max_length", "max_length": 10, "truncation": "only_first", "pad_to_multiple_of": 5},
    {"padding": False, "truncation": True, "max_length": 7, "add_special_tokens": False},
    {"padding": "max_length", "truncation": True, "add_special_tokens": False, "return_attention_mask": True},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_as_in_stock(options, side, tokenizer, english):
    rng = random.Random(5)
    texts = [corpus.captions(rng) for _ in range(30)] + ["", "?!", "猫", corpus.long(rng)]
    options = {"return_attention_mask": False, "padding_side": side, "verbose": False, **options}
    stock = StockTokenizer(english, truncation_side=side)
    tokenizer.truncation_side = side
    expected = stock(texts, **options)
    assert dict(tokenizer(texts, **options)) == dict(expected)
    for text in texts:
        # Stock leaves one text without any token unpadded, but not within a batch.
        if text.strip("?! ") or options.get("add_special_tokens", True):
            assert dict(tokenizer(text, **options)) == dict(stock(text, **options))
    encodings = tokenizer(texts, return_offsets_mapping=True, **options) if tokenizer.is_fast else expected
    assert encodings["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_tensors(framework, tokenizer):
    batch = tokenizer(["a cat", "dog"], return_tensors=framework, return_attention_mask=True)
    lists = tokenizer(["a cat", "dog"], return_attention_mask=True)
    for name in ("input_ids", "attention_mask"):
        assert isinstance(batch[name], torch.Tensor if framework == "pt" else np.ndarray)
        assert batch[name].tolist() == lists[name]


PAIRS = [("a cat", "a dog"), ("a cat </s>", ""), ("x " * 30, "y " * 80), ("two dogs", "</s> wooden bridge")]


@pytest.mark.parametrize("truncation", [True, False, "only_first", "only_second"])
def test_pairs_as_in_stock(truncation, tokenizer, english):
    options = {"padding": False, "truncation": truncation, "verbose": False, "return_attention_mask": True}
    options["max_length"] = 100 if isinstance(truncation, str) else 20
    stock = StockTokenizer(english)
    for first, second in PAIRS:
        expected = stock(first, second, **options)
        assert dict(tokenizer(first, second, **options)) == dict(expected)
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    expected = stock(firsts, seconds, **options)["input_ids"]
    assert tokenizer(firsts, seconds, **options)["input_ids"] == expected
    assert tokenizer(PAIRS, **options)["input_ids"] == expected


def test_words_as_in_stock(tokenizer, english):
    words = ["A", "shiny", "Café", "", "</s>", "traffic-light"]
    options = {"is_split_into_words": True, "padding": False, "truncation": False, "return_attention_mask": False}
    assert tokenizer(words, **options)["input_ids"] == StockTokenizer(english)(words, **options)["input_ids"]
    assert tokenizer([words, ["cat"]], **options)["input_ids"][1] == tokenizer("cat", padding=False)["input_ids"]


def test_special_tokens_within_text(tokenizer):
    eos = tokenizer.eos_token_id
    read = tokenizer("a cat </s> a dog", padding=False)["input_ids"]
    assert read.count(eos) == 2
    plain = tokenizer("a cat </s> a dog", padding=False, split_special_tokens=True)["input_ids"]
    assert plain == tokenizer("a cat s a dog", padding=False)["input_ids"]
    assert plain.count(eos) == 1
    always = type(tokenizer)(tokenizer.vocab_file, split_special_tokens=True)
    assert always("a cat </s> a dog", padding=False)["input_ids"] == plain
    # A text that ends in one gets no second one.
    assert tokenizer("a cat</s>", padding=False)["input_ids"] == tokenizer("a cat", padding=False)["input_ids"]


def test_special_token_methods(tokenizer, english):
    stock = StockTokenizer(english)
    for first, second in (([5, 6], None), ([5], [7, 8]), ([], None)):
        for method in (
            "build_inputs_with_special_tokens",
            "create_token_type_ids_from_sequences",
            "get_special_tokens_mask",
        ):
            assert getattr(tokenizer, method)(first, second) == getattr(stock, method)(first, second), method
    assert tokenizer.build_inputs_with_special_tokens([5, 1]) == [5, 1]
    assert tokenizer.get_special_tokens_mask([5, 6, 1], already_has_special_tokens=True) == [0, 0, 1]
    assert tokenizer.num_special_tokens_to_add() == 1
    assert tokenizer.canonicalize_text("A {}, B", keep_punctuation_exact_string="{}") == "a {} b"


def test_case_can_be_kept(english):
    for cls in OURS:
        tokenizer = cls(english, do_lower_case=False)
        expected = StockTokenizer(english, do_lower_case=False)("A Cat É", padding="max_length")["input_ids"]
        assert tokenizer("A Cat É")["input_ids"] == expected != cls(english)("A Cat É")["input_ids"]


def test_length_comes_from_the_checkpoint(tmp_path, english):
    shutil.copy(english, tmp_path)
    for stated, length in ((None, 64), (16, 16), (int(1e30), 64), ("absent", 64)):
        settings = {"tokenizer_class": "SiglipTokenizer"} | ({} if stated == "absent" else {"model_max_length": stated})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        for cls in OURS:
            tokenizer = cls.from_pretrained(tmp_path)
            assert tokenizer.model_max_length == length
            assert len(tokenizer("cat")["input_ids"]) == length
    for cls in OURS:
        with pytest.raises(ValueError, match="model_max_length is 0"):
            cls(english, model_max_length=0)


def test_truncation_warns_once(tokenizer, warnings_of):
    tokenizer.model_max_length = 41  # the message names it, and each message is said once per process
    tokenizer("a cat")
    assert warnings_of == []
    tokenizer.model_max_length = 43 if tokenizer.is_fast else 42
    for _ in range(2):
        tokenizer(["cat " * 100], return_tensors="pt")
        tokenizer("cat " * 100, "dog")
    assert len(warnings_of) == 1
    assert f"longer than this model's {tokenizer.model_max_length} tokens" in warnings_of[0]


def test_padding_to_the_longest_warns(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("siglip_hf.preprocessing.tokenization_base.logger.warning_once", said.append)
    tokenizer(["cat", "a dog"])
    tokenizer(["cat", "a dog"], padding=False)
    assert {len(ids) for ids in tokenizer(["cat", "a dog"], padding=True)["input_ids"]} == {64}
    assert said == []
    lengths = {len(ids) for ids in tokenizer(["cat", "a dog"], padding="longest")["input_ids"]}
    assert max(lengths) < 64
    tokenizer.pad({"input_ids": [[4, 1], [70, 5, 1]]}, padding="longest")
    assert len(said) == 2
    assert len(set(said)) == 1
    assert "padded to the model's length" in said[0]


def test_decoding_as_in_stock(model):
    lines = LINES[:1000]
    stock = StockTokenizer(model)
    ids = stock(lines, padding="max_length", truncation=True)["input_ids"]
    for cls in OURS:
        tokenizer = cls(model)
        for skip in (True, False):
            assert tokenizer.batch_decode(ids, skip_special_tokens=skip) == stock.batch_decode(
                ids, skip_special_tokens=skip
            )
        assert tokenizer.decode(torch.tensor(ids[0])) == stock.decode(ids[0])
        for line in lines[:50]:
            pieces = stock.tokenize(line)
            assert tokenizer.convert_tokens_to_string(pieces) == stock.convert_tokens_to_string(pieces)
            assert tokenizer.convert_ids_to_tokens(ids[0]) == stock.convert_ids_to_tokens(ids[0])
        assert tokenizer.get_vocab() == stock.get_vocab()
        assert len(tokenizer) == len(stock)


def test_copies_do_not_need_the_file(tmp_path, english):
    texts = ["A shiny café", "a </s> b", "newtoken"]
    for cls in OURS:
        path = shutil.copy(english, tmp_path / "spiece.model")
        tokenizer = cls(str(path), model_max_length=16)
        tokenizer.add_tokens(["newtoken"])
        expected = tokenizer(texts)["input_ids"]
        Path(path).unlink()
        for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert copied(texts)["input_ids"] == expected
            assert copied.decode(expected[0]) == tokenizer.decode(expected[0])
        tokenizer.save_pretrained(tmp_path / cls.__name__)
        assert cls.from_pretrained(tmp_path / cls.__name__)(texts)["input_ids"] == expected


ADDED = ["newword", "Upper", "日本", AddedToken("<x>", lstrip=True), AddedToken("alone", single_word=True)]
WITH_ADDED = [
    "a newword here",
    "upper UPPER Upper",
    "日-本 日本",
    "a <x> b<x>c",
    "alone alonely not-alone alone",
    "newword",
]


def add(tokenizer):
    tokenizer.add_tokens(copy.deepcopy(ADDED))
    tokenizer.add_tokens(["[mask]"], special_tokens=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<style>"]})
    return tokenizer


def test_added_tokens_as_in_stock(tokenizer, english):
    stock = add(StockTokenizer(english))
    add(tokenizer)
    texts = [*WITH_ADDED, "[mask] <style> cat", "cat[MASK]", *LINES[:300]]
    options = {"padding": False, "truncation": False, "verbose": False}
    assert len(tokenizer) == len(stock)
    assert tokenizer.get_added_vocab() == stock.get_added_vocab()
    assert tokenizer(texts, **options)["input_ids"] == stock(texts, **options)["input_ids"]
    for text in texts:
        assert tokenizer.tokenize(text) == stock.tokenize(text)
        ids = stock(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == stock.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("reader", [StockTokenizer, *OURS])
@pytest.mark.parametrize("writer", [StockTokenizer, *OURS])
def test_saved_by_one_loaded_by_the_other(writer, reader, added, tmp_path, english):
    original = writer(english, model_max_length=16)
    if added:
        add(original)
    original.save_pretrained(tmp_path)
    loaded = reader.from_pretrained(tmp_path)
    texts = [*WITH_ADDED, "[mask] <style> cat", *LINES[:200]]
    options = {"padding": "max_length", "truncation": True, "verbose": False}
    assert loaded.model_max_length == 16
    assert loaded(texts, **options)["input_ids"] == original(texts, **options)["input_ids"]
    assert loaded.all_special_tokens == original.all_special_tokens


def test_saved_folder_holds_what_others_read(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "SiglipTokenizer"
    assert settings["model_max_length"] == 64
    assert str(FIXTURES) not in (tmp_path / "tokenizer_config.json").read_text()
    assert (tmp_path / "spiece.model").read_bytes() == (FIXTURES / "spiece.model").read_bytes()
    assert (tmp_path / "tokenizer.json").exists() == tokenizer.is_fast
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), SiglipTokenizerFast)
    with pytest.raises(ValueError, match="not a folder"):
        tokenizer.save_vocabulary(str(tmp_path / "absent"))


def test_offsets_point_into_the_text_as_given(english):
    fast = SiglipTokenizerFast(english)
    text = "A  Shiny,  café\u0301 </s> TEAPOT! ﷺ 😀x"
    batch = fast(text, padding=False, return_offsets_mapping=True)
    cut = [text[begin:end] for begin, end in batch["offset_mapping"]]
    pieces = fast.convert_ids_to_tokens(batch["input_ids"])
    assert (cut[0], cut[-2], cut[-1]) == ("A", "x", "")
    assert "".join(cut).startswith("AShinycafé\u0301</s>TEAPOT")
    assert {c for c, p in zip(cut, batch.tokens(), strict=True) if p in ("ص", "م")} <= {"ﷺ"}
    assert pieces[0] == "▁a"
    assert batch.token_to_chars(0) == (0, 1)
    assert text[slice(*batch.word_to_chars(1))] == "Shiny"
    place = batch.char_to_token(text.index("TEAPOT"))
    assert text[batch.token_to_chars(place).start :].startswith("TEAPOT")
    assert (batch.word_ids()[0], batch.word_ids()[-1]) == (0, None)


def test_offsets_on_the_corpus(model):
    fast = SiglipTokenizerFast(model)
    rng = random.Random(2)
    lines = [corpus.captions(rng) for _ in range(300)]
    batch = fast(lines, padding=False, truncation=False, return_offsets_mapping=True)
    for i, (line, offsets) in enumerate(zip(lines, batch["offset_mapping"], strict=True)):
        for piece, (begin, end) in list(zip(batch.tokens(i), offsets, strict=True))[:-1]:
            assert canonicalize_text(line[begin:end]) == piece.strip("▁"), (line, piece)
    batch = fast(LINES, padding=False, truncation=False, verbose=False, return_offsets_mapping=True)
    for line, offsets in zip(LINES, batch["offset_mapping"], strict=True):
        places = offsets[:-1] if offsets and offsets[-1] == (0, 0) else offsets
        assert all(0 <= begin <= end <= len(line) for begin, end in places), line
        assert [begin for begin, _ in places] == sorted(begin for begin, _ in places), line
        assert [end for _, end in places] == sorted(end for _, end in places), line


@pytest.mark.parametrize(
    ("text", "place"),
    [("dog\ufdfa", (3, 4)), ("many words dog\ufdfa", (14, 15)), ("x\ufdfa\ufdfa", (1, 3)), ("dog\ufdfadog", (3, 4))],
)
def test_offsets_of_a_character_that_becomes_many(english, text, place):
    batch = SiglipTokenizerFast(english)(text, padding=False, return_offsets_mapping=True)
    made = [
        o for t, o in zip(batch.tokens(), batch["offset_mapping"], strict=True) if t.strip("▁") and t[-1] > "\u0600"
    ]
    assert (made[0][0], made[-1][1]) == place
    assert all(text[begin:end].strip("\ufdfa") == "" for begin, end in made)
    assert all(end == begin + 1 for begin, end in made)


def test_encodings_are_made_on_demand_and_survive_pickling(english):
    fast = SiglipTokenizerFast(english)
    batch = fast(["a cat", "two dogs </s>"], return_tensors="pt", max_length=8)
    assert batch.is_fast
    assert batch._made is None
    assert [encoding.ids for encoding in batch.encodings] == batch["input_ids"].tolist()
    assert batch.tokens(0)[:2] == ["▁a", batch.tokens(0)[1]]
    again = pickle.loads(pickle.dumps(fast(["a cat"], max_length=8)))
    assert again.tokens(0) == batch.tokens(0)


def test_overflow_comes_as_more_rows(english):
    fast = SiglipTokenizerFast(english)
    text = "cat " * 30
    whole = fast(text, padding=False, truncation=False)["input_ids"][:-1]
    batch = fast([text, "dog"], max_length=10, stride=2, return_overflowing_tokens=True)
    assert all(len(row) == 10 for row in batch["input_ids"])
    assert batch["overflow_to_sample_mapping"][-1] == 1
    rows = [
        row for row, sample in zip(batch["input_ids"], batch["overflow_to_sample_mapping"], strict=True) if sample == 0
    ]
    assert rows[0][:9] == whole[:9]
    assert rows[1][:9] == whole[7:16]
    slow = SiglipTokenizer(english)(text, max_length=10, return_overflowing_tokens=True)
    assert slow["overflowing_tokens"] == whole[9:]


def test_pairs_know_their_sequence(english):
    batch = SiglipTokenizerFast(english)("a cat", "a dog", padding=False)
    assert [s for s in batch.sequence_ids() if s is not None] == sorted(
        s for s in batch.sequence_ids() if s is not None
    )
    assert set(batch.sequence_ids()) == {0, 1, None}


def test_rust_pipeline_gives_the_same_ids_on_clean_text(model):
    fast = SiglipTokenizerFast(model)
    backend = fast.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    rng = random.Random(4)
    for family in (corpus.captions, corpus.words, corpus.emoji, corpus.controls):
        lines = [family(rng).strip() for _ in range(300)]
        ids = fast(lines, padding=False, truncation=False, verbose=False)["input_ids"]
        assert [encoding.ids for encoding in backend.encode_batch(lines)] == ids, family.__name__


def test_tokenizer_json_alone_is_enough(tmp_path, english):
    fast = SiglipTokenizerFast(english, model_max_length=16)
    fast.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink()
    alone = SiglipTokenizerFast.from_pretrained(tmp_path)
    rng = random.Random(6)
    lines = [corpus.captions(rng) for _ in range(200)]
    assert alone.slow_tokenizer is None
    batch = alone(lines, return_tensors="pt")
    assert list(batch) == ["input_ids"]
    assert torch.equal(batch["input_ids"], fast(lines, return_tensors="pt")["input_ids"])
    assert alone.decode(batch["input_ids"][0]) == fast.decode(batch["input_ids"][0])
    assert alone.tokenize(lines[0]) == fast.tokenize(lines[0])
    alone.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "spiece.model").exists()
    assert (
        SiglipTokenizerFast.from_pretrained(tmp_path / "again")(lines[0])["input_ids"] == batch["input_ids"][0].tolist()
    )


def test_mistakes_are_named(english):
    with pytest.raises(ValueError, match=r"absent\.model"):
        SiglipTokenizerFast("absent.model")
    with pytest.raises(ValueError, match="2 texts but 1 second"):
        SiglipTokenizerFast(english)(["cat", "dog"], ["bird"])
    for cls in OURS:
        for call in (cls(english), cls(english).encode):
            with pytest.raises(ValueError, match=r"text\[1\] is nan of type float"):
                call(["cat", float("nan")])
            with pytest.raises(ValueError, match=r"text is 3 of type int"):
                call(3)
        with pytest.raises(ValueError, match=r"text_pair\[0\] is None of type NoneType"):
            cls(english)(["cat"], [None])
