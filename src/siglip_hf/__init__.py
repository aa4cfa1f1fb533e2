"""SigLIP and SigLIP 2 for transformers: import it, and AutoModel, AutoProcessor and pipeline use its classes.

Names are resolved on first use, so that the import itself stays cheap (see `registration`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_hf._version import __version__
from siglip_hf.registration import register

# Public name -> module that defines it.
_MODULES = {
    "PRESETS": "configuration_siglip",
    "SiglipConfig": "configuration_siglip",
    "SiglipTextConfig": "configuration_siglip",
    "SiglipVisionConfig": "configuration_siglip",
    "SiglipForImageClassification": "modeling_siglip",
    "SiglipModel": "modeling_siglip",
    "SiglipPreTrainedModel": "modeling_siglip",
    "SiglipTextModel": "modeling_siglip",
    "SiglipVisionModel": "modeling_siglip",
    "SiglipImageProcessor": "image_processing_siglip",
    "SiglipImageProcessorFast": "image_processing_siglip_fast",
    "SiglipProcessor": "processing_siglip",
    "NAFLEX_PRESETS": "configuration_siglip2",
    "Siglip2Config": "configuration_siglip2",
    "Siglip2TextConfig": "configuration_siglip2",
    "Siglip2VisionConfig": "configuration_siglip2",
    "Siglip2ForImageClassification": "modeling_siglip2",
    "Siglip2Model": "modeling_siglip2",
    "Siglip2PreTrainedModel": "modeling_siglip2",
    "Siglip2TextModel": "modeling_siglip2",
    "Siglip2VisionModel": "modeling_siglip2",
    "Siglip2ImageProcessor": "image_processing_siglip2",
    "Siglip2ImageProcessorFast": "image_processing_siglip2_fast",
    "Siglip2Processor": "processing_siglip2",
    "Siglip2Tokenizer": "tokenization_siglip2",
    "SiglipTokenizer": "tokenization_siglip",
    "SiglipTokenizerFast": "tokenization_siglip_fast",
    "SiglipEmbedder": "search.embedder",
    "canonicalize_text": "text_cleaning",
    "sigmoid_loss": "loss",
    "optimize": "optimization",
    "SearchIndex": "search.query",
    "pooling_attention": "pooling_map",
}

__all__ = ["__version__", "default_checkpoint", "naflex_checkpoint", *_MODULES]

if TYPE_CHECKING:
    from siglip_hf.configuration_siglip import PRESETS as PRESETS
    from siglip_hf.configuration_siglip import SiglipConfig as SiglipConfig
    from siglip_hf.configuration_siglip import SiglipTextConfig as SiglipTextConfig
    from siglip_hf.configuration_siglip import SiglipVisionConfig as SiglipVisionConfig
    from siglip_hf.configuration_siglip2 import NAFLEX_PRESETS as NAFLEX_PRESETS
    from siglip_hf.configuration_siglip2 import Siglip2Config as Siglip2Config
    from siglip_hf.configuration_siglip2 import Siglip2TextConfig as Siglip2TextConfig
    from siglip_hf.configuration_siglip2 import Siglip2VisionConfig as Siglip2VisionConfig
    from siglip_hf.image_processing_siglip import SiglipImageProcessor as SiglipImageProcessor
    from siglip_hf.image_processing_siglip2 import Siglip2ImageProcessor as Siglip2ImageProcessor
    from siglip_hf.image_processing_siglip2_fast import Siglip2ImageProcessorFast as Siglip2ImageProcessorFast
    from siglip_hf.image_processing_siglip_fast import SiglipImageProcessorFast as SiglipImageProcessorFast
    from siglip_hf.loss import sigmoid_loss as sigmoid_loss
    from siglip_hf.modeling_siglip import SiglipForImageClassification as SiglipForImageClassification
    from siglip_hf.modeling_siglip import SiglipModel as SiglipModel
    from siglip_hf.modeling_siglip import SiglipPreTrainedModel as SiglipPreTrainedModel
    from siglip_hf.modeling_siglip import SiglipTextModel as SiglipTextModel
    from siglip_hf.modeling_siglip import SiglipVisionModel as SiglipVisionModel
    from siglip_hf.modeling_siglip2 import Siglip2ForImageClassification as Siglip2ForImageClassification
    from siglip_hf.modeling_siglip2 import Siglip2Model as Siglip2Model
    from siglip_hf.modeling_siglip2 import Siglip2PreTrainedModel as Siglip2PreTrainedModel
    from siglip_hf.modeling_siglip2 import Siglip2TextModel as Siglip2TextModel
    from siglip_hf.modeling_siglip2 import Siglip2VisionModel as Siglip2VisionModel
    from siglip_hf.optimization import optimize as optimize
    from siglip_hf.pooling_map import pooling_attention as pooling_attention
    from siglip_hf.processing_siglip import SiglipProcessor as SiglipProcessor
    from siglip_hf.processing_siglip2 import Siglip2Processor as Siglip2Processor
    from siglip_hf.search.embedder import SiglipEmbedder as SiglipEmbedder
    from siglip_hf.search.query import SearchIndex as SearchIndex
    from siglip_hf.text_cleaning import canonicalize_text as canonicalize_text
    from siglip_hf.tokenization_siglip import SiglipTokenizer as SiglipTokenizer
    from siglip_hf.tokenization_siglip2 import Siglip2Tokenizer as Siglip2Tokenizer
    from siglip_hf.tokenization_siglip_fast import SiglipTokenizerFast as SiglipTokenizerFast


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def default_checkpoint() -> str:
    """Returns the folder of the embedded checkpoint, a small SigLIP trained by this package's own code.

    It holds all files of a hub repository, so the path serves as a model name: `AutoModel.from_pretrained(path)`.
    """
    return str(Path(__file__).parent / "checkpoints" / "siglip-hf-pictures-64")


def naflex_checkpoint() -> str:
    """Returns the folder of the embedded NaFlex checkpoint: SigLIP 2 for pictures of any aspect ratio, as small."""
    return str(Path(__file__).parent / "checkpoints" / "siglip-hf-pictures-naflex")


register()
