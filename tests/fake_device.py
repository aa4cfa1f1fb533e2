"""Runs the public paths on an accelerator that does not exist: shapes, dtypes and devices, without numbers.

PyTorch's fake tensors refuse to mix devices and to read values. Its CPU build cannot make fake CUDA tensors (a view
asks for CUDA), but an accelerator defined in Python takes all the same ways. The definition lasts as long as the
process, so this is a script: it prints one line of JSON for each path.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.backend_registration
from torch._subclasses.fake_tensor import FakeTensorMode

import siglip_hf
import tiny
import tiny_siglip2

DEVICE = "gpu:0"
MODE = FakeTensorMode()


def model(name: str, config: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model on the device."""
    with torch.device("meta"):
        made = getattr(siglip_hf, name)._from_config(config, **settings)
    with MODE:
        for part in made.modules():
            for key, value in part._parameters.items():
                part._parameters[key] = torch.nn.Parameter(torch.empty(value.shape, dtype=dtype, device=DEVICE))
            for key, value in part._buffers.items():
                part._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
    return made.eval()


def there(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of the same shapes on the device."""
    return {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=DEVICE)
        for name, value in inputs.items()
    }


def backward(loss: torch.Tensor, parameters: Any) -> torch.Tensor:
    """The loss, once every gradient is found on its parameter's device and in its dtype."""
    loss.backward()
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        assert (gradient.device, gradient.dtype, gradient.shape) == (parameter.device, parameter.dtype, parameter.shape)
    return loss


def used(made: Any) -> list[torch.nn.Parameter]:
    """The parameters of a classifier but those of the pooling head, whose place the mean takes."""
    return [parameter for name, parameter in made.named_parameters() if ".head." not in name]


def siglip(dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    return model("SiglipModel", tiny.tiny_config(), dtype, **settings), there(tiny.tiny_inputs(), dtype)


def siglip2(dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    return model("Siglip2Model", tiny_siglip2.tiny_config(), dtype), there(tiny_siglip2.tiny_pictures(), dtype)


def joint(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip(dtype)
    return made(**inputs).logits_per_image


def joint_loss(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip(dtype)
    pairs = {name: value[:2] for name, value in inputs.items()}
    return backward(made(**pairs, return_loss=True).loss, made.parameters())


def encode_image(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip(dtype)
    with torch.no_grad():
        return made.encode_image(inputs["pixel_values"])


def encode_text(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip(dtype)
    with torch.no_grad():
        return made.encode_text(inputs["input_ids"])


def attention_weights(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip(dtype, attn_implementation="eager")
    return made.vision_model(inputs["pixel_values"], output_attentions=True).attentions[-1]


def larger_pictures(dtype: torch.dtype) -> torch.Tensor:
    made, _ = siglip(dtype)
    pixels = torch.empty(2, 3, 64, 48, dtype=dtype, device=DEVICE)
    return made.vision_model(pixels, interpolate_pos_encoding=True).pooler_output


def naflex(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip2(dtype)
    with torch.no_grad():
        return made.encode_image(**inputs, packed=False)


def naflex_gradients(dtype: torch.dtype) -> torch.Tensor:
    made, inputs = siglip2(dtype)
    tower = made.vision_model
    return backward(made.get_image_features(**inputs).pooler_output.sum(), tower.parameters())


def classifier(dtype: torch.dtype) -> torch.Tensor:
    made = model("SiglipForImageClassification", tiny.tiny_config(num_labels=3), dtype)
    labels = torch.empty(3, dtype=torch.long, device=DEVICE)
    return backward(made(there(tiny.tiny_inputs(), dtype)["pixel_values"], labels=labels).loss, used(made))


def classifier2(dtype: torch.dtype) -> torch.Tensor:
    made = model("Siglip2ForImageClassification", tiny_siglip2.tiny_config(num_labels=3), dtype)
    inputs = there(tiny_siglip2.tiny_pictures(), dtype)
    labels = torch.empty(len(inputs["pixel_values"]), dtype=torch.long, device=DEVICE)
    return backward(made(**inputs, labels=labels).loss, used(made))


def loss(dtype: torch.dtype) -> torch.Tensor:
    images, texts = (torch.empty(8, 16, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2))
    scale, bias = (torch.empty(1, device=DEVICE, requires_grad=True) for _ in range(2))
    return backward(siglip_hf.sigmoid_loss(images, texts, scale, bias), (images, texts, scale, bias))


PATHS: list[Callable[[torch.dtype], torch.Tensor]] = [
    joint,
    joint_loss,
    encode_image,
    encode_text,
    attention_weights,
    larger_pictures,
    naflex,
    naflex_gradients,
    classifier,
    classifier2,
    loss,
]


def main() -> None:
    """Runs every path in two dtypes."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
    for path in PATHS:
        for dtype in (torch.float32, torch.bfloat16):
            with MODE:
                try:
                    result: Any = path(dtype)
                    told = {"device": str(result.device), "dtype": str(result.dtype), "shape": list(result.shape)}
                except Exception as error:  # told in the line, and fails the test of this path
                    told = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"path": path.__name__, "asked": str(dtype), **told}))


if __name__ == "__main__":
    sys.exit(main())
