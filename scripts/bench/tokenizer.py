"""Texts to padded tensors: stock transformers, this package's two tokenizers, and SentencePiece alone.

    python scripts/bench/tokenizer.py [--texts 5000] [--model path/to/spiece.model]

All run in turn in one process; times are medians. Without `--model` a vocabulary of 32,000 pieces, the size of the
published English one, is trained on made-up text first (half a minute).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import sentencepiece as spm
import torch
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as StockTokenizer

from common import in_turn, machine
from siglip_hf import SiglipTokenizer, SiglipTokenizerFast

VOCABULARY = 32_000
CAPTION = (
    "a {adjective} {noun} {verb} the {other}",
    "A photo of a {noun}.",
    "{number} {noun}s near a {adjective} {other}, at {noun} time",
    "this is a close-up of the {adjective} {noun}",
)


def make_words(count: int, rng: random.Random) -> list[str]:
    """Returns `count` different made-up words, of 2 to 4 syllables."""
    syllables = [a + b + c for a in ("b", "c", "d", "f", "gr", "k", "l", "m", "p", "st", "t", "v") for b in "aeiou"
                 for c in ("", "n", "r", "s", "t")]  # fmt: skip
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(syllables, k=rng.randint(2, 4)))] = None
    return list(words)


def make_captions(count: int, words: list[str], rng: random.Random) -> list[str]:
    """Returns `count` short captions."""
    return [
        rng.choice(CAPTION).format(
            adjective=rng.choice(words), noun=rng.choice(words), verb=rng.choice(words), other=rng.choice(words),
            number=rng.randint(2, 99),
        )
        for _ in range(count)
    ]  # fmt: skip


def train(path: Path, words: list[str], rng: random.Random) -> None:
    """Trains a SentencePiece model with the special ids of the published one."""
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(40_000)] + make_captions(10_000, words, rng)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line.lower() for line in lines), model_prefix=str(path.with_suffix("")),
        vocab_size=VOCABULARY, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, help="a SentencePiece model")
    arguments = parser.parse_args()

    rng = random.Random(0)
    words = make_words(20_000, rng)
    captions = make_captions(arguments.texts, words, rng)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "spiece.model"
        if arguments.model is None:
            train(model, words, rng)
        stock, slow, fast = (cls(str(model)) for cls in (StockTokenizer, SiglipTokenizer, SiglipTokenizerFast))
    cleaned = [slow.canonicalize_text(caption) for caption in captions]

    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    expected = stock(captions, **options)["input_ids"]
    for ours in (slow, fast):
        if not torch.equal(ours(captions, **options)["input_ids"], expected):
            raise SystemExit(f"{type(ours).__name__} gives other ids than stock.")

    times = in_turn(
        {
            "stock SiglipTokenizer": lambda: stock(captions, **options),
            "our SiglipTokenizer": lambda: slow(captions, return_tensors="pt"),
            "our SiglipTokenizerFast": lambda: fast(captions, return_tensors="pt"),
            "SentencePiece alone": lambda: slow.sp_model.encode(cleaned),
        },
        arguments.repeats,
    )
    print(machine())
    tokens = sum(map(len, slow.sp_model.encode(cleaned))) / len(cleaned)
    print(
        f"{len(captions)} captions of {tokens:.1f} tokens, {slow.vocab_size} pieces, to ({len(captions)}, 64) tensors\n"
    )
    for name, seconds in times.items():
        print(f"{name:24} {seconds * 1e3:8.1f} ms {len(captions) / seconds:10,.0f} texts/s")
    for name in ("our SiglipTokenizer", "our SiglipTokenizerFast"):
        print(f"{name}: {times['stock SiglipTokenizer'] / times[name]:.1f}x stock")


if __name__ == "__main__":
    main()
