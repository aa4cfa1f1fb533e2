"""Write a trained model as a checkpoint folder in the published format, half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from siglip_hf import SiglipImageProcessor, SiglipModel, SiglipTokenizer

from .captions import Encoder


def export(model: SiglipModel, vocabulary: Path, out: Path) -> None:
    """Save model, tokenizer and image processor to `out`.

    Args:
        model: Any precision; saved as float16.
        vocabulary: The SentencePiece model that the texts were encoded with.
        out: Folder, made where it does not exist.

    Raises:
        RuntimeError: The tokenizer gives other ids than the model was trained with.
    """
    config = model.config
    length, size = config.text_config.max_position_embeddings, config.vision_config.image_size
    tokenizer = SiglipTokenizer(str(vocabulary), model_max_length=length)
    sample = ["a photo of a cat", "Flagge: Österreich", "ロケットの写真", "고양이", "", "a very long text " * 9]
    ids = torch.tensor(tokenizer(sample, padding="max_length", truncation=True)["input_ids"])
    if not torch.equal(ids, Encoder(vocabulary)(sample)):
        raise RuntimeError("SiglipTokenizer and the training's encoder disagree: the checkpoint would misread texts")
    tokenizer.save_pretrained(out)
    SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(out)
    copy.deepcopy(model).half().save_pretrained(out)
