"""SigLIP and SigLIP 2 for transformers: import it, and AutoModel, AutoProcessor and pipeline use its classes.

Names are resolved on first use, so that the import itself stays cheap (see `registration`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_hf._moved import keep_old_paths
from siglip_hf._version import __version__
from siglip_hf.registration import register

# Public name -> module that defines it.
_MODULES = {
    "PRESETS": "models.configuration_siglip",
    "SiglipConfig": "models.configuration_siglip",
    "SiglipTextConfig": "models.configuration_siglip",
    "SiglipVisionConfig": "models.configuration_siglip",
    "SiglipForImageClassification": "models.modeling_siglip",
    "SiglipModel": "models.modeling_siglip",
    "SiglipPreTrainedModel": "models.modeling_siglip",
    "SiglipTextModel": "models.modeling_siglip",
    "SiglipVisionModel": "models.modeling_siglip",
    "SiglipImageProcessor": "preprocessing.image_processing_siglip",
    "SiglipImageProcessorPil": "preprocessing.image_processing_siglip",
    "SiglipImageProcessorFast": "preprocessing.image_processing_siglip_fast",
    "SiglipProcessor": "preprocessing.processing_siglip",
    "NAFLEX_PRESETS": "models.configuration_siglip2",
    "Siglip2Config": "models.configuration_siglip2",
    "Siglip2TextConfig": "models.configuration_siglip2",
    "Siglip2VisionConfig": "models.configuration_siglip2",
    "Siglip2ForImageClassification": "models.modeling_siglip2",
    "Siglip2Model": "models.modeling_siglip2",
    "Siglip2PreTrainedModel": "models.modeling_siglip2",
    "Siglip2TextModel": "models.modeling_siglip2",
    "Siglip2VisionModel": "models.modeling_siglip2",
    "Siglip2ImageProcessor": "preprocessing.image_processing_siglip2",
    "Siglip2ImageProcessorPil": "preprocessing.image_processing_siglip2",
    "Siglip2ImageProcessorFast": "preprocessing.image_processing_siglip2_fast",
    "Siglip2Processor": "preprocessing.processing_siglip2",
    "Siglip2Tokenizer": "preprocessing.tokenization_siglip2",
    "SiglipTokenizer": "preprocessing.tokenization_siglip",
    "SiglipTokenizerFast": "preprocessing.tokenization_siglip_fast",
    "SiglipEmbedder": "data.embedder",
    "canonicalize_text": "preprocessing.text_cleaning",
    "sigmoid_loss": "losses.sigmoid",
    "optimize": "inference.optimize.optimization",
    "SearchIndex": "search.query",
    "pooling_attention": "inference.pooling_map",
    "verify": "evaluation.verify",
}

__all__ = ["__version__", "default_checkpoint", "naflex_checkpoint", *_MODULES]

if TYPE_CHECKING:
    from siglip_hf.data.embedder import SiglipEmbedder as SiglipEmbedder
    from siglip_hf.evaluation.verify import verify as verify
    from siglip_hf.inference.optimize.optimization import optimize as optimize
    from siglip_hf.inference.pooling_map import pooling_attention as pooling_attention
    from siglip_hf.losses.sigmoid import sigmoid_loss as sigmoid_loss
    from siglip_hf.models.configuration_siglip import PRESETS as PRESETS
    from siglip_hf.models.configuration_siglip import SiglipConfig as SiglipConfig
    from siglip_hf.models.configuration_siglip import SiglipTextConfig as SiglipTextConfig
    from siglip_hf.models.configuration_siglip import SiglipVisionConfig as SiglipVisionConfig
    from siglip_hf.models.configuration_siglip2 import NAFLEX_PRESETS as NAFLEX_PRESETS
    from siglip_hf.models.configuration_siglip2 import Siglip2Config as Siglip2Config
    from siglip_hf.models.configuration_siglip2 import Siglip2TextConfig as Siglip2TextConfig
    from siglip_hf.models.configuration_siglip2 import Siglip2VisionConfig as Siglip2VisionConfig
    from siglip_hf.models.modeling_siglip import SiglipForImageClassification as SiglipForImageClassification
    from siglip_hf.models.modeling_siglip import SiglipModel as SiglipModel
    from siglip_hf.models.modeling_siglip import SiglipPreTrainedModel as SiglipPreTrainedModel
    from siglip_hf.models.modeling_siglip import SiglipTextModel as SiglipTextModel
    from siglip_hf.models.modeling_siglip import SiglipVisionModel as SiglipVisionModel
    from siglip_hf.models.modeling_siglip2 import Siglip2ForImageClassification as Siglip2ForImageClassification
    from siglip_hf.models.modeling_siglip2 import Siglip2Model as Siglip2Model
    from siglip_hf.models.modeling_siglip2 import Siglip2PreTrainedModel as Siglip2PreTrainedModel
    from siglip_hf.models.modeling_siglip2 import Siglip2TextModel as Siglip2TextModel
    from siglip_hf.models.modeling_siglip2 import Siglip2VisionModel as Siglip2VisionModel
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor as SiglipImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessorPil as SiglipImageProcessorPil
    from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessor as Siglip2ImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessorPil as Siglip2ImageProcessorPil
    from siglip_hf.preprocessing.image_processing_siglip2_fast import (
        Siglip2ImageProcessorFast as Siglip2ImageProcessorFast,
    )
    from siglip_hf.preprocessing.image_processing_siglip_fast import (
        SiglipImageProcessorFast as SiglipImageProcessorFast,
    )
    from siglip_hf.preprocessing.processing_siglip import SiglipProcessor as SiglipProcessor
    from siglip_hf.preprocessing.processing_siglip2 import Siglip2Processor as Siglip2Processor
    from siglip_hf.preprocessing.text_cleaning import canonicalize_text as canonicalize_text
    from siglip_hf.preprocessing.tokenization_siglip import SiglipTokenizer as SiglipTokenizer
    from siglip_hf.preprocessing.tokenization_siglip2 import Siglip2Tokenizer as Siglip2Tokenizer
    from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast as SiglipTokenizerFast
    from siglip_hf.search.query import SearchIndex as SearchIndex


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


keep_old_paths(__name__)
register()
