"""Which layers PEFT adapts by default in SigLIP models, and the tables in which PEFT looks for that."""

from __future__ import annotations

import sys

# The projections of every block's self-attention, by the ends of their names. Without the pooling head, so that the
# same list suits models that do not run it: image classifiers and vision-language models.
DEFAULT_TARGET_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


def add_lora_targets() -> None:
    """Adds SigLIP to PEFT's public tables of default layers, if PEFT has been imported; PEFT is not imported for it.

    Called when this package is imported and when a model is built, one of which comes after the import of PEFT.
    """
    constants = sys.modules.get("peft.utils.constants")
    lora = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    if not lora or "siglip2_vision_model" in lora:
        return
    before = dict(lora)
    for name, mapping in vars(constants).items():
        # Many other methods of PEFT start from a copy of LoRA's table.
        if name.endswith("_TARGET_MODULES_MAPPING") and mapping == before:
            for family in ("siglip", "siglip2"):
                for model_type in (family, f"{family}_text_model", f"{family}_vision_model"):
                    mapping.setdefault(model_type, list(DEFAULT_TARGET_MODULES))
