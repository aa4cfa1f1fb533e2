"""What PEFT is told about SigLIP: the layers to adapt by default, and what it cannot train.

`registration` hands these to PEFT in the moment it is imported.
"""

from __future__ import annotations

from typing import Any

# The projections of every block's self-attention, by the ends of their names. Without the pooling head, so that the
# same list suits models that do not run it: image classifiers and vision-language models.
DEFAULT_TARGET_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


def refuse_parameters(model: Any, modules_to_save: list[str] | None) -> None:
    """Checks PEFT's `modules_to_save`, which ignores names of parameters without a word.

    Args:
        model: The model that gets the adapter; only SigLIP models are checked.
        modules_to_save: The names, or None.

    Raises:
        ValueError: If a name is that of a parameter of the model, as `"logit_scale"` is; the message says what to do.
    """
    if not type(model).__module__.startswith("siglip_hf."):
        return
    parameters = [name for name in modules_to_save or () if name in model._parameters]
    if parameters:
        first = parameters[0]
        raise ValueError(
            f"modules_to_save={modules_to_save} should name modules, but {parameters} of {type(model).__name__} are "
            "parameters, which PEFT would leave frozen. Leave them out; after get_peft_model, call "
            f"model.get_base_model().{first}.requires_grad_(True) to train them, and save them with the whole model, "
            "model.merge_and_unload().save_pretrained(folder), since an adapter file holds no such parameters"
        )
