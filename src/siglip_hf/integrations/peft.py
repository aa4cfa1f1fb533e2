"""LoRA by PEFT: the configuration for a SigLIP model, and what PEFT cannot train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from siglip_hf.models.adapters import DEFAULT_TARGET_MODULES

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: Any, **options: Any) -> LoraConfig:
    """Makes PEFT's `LoraConfig` for a SigLIP model, and checks what PEFT would pass over in silence.

    Args:
        model: The model that gets the adapters, of any SigLIP class.
        **options: Arguments of `peft.LoraConfig`. `target_modules` are by default the query, key, value and output
            projections of all blocks.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If `modules_to_save` names a parameter, as `"logit_scale"` is, or a module that the model does not
            have. PEFT would leave both frozen.

    Examples:
        >>> import peft
        >>> import siglip_hf
        >>> model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint())
        >>> model = peft.get_peft_model(model, siglip_hf.lora_config(model, r=8))
        >>> model.get_nb_trainable_parameters()[0]
        122880
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('LoRA needs PEFT: pip install "siglip-hf[train]"') from error
    _check_modules_to_save(model, options.get("modules_to_save"))
    return LoraConfig(**{"target_modules": list(DEFAULT_TARGET_MODULES)} | options)


def _check_modules_to_save(model: Any, modules_to_save: list[str] | None) -> None:
    parameters = [name for name in modules_to_save or () if name in model._parameters]
    if parameters:
        raise ValueError(
            f"modules_to_save={modules_to_save} should name modules, but {parameters} of {type(model).__name__} are "
            "parameters, which PEFT would leave frozen. Leave them out; after get_peft_model, call "
            f"model.get_base_model().{parameters[0]}.requires_grad_(True) to train them, and save them with the whole "
            "model, model.merge_and_unload().save_pretrained(folder), since an adapter file holds no such parameters"
        )
    modules = [name for name, _ in model.named_modules()]
    unknown = [n for n in modules_to_save or () if not any(f".{module}".endswith(f".{n}") for module in modules)]
    if unknown:
        raise ValueError(f"modules_to_save={modules_to_save}: {type(model).__name__} has no module {unknown[0]!r}")
