import random
import string
import sys

import pytest
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as StockTokenizer

from corpus import corpus
from siglip_hf.preprocessing.text_cleaning import (
    canonicalize_text,
    canonicalize_texts,
    canonicalize_with_offsets,
    remove_punctuation,
)

LINES = corpus(5_000, seed=3)


class Stock:
    """Stock's cleaning, which needs nothing of a tokenizer but this."""

    do_lower_case = True
    remove_punctuation = StockTokenizer.remove_punctuation
    canonicalize_text = StockTokenizer.canonicalize_text


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("keep", [None, "{}", "</s>", " ", "o"])
def test_equals_stock(lowercase, keep):
    stock = Stock()
    stock.do_lower_case = lowercase
    for line in LINES:
        expected = stock.canonicalize_text(line, keep_punctuation_exact_string=keep)
        assert canonicalize_text(line, lowercase=lowercase, keep_punctuation_exact_string=keep) == expected


def test_equals_stock_on_every_character():
    stock = Stock()
    for start in range(0, sys.maxunicode + 1, 64):
        text = "".join(f"Aa{char}Σ{char}" for char in map(chr, range(start, start + 64)))
        assert canonicalize_text(text) == stock.canonicalize_text(text), hex(start)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A photo, of  2 Cats!", "a photo of 2 cats"),
        (" \x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000", ""),
        ("tab\tnew\nline", "tab new line"),
        ("zero\u200bwidth", "zero\u200bwidth"),
        (string.punctuation, ""),
        ("¡Olé! 、。", "¡olé 、。"),
        ("ΟΔΥΣΣΕΥΣ", "οδυσσευς"),
        ("", ""),
    ],
)
def test_examples(text, expected):
    assert canonicalize_text(text) == expected


def test_punctuation_can_stay():
    assert canonicalize_text("It's  A cat!", remove_punctuation=False) == "it's a cat!"
    assert remove_punctuation("It's  A cat!") == "Its  A cat"


@pytest.mark.parametrize("options", [{}, {"lowercase": False}, {"remove_punctuation": False}])
def test_a_batch_equals_its_texts(options):
    rng = random.Random(0)
    for size in (0, 1, 2, 7, 1000):
        texts = rng.sample(LINES, size)
        assert canonicalize_texts(texts, **options) == [canonicalize_text(text, **options) for text in texts]
    texts = ["ΑΣ", "ΣΑΣ \0", "", " ", "\0"]  # what separates texts within
    assert canonicalize_texts(texts, **options) == [canonicalize_text(text, **options) for text in texts]
    texts = ["ΑΣ", "Σ", " a ", "", " ", "ΣΑΣ", ""]
    assert canonicalize_texts(texts, **options) == [canonicalize_text(text, **options) for text in texts]


@pytest.mark.parametrize("options", [{}, {"lowercase": False}, {"remove_punctuation": False}])
def test_offsets_lead_back(options):
    for line in LINES[:2000]:
        text, offsets = canonicalize_with_offsets(line, **options)
        assert text == canonicalize_text(line, **options)
        assert len(offsets) == len(text)
        assert all(0 <= a < b <= len(line) for a, b in offsets)
        for char, (begin, end) in zip(text, offsets, strict=True):
            source = line[begin:end]
            assert char == " " if remove_punctuation(source).isspace() else char in source.lower() + source + "ς"


def test_offsets_of_a_letter_that_grows():
    assert canonicalize_with_offsets("İ, x") == ("i̇ x", [(0, 1), (0, 1), (2, 3), (3, 4)])
