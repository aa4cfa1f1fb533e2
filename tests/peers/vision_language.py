"""Tiny vision-language models of transformers, made and run alike with and without this package.

Run as `python vision_language.py make|check FOLDER`, it uses stock transformers alone; tests import it.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE_TOKEN = 60


def configurations() -> dict[str, transformers.PreTrainedConfig]:
    """A tiny configuration of each kind of model; "with head" has the pooling head of published checkpoints."""
    bare = TOWER | {"vision_use_head": False}
    idefics = {key: value for key, value in TOWER.items() if key != "model_type"}
    return {
        "paligemma": transformers.PaliGemmaConfig(
            vision_config=bare,
            text_config=LANGUAGE | {"model_type": "gemma"},
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        ),
        "gemma3": transformers.Gemma3Config(
            vision_config=bare,
            text_config=LANGUAGE | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8},
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=61,
            eoi_token_index=62,
        ),
        "llava_onevision, with head": transformers.LlavaOnevisionConfig(
            vision_config=TOWER,
            text_config=LANGUAGE | {"model_type": "qwen2"},
            image_token_index=IMAGE_TOKEN,
            video_token_index=61,
            image_grid_pinpoints=[[32, 32], [32, 64]],
            vision_feature_layer=-2,
        ),
        "llava": transformers.LlavaConfig(
            vision_config=bare,
            text_config=LANGUAGE | {"model_type": "llama"},
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=[-1, -2],
            vision_feature_select_strategy="full",
        ),
        "idefics3": transformers.Idefics3Config(
            vision_config=idefics,
            text_config=LANGUAGE | {"model_type": "llama"},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
            pad_token_id=0,
        ),
        "smolvlm": transformers.SmolVLMConfig(
            vision_config=idefics,
            text_config=LANGUAGE | {"model_type": "llama"},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
            pad_token_id=0,
        ),
    }


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    """A picture and a prompt with as many image tokens as the model makes of it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    tokens = {"paligemma": 16, "gemma3": 4, "llava": 16, "idefics3": 4, "smolvlm": 4}
    inputs = {"pixel_values": pixels}
    if name in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = pixels[:, None]
    if name.startswith("llava_onevision"):  # the whole picture and one tile, with a token at the end of each row
        inputs["pixel_values"] = torch.cat([pixels, pixels.flip(-1)])[None]
        inputs["image_sizes"] = torch.tensor([[32, 32]])
    count = tokens.get(name, 16 + 16 + 4)
    prompt = torch.randint(3, 50, (1, 6), generator=generator)
    inputs["input_ids"] = torch.cat([torch.full((1, count), IMAGE_TOKEN), prompt], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return inputs


@torch.no_grad()
def run(model: transformers.PreTrainedModel, name: str) -> torch.Tensor:
    """Logits (1, L, vocabulary)."""
    return model(**inputs_for(name)).logits


def make(folder: Path) -> None:
    """Saves a model of each kind with random weights, and what it answers."""
    for name, config in configurations().items():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
        torch.save(run(model, name), folder / name / "logits.pt")


def check(folder: Path) -> None:
    """Loads each model that was saved again, and compares what it answers."""
    for name in configurations():
        model, info = AutoModelForImageTextToText.from_pretrained(folder / name / "again", output_loading_info=True)
        assert not info["missing_keys"], (name, info)
        assert not info["unexpected_keys"], (name, info)
        torch.testing.assert_close(run(model, name), torch.load(folder / name / "logits.pt"), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
    assert sys.modules.get("siglip_hf") is None
