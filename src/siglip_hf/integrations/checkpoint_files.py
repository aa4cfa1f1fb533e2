"""What a folder of a converted checkpoint holds beside the weights: the files of tokenizer and image processor."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from siglip_hf.models.configuration_siglip import as_pair
from siglip_hf.preprocessing.sentence_transformers_files import write_sentence_transformers_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# By its size the Gemma vocabulary of SigLIP 2 is told from SigLIP's (32,000 and 250,000).
GEMMA_VOCABULARY = 256_000

_BLOCK = re.compile(r"(encoderblock_|blocks\.|layers\.)(\d+)")


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of a name such as "bfloat16".

    Raises:
        ValueError: If weights are not saved in it.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r} cannot be saved; give one of {', '.join(DTYPES)}")
    return found


def abridged(names: Iterable[str]) -> str:
    """Names in their order; those that differ in the block's number only are joined: `encoderblock_{0-11}`.

    Args:
        names: of tensors, in any layout.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        match = _BLOCK.search(name)
        numbers[_BLOCK.sub(r"\g<1>{}", name, count=1)] += [int(match[2])] if match else []
    return ", ".join(name.replace("{}", _span(found)) if found else name for name, found in numbers.items())


def _span(numbers: list[int]) -> str:
    """[3] -> "3", [0, 1, 2, 5] -> "{0-2,5}"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"


def is_siglip2(config: Any) -> bool:
    """Whether a model's configuration is that of a SigLIP 2, of which the square ones have SigLIP's configuration."""
    return config.model_type == "siglip2" or config.text_config.vocab_size == GEMMA_VOCABULARY


def write_image_processor(folder: Path, config: Any, **settings: Any) -> None:
    """Writes `preprocessor_config.json`.

    Args:
        folder: where.
        config: of the model, or of its image tower alone.
        **settings: in place of the usual ones, such as `resample`.
    """
    vision = getattr(config, "vision_config", config)
    naflex = config.model_type.startswith("siglip2")
    usual: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        # As published: SigLIP resizes pictures bicubically (3), SigLIP 2 bilinearly (2).
        "resample": 2 if naflex or (vision is not config and is_siglip2(config)) else 3,
        "rescale_factor": 1 / 255,
    }
    family = "Siglip2" if naflex else "Siglip"
    usual["image_processor_type"] = f"{family}ImageProcessor"
    if vision is not config:
        usual["processor_class"] = f"{family}Processor"
    if naflex:
        usual |= {"patch_size": vision.patch_size, "max_num_patches": vision.num_patches}
    else:
        height, width = as_pair(vision.image_size)
        usual["size"] = {"height": height, "width": width}
    _write_json(folder / "preprocessor_config.json", usual | settings)


def check_vocabulary(path: Path, config: Any) -> None:
    """Refuses a vocabulary that is not the model's.

    Args:
        path: the SentencePiece file.
        config: of the model.

    Raises:
        ValueError: If it is no such file, or has another number of pieces than the model embeds.
    """
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise ValueError(f"tokenizer={str(path)!r} is no file; give the SentencePiece model the checkpoint came with")
    try:
        pieces = SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"tokenizer={str(path)!r} is no SentencePiece model: {error}") from error
    if pieces != config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {pieces} pieces, but the checkpoint embeds {config.text_config.vocab_size}: "
            "it is not the one the model was trained with"
        )


def write_tokenizer(folder: Path, path: Path, config: Any) -> None:
    """Writes the tokenizer's files, and those by which sentence-transformers reads a folder with both towers.

    Args:
        folder: where.
        path: the SentencePiece file that the model was trained with.
        config: of the model.
    """
    write_sentence_transformers_files(folder)
    settings = {"model_max_length": config.text_config.max_position_embeddings, "model_input_names": ["input_ids"]}
    if is_siglip2(config):
        _write_gemma_tokenizer(folder, path, settings)
        return
    shutil.copyfile(path, folder / "spiece.model")
    settings |= {
        "tokenizer_class": "SiglipTokenizer",
        "processor_class": "SiglipProcessor",
        "do_lower_case": True,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_gemma_tokenizer(folder: Path, path: Path, settings: dict[str, Any]) -> None:
    # SigLIP 2 was trained on lowercased text that ends in <eos>, padded on the right.
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    vocabulary: Any = SentencePieceExtractor(str(path)).extract(Siglip2Tokenizer.model)
    vocabulary.pop("_spm_precompiled_charsmap")  # Gemma's text is not normalized
    tokenizer = Siglip2Tokenizer(
        **vocabulary,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        **settings,
    )
    tokenizer.save_pretrained(folder)
    shutil.copyfile(path, folder / "tokenizer.model")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
