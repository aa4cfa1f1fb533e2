"""What keeps a quantized SigLIP loadable, usable and savable, where a quantization library would not.

The quantizers themselves are transformers' (bitsandbytes, torchao, ...); `weight_conversion` feeds them.
"""

from __future__ import annotations

import json

from torch import nn
from transformers.core_model_loading import WeightTransform


def drop_undotted_names(metadata: dict[str, str]) -> None:
    """Takes `logit_scale` and `logit_bias` out of the list of tensors that a torchao checkpoint keeps in its metadata.

    torchao splits every name of that list at its last dot to find the layer, so these two, which belong to none, make
    any saved `SiglipModel` unloadable. They are ordinary tensors, and torchao has nothing to rebuild for them.

    Args:
        metadata: Metadata of the safetensors files; changed in place, and only where it is torchao's.
    """
    if "tensor_names" in metadata:
        names = json.loads(metadata["tensor_names"])
        metadata["tensor_names"] = json.dumps([name for name in names if "." in name])


def is_reversible(conversion: WeightTransform) -> bool:
    """Whether saving can undo a conversion. What a quantizer does on loading stays done: it is saved as it is."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def keep_4bit_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16 when they are first used.

    The packed layout is faster for few tokens, but it takes no layer whose rows are not a multiple of 32 or whose
    columns are not one of 64 (the MLP of so400m has 4304), and it rounds the weights' scales to bfloat16, in the model
    and in whatever is saved from it later, where they end up in the wrong order (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
