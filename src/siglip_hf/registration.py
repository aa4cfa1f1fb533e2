"""Makes transformers use this package's classes for SigLIP: one table of classes, and public calls that register them.

`import siglip_hf` calls `register`. The few tables of transformers that no public call reaches are in `private_tables`.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from siglip_hf.private_tables import fill_private_tables


@functools.cache
def register() -> None:
    """Registers every class of this package with transformers. Idempotent; a call that failed may be repeated.

    It imports torch, transformers and this package's classes. So the command line, which imports the package without
    registering, calls it only where it is about to load a model.
    """
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
        AutoTokenizer,
        conversion_mapping,
    )

    from siglip_hf.models import configuration_siglip as first
    from siglip_hf.models import configuration_siglip2 as second
    from siglip_hf.models import modeling_siglip as fixed
    from siglip_hf.models import modeling_siglip2 as naflex
    from siglip_hf.models.adapters import add_lora_targets
    from siglip_hf.models.weight_conversion import WEIGHT_CONVERSIONS
    from siglip_hf.preprocessing.processing_siglip import SiglipProcessor
    from siglip_hf.preprocessing.processing_siglip2 import Siglip2Processor
    from siglip_hf.preprocessing.tokenization_siglip import SiglipTokenizer
    from siglip_hf.preprocessing.tokenization_siglip2 import Siglip2Tokenizer, SiglipTokenizerOfFolder
    from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast

    # Configuration -> model, processor (of the joint models), image classifier.
    table: tuple[tuple[type, type, type | None, type | None], ...] = (
        (first.SiglipConfig, fixed.SiglipModel, SiglipProcessor, fixed.SiglipForImageClassification),
        (first.SiglipTextConfig, fixed.SiglipTextModel, None, None),
        (first.SiglipVisionConfig, fixed.SiglipVisionModel, None, fixed.SiglipForImageClassification),
        (second.Siglip2Config, naflex.Siglip2Model, Siglip2Processor, naflex.Siglip2ForImageClassification),
        (second.Siglip2TextConfig, naflex.Siglip2TextModel, None, None),
        (second.Siglip2VisionConfig, naflex.Siglip2VisionModel, None, naflex.Siglip2ForImageClassification),
    )
    for config_class, model_class, processor_class, classifier_class in table:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]
        AutoModel.register(config_class, model_class, exist_ok=True)
        if processor_class is not None:
            AutoModelForZeroShotImageClassification.register(config_class, model_class, exist_ok=True)
            AutoProcessor.register(config_class, processor_class, exist_ok=True)
        if classifier_class is not None:
            # Not through AutoModelForImageClassification, which takes one configuration for a model; the classifier
            # has two, since a vision tower alone will do.
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(config_class, cast(Any, classifier_class), exist_ok=True)

    for config_class in (first.SiglipConfig, first.SiglipTextConfig):
        # The first call makes the class known by its name. After the second, a call for "SiglipTokenizer" gets
        # what looks into the folder: checkpoints of model_type "siglip" have SigLIP's vocabulary or SigLIP 2's.
        AutoTokenizer.register(config_class, tokenizer_class=SiglipTokenizerFast, exist_ok=True)
        AutoTokenizer.register(
            config_class,
            slow_tokenizer_class=SiglipTokenizer,
            fast_tokenizer_class=SiglipTokenizerOfFolder,
            exist_ok=True,
        )
    for config_class in (second.Siglip2Config, second.Siglip2TextConfig):
        AutoTokenizer.register(config_class, tokenizer_class=Siglip2Tokenizer, exist_ok=True)

    for name, conversion in WEIGHT_CONVERSIONS.items():
        conversion_mapping.register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    # The towers' own mappings (a "vision_model." prefix that may be there or not) stay transformers'; registering
    # them again only tells it that they hold for classes outside of transformers too.
    for name in ("SiglipTextModel", "SiglipVisionModel", "Siglip2TextModel", "Siglip2VisionModel"):
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(name)
        conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)

    fill_private_tables()
    add_lora_targets()
