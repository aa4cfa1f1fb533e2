"""Makes transformers use this package's classes for SigLIP: the only module that touches its registries.

`import transformers` is lazy: the modules that hold the registries come with torch and cost seconds. So nothing is
imported here for registration's sake. A registry that is already loaded is filled at once, the others in the moment
transformers itself loads them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."


def _register_configs(module: Any) -> None:
    from siglip_hf.models import configuration_siglip as first
    from siglip_hf.models import configuration_siglip2 as second

    for config_class in (
        first.SiglipConfig,
        first.SiglipTextConfig,
        first.SiglipVisionConfig,
        second.Siglip2Config,
        second.Siglip2TextConfig,
        second.Siglip2VisionConfig,
    ):
        module.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models(module: Any) -> None:
    from siglip_hf.models import modeling_siglip as first
    from siglip_hf.models import modeling_siglip2 as second

    for joint, text, vision, classifier in (
        (first.SiglipModel, first.SiglipTextModel, first.SiglipVisionModel, first.SiglipForImageClassification),
        (second.Siglip2Model, second.Siglip2TextModel, second.Siglip2VisionModel, second.Siglip2ForImageClassification),
    ):
        for mapping, model_class in (
            (module.MODEL_MAPPING, joint),
            (module.MODEL_MAPPING, text),
            (module.MODEL_MAPPING, vision),
            (module.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING, joint),
            (module.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, classifier),
        ):
            mapping.register(model_class.config_class, model_class, exist_ok=True)
        # The classifier also takes a vision-only configuration.
        module.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(vision.config_class, classifier, exist_ok=True)


def _register_tokenizers(module: Any) -> None:
    from siglip_hf.models.configuration_siglip import SiglipConfig, SiglipTextConfig
    from siglip_hf.models.configuration_siglip2 import Siglip2Config, Siglip2TextConfig
    from siglip_hf.preprocessing.tokenization_siglip import SiglipTokenizer
    from siglip_hf.preprocessing.tokenization_siglip2 import Siglip2Tokenizer, SiglipTokenizerOfFolder
    from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast

    slow_and_fast = {"slow_tokenizer_class": SiglipTokenizer, "fast_tokenizer_class": SiglipTokenizerFast}
    for config_class in (SiglipConfig, SiglipTextConfig):
        module.AutoTokenizer.register(config_class, **slow_and_fast, exist_ok=True)
    for config_class in (Siglip2Config, Siglip2TextConfig):
        module.AutoTokenizer.register(config_class, tokenizer_class=Siglip2Tokenizer, exist_ok=True)
    # Folders of SigLIP 2 at fixed resolution have model_type "siglip", and "GemmaTokenizer" for a class, which has to
    # go on meaning Gemma's for Gemma models. So for SigLIP's model types transformers is told to distrust that name
    # and to use the type's own class; what it gets under that class's name looks into the folder.
    module.REGISTERED_FAST_ALIASES["SiglipTokenizer"] = SiglipTokenizerOfFolder
    for model_type, name in (
        ("siglip", "SiglipTokenizer"),
        ("siglip_text_model", "SiglipTokenizer"),
        ("siglip2", "Siglip2Tokenizer"),
        ("siglip2_text_model", "Siglip2Tokenizer"),
    ):
        module.TOKENIZER_MAPPING_NAMES.setdefault(model_type, name)
        module.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)


def _register_image_processors(module: Any) -> None:
    from siglip_hf.models.configuration_siglip import SiglipConfig, SiglipVisionConfig
    from siglip_hf.models.configuration_siglip2 import Siglip2Config, Siglip2VisionConfig
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2 import Siglip2ImageProcessor
    from siglip_hf.preprocessing.image_processing_siglip2_fast import Siglip2ImageProcessorFast
    from siglip_hf.preprocessing.image_processing_siglip_fast import SiglipImageProcessorFast

    for config_class, slow, fast in (
        (SiglipConfig, SiglipImageProcessor, SiglipImageProcessorFast),
        (SiglipVisionConfig, SiglipImageProcessor, SiglipImageProcessorFast),
        (Siglip2Config, Siglip2ImageProcessor, Siglip2ImageProcessorFast),
        (Siglip2VisionConfig, Siglip2ImageProcessor, Siglip2ImageProcessorFast),
    ):
        # transformers calls its fast backend "torchvision"; ours needs torch alone. `AutoImageProcessor.register`
        # would first load what it replaces, and warn that this needs torchvision.
        module.IMAGE_PROCESSOR_MAPPING.register(config_class, {"pil": slow, "torchvision": fast}, exist_ok=True)


def _register_processors(module: Any) -> None:
    from siglip_hf.models.configuration_siglip import SiglipConfig
    from siglip_hf.models.configuration_siglip2 import Siglip2Config
    from siglip_hf.preprocessing.processing_siglip import SiglipProcessor
    from siglip_hf.preprocessing.processing_siglip2 import Siglip2Processor

    for config_class, processor_class in ((SiglipConfig, SiglipProcessor), (Siglip2Config, Siglip2Processor)):
        # A class named in processor_config.json is looked up among the built-in names first, and only then among the
        # registered classes; so the built-in name has to go for ours to be found.
        module.PROCESSOR_MAPPING_NAMES.pop(config_class.model_type, None)
        module.AutoProcessor.register(config_class, processor_class, exist_ok=True)


def _register_pipelines(module: Any) -> None:
    task = module.PIPELINE_REGISTRY.supported_tasks["zero-shot-image-classification"]
    if isinstance(task["impl"], str):
        # A dotted path: transformers imports it when a pipeline of this task is made.
        task["impl"] = "siglip_hf.inference.pipeline.SiglipZeroShotImageClassificationPipeline"
    else:
        from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline

        task["impl"] = SiglipZeroShotImageClassificationPipeline


def _register_lora_targets(module: Any) -> None:
    from siglip_hf.integrations.peft import DEFAULT_TARGET_MODULES

    lora = dict(module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    for name, mapping in vars(module).items():
        # Many other methods of PEFT start from a copy of LoRA's table.
        if name.endswith("_TARGET_MODULES_MAPPING") and mapping == lora:
            for family in ("siglip", "siglip2"):
                for model_type in (family, f"{family}_text_model", f"{family}_vision_model"):
                    mapping.setdefault(model_type, list(DEFAULT_TARGET_MODULES))


def _register_lora_check(module: Any) -> None:
    from siglip_hf.integrations.peft import refuse_parameters

    train_and_save = module.set_additional_trainable_modules

    @functools.wraps(train_and_save)
    def checked(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_parameters(model, getattr(peft_config, "modules_to_save", None))
        return train_and_save(model, peft_config, *args, **kwargs)

    module.set_additional_trainable_modules = checked


_REGISTRARS: dict[str, Callable[[Any], None]] = {
    f"{_AUTO}configuration_auto": _register_configs,
    f"{_AUTO}modeling_auto": _register_models,
    f"{_AUTO}tokenization_auto": _register_tokenizers,
    f"{_AUTO}image_processing_auto": _register_image_processors,
    f"{_AUTO}processing_auto": _register_processors,
    "transformers.pipelines": _register_pipelines,
    "peft.utils.constants": _register_lora_targets,
    "peft.tuners.tuners_utils": _register_lora_check,
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Runs a registrar once its registry is loaded.

    The registrars import this package's modules, and those import transformers'. Registries are loaded from within
    both, half way through. So a registrar waits until the outermost of these imports is done.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(("transformers.", "siglip_hf.", "peft.")):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(  # type: ignore[method-assign]
                self._exec_module, fullname, spec.loader.exec_module
            )
        return spec

    def _exec_module(self, fullname: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        thread = self._thread
        thread.depth = getattr(thread, "depth", 0) + 1
        try:
            execute(module)
        finally:
            thread.depth -= 1
        if fullname in _REGISTRARS:
            thread.waiting = [*getattr(thread, "waiting", []), fullname]
        while thread.depth == 0 and getattr(thread, "waiting", []):
            name = thread.waiting.pop(0)
            _REGISTRARS[name](sys.modules[name])


def register() -> None:
    """Registers every class of this package with transformers. Idempotent and cheap; `import siglip_hf` calls it."""
    if any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _RegisterAfterImport())
    for name, registrar in _REGISTRARS.items():
        if name in sys.modules:
            registrar(sys.modules[name])


def register_weight_conversions() -> None:
    """Registers how tensors of published checkpoints become this package's parameters, and back on saving.

    Called by `modeling_siglip` on import. The two conversions hang on submodules whose class names are this package's
    own, so that stock models in the same process load as before.
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    from siglip_hf.models.weight_conversion import ProjectionsConverter, ResizePositions, SplitProjections

    register_mapping = conversion_mapping.register_checkpoint_conversion_mapping
    register_mapping(
        "SiglipAttentionPoolingHead",
        [
            ProjectionsConverter(
                f"attention.in_proj_{kind}",
                [f"attention.{projection}_proj.{kind}" for projection in "qkv"],
                operations=[SplitProjections(dim=0)],
            )
            for kind in ("weight", "bias")
        ],
        overwrite=True,
    )
    register_mapping(
        "SiglipVisionEmbeddings",
        [WeightConverter("position_embedding.weight", "position_embedding.weight", operations=[ResizePositions()])],
        overwrite=True,
    )
    # The towers' own mappings (a "vision_model." prefix that may be there or not) stay transformers'; registering
    # them anew only tells it that they hold for classes outside of transformers too.
    for tower in ("SiglipTextModel", "SiglipVisionModel"):
        register_mapping(tower, conversion_mapping.get_checkpoint_conversion_mapping(tower), overwrite=True)


def register_siglip2_weight_conversions() -> None:
    """As `register_weight_conversions`, for the classes of `modeling_siglip2`, which calls it on import."""
    from transformers import conversion_mapping

    for name, like in (
        ("Siglip2AttentionPoolingHead", "SiglipAttentionPoolingHead"),
        ("Siglip2TextModel", "Siglip2TextModel"),
        ("Siglip2VisionModel", "Siglip2VisionModel"),
    ):
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(like)
        conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
