"""Module paths of version 0.1, kept for one release: each old path gives the names of the module that it became.

Delete this file, and the line in `__init__.py` that uses it, with version 0.3.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# Old path -> new path, below `siglip_hf`.
MOVED = {
    "checkpoint_kind": "models.checkpoint_kind",
    "classify": "inference.classify",
    "configuration_siglip": "models.configuration_siglip",
    "configuration_siglip2": "models.configuration_siglip2",
    "confusion_picture": "evaluation.confusion_picture",
    "evaluation.measures": "evaluation",
    "contact_sheet": "inference.contact_sheet",
    "convert_big_vision": "integrations.big_vision",
    "export": "integrations.onnx",
    "image_intake": "preprocessing.image_intake",
    "image_processing_siglip": "preprocessing.image_processing_siglip",
    "image_processing_siglip2": "preprocessing.image_processing_siglip2",
    "image_processing_siglip2_fast": "preprocessing.image_processing_siglip2_fast",
    "image_processing_siglip_fast": "preprocessing.image_processing_siglip_fast",
    "image_tensors": "preprocessing.image_tensors",
    "label_bank": "inference.label_bank",
    "layers": "models.layers",
    "lora": "integrations.peft",
    "loss": "losses.sigmoid",
    "loss_ring": "losses.ring",
    "modeling_outputs": "models.outputs",
    "modeling_siglip": "models.modeling_siglip",
    "modeling_siglip2": "models.modeling_siglip2",
    "naflex": "models.naflex",
    "optimization": "inference.optimize.optimization",
    "output_folder": "files",
    "packed": "inference.optimize.packed",
    "pillow_memory": "preprocessing.pillow_memory",
    "pipeline_zero_shot": "inference.pipeline",
    "pooling_map": "inference.pooling_map",
    "prefetch": "parallel",
    "processing_siglip": "preprocessing.processing_siglip",
    "processing_siglip2": "preprocessing.processing_siglip2",
    "prompt_templates": "inference.prompt_templates",
    "quantization": "models.quantization",
    "search.embed": "data.embed",
    "search.embedder": "data.embedder",
    "search.faiss_kinds": "search.kinds",
    "search.index_build": "search.build",
    "search.ray_engine": "data.ray_engine",
    "search.store": "data.store",
    "sources": "data.sources",
    "text_cleaning": "preprocessing.text_cleaning",
    "threads": "parallel",
    "tokenization_siglip": "preprocessing.tokenization_siglip",
    "tokenization_siglip2": "preprocessing.tokenization_siglip2",
    "tokenization_siglip_fast": "preprocessing.tokenization_siglip_fast",
    "weight_conversion": "models.weight_conversion",
}


class _MovedModule(ModuleType):
    """Stands under an old path; the new module is imported when a name is taken from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by tools that look through `sys.modules`
            raise AttributeError(name)
        package, _, old = self.__name__.partition(".")
        new = f"{package}.{MOVED[old]}"
        warnings.warn(f"{self.__name__} has moved to {new}.", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)


def keep_old_paths(package: str) -> None:
    """Lets `import PACKAGE.old_path` go on working. Idempotent; imports nothing."""
    for old in MOVED:
        name = f"{package}.{old}"
        module = sys.modules.setdefault(name, _MovedModule(name, f"Moved to {package}.{MOVED[old]}."))
        if "." not in old and old not in sys.modules[package].__all__:  # a function has the name of its old module
            setattr(sys.modules[package], old, module)
