"""Tables of transformers that no public call reaches, each with the reason for writing to it.

A later version of transformers may move or rename any of them. What is written here is a convenience for SigLIP (the
table's `loss`), so a table that is not found costs that convenience and one warning, and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple


class PrivateTable(NamedTuple):
    """One table, how it is filled, and what is lost without it."""

    module: str
    name: str
    fill: Callable[[Any], None]
    loss: str


def _name_our_tokenizers(names: Any) -> None:
    # AutoTokenizer compares the class that a folder names with this table's, by model type, before it asks the classes
    # that `AutoTokenizer.register` knows.
    for family, name in (("siglip", "SiglipTokenizer"), ("siglip2", "Siglip2Tokenizer")):
        for model_type in (family, f"{family}_text_model"):
            names.setdefault(model_type, name)


def _distrust_the_tokenizers_of_folders(model_types: Any) -> None:
    # SigLIP 2 folders name "GemmaTokenizer", which leaves the case alone, and which has to go on meaning Gemma's for
    # Gemma models. For the model types of this set AutoTokenizer uses the type's own class instead.
    model_types.update(("siglip", "siglip_text_model", "siglip2", "siglip2_text_model"))


def _forget_stock_processors(names: Any) -> None:
    # AutoProcessor looks for the class that a folder names among the built-in names first, and only then among the
    # registered classes.
    for model_type in ("siglip", "siglip2"):
        names.pop(model_type, None)


def _add_our_image_processors(mapping: Any) -> None:
    # `AutoImageProcessor.register` would first load what it replaces, and warn that this needs torchvision.
    from siglip_hf.models.configuration_siglip import SiglipConfig, SiglipVisionConfig
    from siglip_hf.models.configuration_siglip2 import Siglip2Config, Siglip2VisionConfig
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2_fast import Siglip2ImageProcessorFast
    from siglip_hf.preprocessing.image_processing_siglip_fast import SiglipImageProcessorFast

    # transformers calls its fast backend "torchvision"; ours needs torch alone.
    # AutoImageProcessor looks for the name that a folder gives in each table and then takes the backend's class, so the
    # third entry makes the name known by which stock saves its Pillow class; nothing is loaded by it.
    fixed = {"pil": SiglipImageProcessor, "torchvision": SiglipImageProcessorFast, "name": "SiglipImageProcessorPil"}
    naflex = {
        "pil": Siglip2ImageProcessor,
        "torchvision": Siglip2ImageProcessorFast,
        "name": "Siglip2ImageProcessorPil",
    }
    for config_classes, classes in (
        ((SiglipConfig, SiglipVisionConfig), fixed),
        ((Siglip2Config, Siglip2VisionConfig), naflex),
    ):
        for config_class in config_classes:
            mapping.register(config_class, dict(classes), exist_ok=True)


# A name, not an import: the pipeline stands on models and loading, which stand on registration.
_PIPELINE = "siglip_hf.inference.pipeline.SiglipZeroShotImageClassificationPipeline"


def _use_our_pipeline(registry: Any) -> None:
    # `register_pipeline` takes the class for code that has to be saved beside a model: `save_pretrained` of a pipeline
    # would copy our source file there, and stock transformers would then refuse the folder without trust_remote_code.
    task = registry.supported_tasks["zero-shot-image-classification"]
    if isinstance(task["impl"], str):  # a dotted path, imported when a pipeline of this task is made
        task["impl"] = _PIPELINE
    else:
        task["impl"] = pkgutil.resolve_name(_PIPELINE)


_AUTO = "transformers.models.auto"
_TOKENIZERS = "AutoTokenizer gives Gemma's tokenizer for SigLIP 2, which does not lowercase; use Siglip2Tokenizer"
PRIVATE_TABLES = (
    PrivateTable(f"{_AUTO}.tokenization_auto", "TOKENIZER_MAPPING_NAMES", _name_our_tokenizers, _TOKENIZERS),
    PrivateTable(
        f"{_AUTO}.tokenization_auto",
        "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
        _distrust_the_tokenizers_of_folders,
        _TOKENIZERS,
    ),
    PrivateTable(
        f"{_AUTO}.processing_auto",
        "PROCESSOR_MAPPING_NAMES",
        _forget_stock_processors,
        "AutoProcessor may give stock's processor; use SiglipProcessor or Siglip2Processor",
    ),
    PrivateTable(
        f"{_AUTO}.image_processing_auto",
        "IMAGE_PROCESSOR_MAPPING",
        _add_our_image_processors,
        "AutoImageProcessor gives stock's image processor; use SiglipImageProcessor or Siglip2ImageProcessor",
    ),
    PrivateTable(
        "transformers.pipelines",
        "PIPELINE_REGISTRY",
        _use_our_pipeline,
        f"pipeline('zero-shot-image-classification') gives stock's pipeline; use {_PIPELINE}",
    ),
)


def fill_private_tables() -> None:
    """Fills every table; one warning names those that this version of transformers does not have in this form."""
    lost = []
    for table in PRIVATE_TABLES:
        try:
            found = getattr(importlib.import_module(table.module), table.name)
            table.fill(found)
        except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
            lost.append(f"{table.module}.{table.name} ({error!r}): {table.loss}")
    if lost:
        warnings.warn(
            "this version of transformers has changed what siglip_hf relies on. Other models are not affected. "
            + ". ".join(lost),
            UserWarning,
            stacklevel=2,
        )
