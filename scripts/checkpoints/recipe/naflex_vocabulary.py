"""A tokenizer of Gemma's kind, small: BPE with byte fallback on lowercased text, spaces as "▁"."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor

from siglip_hf import Siglip2Tokenizer

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # Gemma's first ids, in Gemma's order


def gemma_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of `vocab_size` tokens: the special ones, the 256 bytes, then what BPE finds in `texts`."""
    to_pieces = normalizers.Replace(" ", "▁")
    by_word = pre_tokenizers.Split("▁", behavior="merged_with_next")
    first = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(BPE())
    trained.normalizer, trained.pre_tokenizer = to_pieces, by_word
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(first), min_frequency=2, show_progress=False)
    trained.train_from_iterator((text.lower() for text in texts), trainer)
    model = json.loads(trained.to_str())["model"]
    names = first + sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = to_pieces, by_word
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


class Encoder:
    """Turns texts into short ids with the package's own tokenizer, and remembers them.

    Args:
        path: A `tokenizer.json`.
        length: Of the ids; the last is padding always.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.tokenizer = Siglip2Tokenizer(tokenizer_file=str(path), model_max_length=length - 1)
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids (B, length) long."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self.tokenizer(new)["input_ids"], strict=True))
        padding = self.tokenizer.pad_token_id
        return torch.tensor([[*self._known[text], padding] for text in texts])
