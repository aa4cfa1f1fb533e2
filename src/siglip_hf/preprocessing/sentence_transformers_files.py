"""Files with which `SentenceTransformer(folder)` of sentence-transformers gives our embeddings of texts and pictures.

They name classes of that package only, so that a folder works there without this package as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_MODULES = "sentence_transformers.base.modules"
_FEATURES = {
    kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
}
_FILES: dict[str, Any] = {
    # The towers' embeddings, and then length 1, as of `encode_text` and `encode_image`.
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{_MODULES}.normalize.Normalize"},
    ],
    "1_Normalize/config.json": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": _FEATURES,
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def write_sentence_transformers_files(folder: str | os.PathLike[str]) -> None:
    """Writes what `SentenceTransformer(folder)` reads, unless the folder says already how it is made.

    Args:
        folder: The folder of a checkpoint, with both towers and the processor.
    """
    folder = Path(folder)
    if (folder / "modules.json").exists():
        return
    for name, content in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
