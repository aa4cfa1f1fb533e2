"""A tiny tokenizer of Gemma's kind, trained in the test: BPE with byte fallback, spaces as "▁", and its hub files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
ADDED_TOKENS = ("<start_of_turn>", "<table>", "\n\n")  # Gemma has such tokens for markup and runs of line breaks
CORPUS = (
    "a photo of a cat and a dog on the red sofa. ein foto von einer katze und einem hund. una foto de un gato. "
    "ein großes schönes bild, 2 cats! fotografía άνθρωπος собака 猫の写真 "
) * 4


def gemma_backend() -> Tokenizer:
    """Returns the tokenizer; its ids begin with the special tokens and 256 bytes, as Gemma's do."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    trained.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=260, show_progress=False))
    model = json.loads(trained.to_str())["model"]

    names = [*SPECIAL_TOKENS, *ADDED_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {name: index for index, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ADDED_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def write_gemma_tokenizer(folder: Path, **fields: Any) -> Path:
    """Writes `tokenizer.json` and a `tokenizer_config.json` as published; `fields` change the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    gemma_backend().save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "padding_side": "right",
        "tokenizer_class": "GemmaTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | fields))
    return folder
