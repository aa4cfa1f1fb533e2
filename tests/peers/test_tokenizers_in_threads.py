"""Threads that share a processor, as servers do: what one asks for never reaches another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

import siglip_hf

TEXTS = ["a red cat above two blue dogs", "house"]


def tokenizers(tmp_path):
    """Every tokenizer class, from every file it reads."""
    slow = siglip_hf.SiglipTokenizer.from_pretrained(siglip_hf.default_checkpoint())
    fast = siglip_hf.SiglipTokenizerFast.from_pretrained(siglip_hf.default_checkpoint())
    fast.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    return {
        "SiglipTokenizer": slow,
        "SiglipTokenizerFast": fast,
        "SiglipTokenizerFast from tokenizer.json": siglip_hf.SiglipTokenizerFast.from_pretrained(tmp_path),
        "Siglip2Tokenizer": AutoTokenizer.from_pretrained(siglip_hf.naflex_checkpoint()),
    }


@pytest.mark.parametrize(
    "name",
    [
        "SiglipTokenizer",
        "SiglipTokenizerFast",
        "SiglipTokenizerFast from tokenizer.json",
        "Siglip2Tokenizer",
    ],
)
def test_each_thread_gets_the_length_it_asks_for(name, tmp_path):
    tokenizer = tokenizers(tmp_path)[name]
    calls = [
        {},
        {"padding": False},
        {"padding": False, "truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 9, "truncation": True},
        {"add_special_tokens": False, "padding": False},
    ]
    expected = [tokenizer(TEXTS, **options)["input_ids"] for options in calls]
    assert len({tuple(map(len, ids)) for ids in expected}) == len(calls)
    start = threading.Barrier(len(calls))

    def work(index: int) -> int:
        start.wait()
        return sum(tokenizer(TEXTS, **calls[index])["input_ids"] != expected[index] for _ in range(100))

    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(work, range(len(calls)))) == [0] * len(calls)
