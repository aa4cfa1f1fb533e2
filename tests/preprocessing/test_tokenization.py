"""What holds for every tokenizer: safe in threads, counting unpadded, any sequence of texts, a mask when asked for."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from siglip_hf import Siglip2Tokenizer, SiglipTokenizer, SiglipTokenizerFast
from tiny_gemma import write_gemma_tokenizer

SPIECE = str(Path(__file__).parents[1] / "fixtures" / "spiece.model")
NAMES = ("slow", "fast", "tokenizer.json alone", "siglip2")
LENGTH = 12


@pytest.fixture(params=NAMES, scope="module")
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "slow":
        return SiglipTokenizer(SPIECE, model_max_length=LENGTH)
    if request.param == "siglip2":
        return Siglip2Tokenizer.from_pretrained(write_gemma_tokenizer(folder), model_max_length=LENGTH)
    fast = SiglipTokenizerFast(SPIECE, model_max_length=LENGTH)
    if request.param == "fast":
        return fast
    fast.save_pretrained(folder)
    (folder / "spiece.model").unlink()
    return SiglipTokenizerFast.from_pretrained(folder)


TEXT = "a photo of a cat"
CALLS = [
    lambda t: t(TEXT)["input_ids"],
    lambda t: t(TEXT, padding=False)["input_ids"],
    lambda t: t(TEXT, max_length=5)["input_ids"],
    lambda t: t(TEXT, padding="max_length", max_length=20)["input_ids"],
    lambda t: t([TEXT, "x"], return_tensors="np")["input_ids"].tolist(),
    lambda t: t([TEXT, TEXT], padding=False, truncation=False)["input_ids"],
    lambda t: t(TEXT, "two dogs", max_length=6)["input_ids"],
    lambda t: t(TEXT.split(), is_split_into_words=True)["input_ids"],
    lambda t: t(TEXT, padding="longest", pad_to_multiple_of=6, padding_side="left")["input_ids"],
    lambda t: t(f"{TEXT} {t.eos_token} x", split_special_tokens=True)["input_ids"],
    lambda t: t(f"{TEXT} {t.eos_token} x", split_special_tokens=False)["input_ids"],
    lambda t: t.encode(TEXT),
    lambda t: t.encode(TEXT, add_special_tokens=False),
    lambda t: t.encode(TEXT, padding=False, truncation=True, max_length=3),
    lambda t: t.tokenize(TEXT),
    lambda t: t(TEXT, return_attention_mask=True)["attention_mask"],
]


def test_threads_do_not_change_each_others_calls(tokenizer):
    expected = [call(tokenizer) for call in CALLS]
    start = threading.Barrier(8, timeout=60)

    def work(first: int) -> list[int]:
        start.wait()
        places = [(first + i) % len(CALLS) for i in range(20 * len(CALLS))]
        return [place for place in places if CALLS[place](tokenizer) != expected[place]]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(0, 16, 2))) == [[]] * 8


def test_a_call_leaves_the_rust_object_as_it_is(tokenizer):
    if not tokenizer.is_fast:
        pytest.skip("has no Rust object")
    for call in CALLS:
        call(tokenizer)
        backend = tokenizer.backend_tokenizer
        assert (backend.padding, backend.truncation, backend.encode_special_tokens) == (None, None, False)


def test_padding_set_from_outside_is_undone(tokenizer):
    if not tokenizer.is_fast:
        pytest.skip("has no Rust object")
    expected = [call(tokenizer) for call in CALLS]
    for call, ids in zip(CALLS, expected, strict=True):
        tokenizer.backend_tokenizer.enable_padding(length=40)
        tokenizer.backend_tokenizer.enable_truncation(2)
        assert call(tokenizer) == ids
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def test_counting_is_neither_padded_nor_cut(tokenizer):
    pieces = tokenizer.tokenize(TEXT)
    assert 0 < len(pieces) < LENGTH
    assert tokenizer.encode(TEXT, add_special_tokens=False) == tokenizer.convert_tokens_to_ids(pieces)
    assert len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == len(pieces)
    long = " ".join([TEXT] * 50)
    count = len(tokenizer.tokenize(long))
    assert count > 100
    assert len(tokenizer.encode(long, add_special_tokens=False)) == count
    # What is asked for is obeyed.
    assert len(tokenizer.encode(TEXT, add_special_tokens=False, padding="max_length")) == LENGTH
    assert len(tokenizer.encode(long, add_special_tokens=False, truncation=True)) == LENGTH


def test_true_means_the_models_length(tokenizer):
    expected = tokenizer([TEXT, "x"])["input_ids"]
    assert tokenizer([TEXT, "x"], padding=True)["input_ids"] == expected
    assert tokenizer.encode(TEXT, padding=True) == expected[0]
    unpadded = tokenizer([TEXT, "x"], padding=False)
    assert tokenizer.pad(unpadded)["input_ids"] == expected
    assert tokenizer.pad(unpadded, padding=True, return_tensors="np")["input_ids"].tolist() == expected
    assert len(tokenizer.pad(unpadded, padding="longest")["input_ids"][1]) == len(unpadded["input_ids"][0])


def test_the_mask_is_returned_when_asked_for(tokenizer):
    count = len(tokenizer(TEXT, padding=False)["input_ids"])
    batch = tokenizer([TEXT], return_attention_mask=True)
    assert batch["attention_mask"] == [[1] * count + [0] * (LENGTH - count)]
    assert list(tokenizer([TEXT])) == ["input_ids"]


SEQUENCES = {
    "tuple": tuple,
    "generator": iter,
    "datasets.Column": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
    "pandas.Series": pd.Series,
    "pandas.Series from row 5": lambda texts: pd.Series(texts, index=range(5, 5 + len(texts))),
    "pandas.Index": pd.Index,
    "array of strings": np.array,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "pyarrow": pa.array,
    "pyarrow, chunked": lambda texts: pa.chunked_array([texts]),
}


@pytest.mark.parametrize("make", SEQUENCES.values(), ids=SEQUENCES)
def test_any_sequence_is_a_batch(tokenizer, make):
    texts = [TEXT, "two dogs", ""]
    assert tokenizer(make(texts))["input_ids"] == tokenizer(texts)["input_ids"]
    assert tokenizer.encode(make(texts)) == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("wrong", [float("nan"), None, 3, b"cat", {"a": 1}, pd.NA], ids=repr)
def test_what_is_not_a_text_is_named(tokenizer, wrong):
    for sequence in (["a", wrong], pd.Series(["a", wrong], dtype=object), np.array(["a", wrong], dtype=object)):
        with pytest.raises(ValueError, match=rf"text\[1\] is .* of type {type(wrong).__name__}"):
            tokenizer(sequence)
