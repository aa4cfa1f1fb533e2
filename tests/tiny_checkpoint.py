"""A checkpoint folder as on the hub, but tiny: random weights and a real SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import torch

WORDS = (
    "a photo of the cat dog bird horse fish tree house car sun moon red green blue small big this is drawing in style"
)
TEXT_LENGTH = 16
IMAGE_SIZE = 32


def write_tiny_checkpoint(folder: Path) -> Path:
    """Fills a folder with the files of a SigLIP repository and returns it."""
    from siglip_hf import SiglipConfig, SiglipModel

    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS.split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 8),
        model_prefix=str(folder / "spiece"),
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).vocab_size()

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special_ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = {**tower, **special_ids, "vocab_size": vocab_size, "max_position_embeddings": TEXT_LENGTH}
    vision = {**tower, "image_size": IMAGE_SIZE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random weights that make labels and pictures differ visibly
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)

    half = [0.5, 0.5, 0.5]
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_processor_type": "SiglipImageProcessor",
        "image_std": half,
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    tokenizer = {
        "do_lower_case": True,
        "eos_token": "</s>",
        "model_max_length": TEXT_LENGTH,
        "pad_token": "</s>",
        "processor_class": "SiglipProcessor",
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }
    for name, content in (("preprocessor_config", preprocessor), ("tokenizer_config", tokenizer)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    return folder
