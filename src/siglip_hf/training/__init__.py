"""Training: batches larger than memory, the Trainer, locked-image tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. The Trainer imports much, so that names are resolved on first use.
_MODULES = {
    "CachedLoss": "cached",
    "cached_backward": "cached",
    "ImageStore": "locked",
    "freeze": "locked",
    "store_images": "locked",
    "PairCollator": "collator",
    "SiglipTrainer": "trainer",
    "SiglipTrainingArguments": "trainer",
}

__all__ = list(_MODULES)

if TYPE_CHECKING:
    from siglip_hf.training.cached import CachedLoss as CachedLoss
    from siglip_hf.training.cached import cached_backward as cached_backward
    from siglip_hf.training.collator import PairCollator as PairCollator
    from siglip_hf.training.locked import ImageStore as ImageStore
    from siglip_hf.training.locked import freeze as freeze
    from siglip_hf.training.locked import store_images as store_images
    from siglip_hf.training.trainer import SiglipTrainer as SiglipTrainer
    from siglip_hf.training.trainer import SiglipTrainingArguments as SiglipTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
