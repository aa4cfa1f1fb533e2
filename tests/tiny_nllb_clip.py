"""An NLLB-CLIP as open_clip keeps one in a folder, but tiny: random weights and a tokenizer of letters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import M2M100Config, NllbTokenizer

LANGUAGES = ["eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn", "ita_Latn", "por_Latn", "rus_Cyrl", "kor_Hang", "jpn_Jpan"]
TOWERS = {
    # As in nllb-clip-base, which shares out 100 % (softmax), and as in nllb-clip-base-siglip.
    "softmax": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "sigmoid": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_proj": "linear",
    },
}


def write_tiny_nllb_clip(open_clip: Any, folder: Path, reads_as: str) -> Path:
    """Fills a folder that `local-dir:` reads, with open_clip's own classes, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_letters, *"äöüéñ.,▁고양이개犬猫кошасб"]
    words = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(letters), *LANGUAGES])}
    tokenizer = NllbTokenizer(vocab=words, merges=[], extra_special_tokens=LANGUAGES)
    tokenizer.save_pretrained(folder)
    M2M100Config(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=80,
    ).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": "linear",
        "hf_pooler_type": "cls_pooler",
        "hf_model_pretrained": False,
    }
    model: dict[str, Any] = {"embed_dim": 16, "vision_cfg": TOWERS[reads_as], "text_cfg": text}
    if reads_as == "sigmoid":
        model["init_logit_bias"] = -10
    torch.manual_seed(0)
    towers = open_clip.CustomTextCLIP(**json.loads(json.dumps(model))).eval()
    with torch.no_grad():
        for parameter in towers.parameters():  # random weights that make texts and pictures differ visibly
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    save_file({k: v.contiguous() for k, v in towers.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    return folder
