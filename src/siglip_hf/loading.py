"""The one way to load a checkpoint from a name or folder: for every command, every app, and every class that needs one.

Whatever is wrong with a checkpoint ends in one `ValueError` that names it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_hf.files import first_line
from siglip_hf.registration import register

if TYPE_CHECKING:
    import torch

_CHECKPOINTS = Path(__file__).parent / "checkpoints"


def default_checkpoint() -> str:
    """Returns the folder of the embedded checkpoint, a small SigLIP trained by this package's own code.

    It holds all files of a hub repository, so the path serves as a model name: `AutoModel.from_pretrained(path)`.
    """
    return str(_CHECKPOINTS / "siglip-hf-pictures-64")


def naflex_checkpoint() -> str:
    """Returns the folder of the embedded NaFlex checkpoint: SigLIP 2 for pictures of any aspect ratio, as small."""
    return str(_CHECKPOINTS / "siglip-hf-pictures-naflex")


def load_checkpoint(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    fast_pictures: bool = False,
) -> tuple[Any, Any]:
    """Loads a SigLIP model and its processor, and checks that they can work together.

    Args:
        name: Name or folder of a checkpoint; the embedded one if None. In a folder nothing is asked of the network.
        dtype: Of the parameters; "auto" takes that of the checkpoint.
        fast_pictures: Take the image processor that computes in torch, whichever the checkpoint names.

    Returns:
        The model with both towers, on the CPU and in evaluation mode, and its processor.

    Raises:
        ValueError: If there is no such checkpoint, its files cannot be read, weights are missing or not finite, it is
            no SigLIP with two towers, or the processor is not the model's.
    """
    name = default_checkpoint() if name is None else os.fspath(name)
    model = load_model(name, dtype=dtype)
    return model, load_processor(name, model, fast_pictures=fast_pictures)


def load_model(name: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto") -> Any:
    """Loads a SigLIP model with both towers; arguments, result and errors as of `load_checkpoint`."""
    from transformers import AutoModel

    from siglip_hf.models.modeling_siglip import SiglipModel

    name = os.fspath(name)
    model, info = from_checkpoint(AutoModel, name, dtype=dtype, output_loading_info=True)
    if not isinstance(model, SiglipModel):
        raise ValueError(f"cannot load {name!r}: it is a {type(model).__name__}, not a SigLIP model with both towers.")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"cannot load {name!r}: its files lack {len(missing)} weights, {missing[0]} among them.")
    check_weights(name, model)
    return model.eval()


def load_processor(name: str | os.PathLike[str], model: Any, *, fast_pictures: bool = False) -> Any:
    """Loads the processor of a model; arguments, result and errors as of `load_checkpoint`."""
    from transformers import AutoImageProcessor, AutoProcessor

    from siglip_hf.preprocessing.processing_siglip import SiglipProcessor

    name = os.fspath(name)
    processor = from_checkpoint(AutoProcessor, name)
    if not isinstance(processor, SiglipProcessor):
        raise ValueError(f"cannot load {name!r}: it has no tokenizer or no image processor of a SigLIP model.")
    if fast_pictures:
        # transformers' name for the fast kind; this package's needs torch alone.
        processor.image_processor = from_checkpoint(AutoImageProcessor, name, backend="torchvision")
    try:
        processor.check_fits(model)
        check_pixel_scaling(processor.image_processor)
    except ValueError as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    return processor


def load_image_classifier(name: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Loads a vision tower with a classifier and its image processor, as `siglip_hf.learn` or a fine-tuning saved them.

    Args:
        name: Name or folder of the checkpoint.

    Returns:
        The `SiglipForImageClassification` or `Siglip2ForImageClassification`, on the CPU and in evaluation mode, and
        the image processor.

    Raises:
        ValueError: If there is no such checkpoint, its files cannot be read, or it is no SigLIP with a classifier.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from siglip_hf.models.modeling_siglip import SiglipForImageClassification

    name = os.fspath(name)
    model, info = from_checkpoint(AutoModelForImageClassification, name, output_loading_info=True)
    if not isinstance(model, SiglipForImageClassification) or model.num_labels < 1:
        raise ValueError(f"cannot load {name!r}: it is a {type(model).__name__}, not a SigLIP with a classifier.")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"cannot load {name!r} as a classifier: its files lack {missing[0]}; make one with `siglip-hf learn`."
        )
    check_weights(name, model)
    processor = from_checkpoint(AutoImageProcessor, name)
    try:
        check_pixel_scaling(processor)
    except ValueError as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    return model.eval(), processor


def from_checkpoint(auto_class: Any, name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Calls `from_pretrained` of an Auto class or any other, with this package's classes registered.

    Args:
        auto_class: For example `AutoConfig`.
        name: Name or folder of a checkpoint. In a folder nothing is asked of the network.
        **kwargs: As of `from_pretrained`.

    Raises:
        ValueError: If there is no such checkpoint, or its files cannot be read.
    """
    register()
    name = os.fspath(name)
    is_folder = os.path.isdir(name)
    if not is_folder:
        _refuse_missing_path(name)
    try:
        return auto_class.from_pretrained(name, local_files_only=is_folder, **kwargs)
    except Exception as error:  # damaged files raise almost anything: KeyError, SafetensorError, UnpicklingError, ...
        if isinstance(error, OSError) and not is_folder:
            raise ValueError(_not_fetched(name, error)) from error
        raise ValueError(f"cannot load {name!r}: {_reason(error)}") from error


def check_weights(name: str, model: Any) -> None:
    """Refuses weights that are NaN or infinite.

    Args:
        name: Of the checkpoint, for the error.
        model: Any, with its weights.

    Raises:
        ValueError: Naming the first such weight.
    """
    import torch

    for key, value in model.named_parameters():
        # One pass over the weights; a sum in float32 is finite if all of them are.
        if value.is_floating_point() and value.device.type != "meta" and not value.sum(dtype=torch.float32).isfinite():
            raise ValueError(
                f"cannot load {name!r}: the weight {key} is not finite (NaN or infinite), so all scores would be NaN."
            )


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1"; the first accelerator, or else the CPU, if None.

    Raises:
        ValueError: If it cannot be used here.
    """
    import torch

    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it holds no numbers")
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {first_line(error)}") from error


def _refuse_missing_path(name: str) -> None:
    """A name of the hub is `name` or `owner/name`; anything else can only be a path, and is not there."""
    if os.path.isfile(name):
        raise ValueError(f"cannot load {name!r}: it is a file; give the folder with config.json that it lies in.")
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if not is_hub_name or (os.sep in name and os.path.isdir(os.path.dirname(name))):
        raise ValueError(f"cannot load {name!r}: no such folder.")


def _not_fetched(name: str, error: OSError) -> str:
    from huggingface_hub import constants

    why = (
        "HF_HUB_OFFLINE is set, so that nothing is downloaded, and it is not among the downloaded ones"
        if constants.HF_HUB_OFFLINE
        else _reason(error)
    )
    return (
        f"cannot load {name!r}: there is no such folder, and it cannot be fetched from the Hugging Face hub ({why}). "
        "The embedded checkpoint needs no network: siglip_hf.default_checkpoint(), or no --model on the command line."
    )


def _reason(error: Exception) -> str:
    """The first line of an error; the class too where the line alone says nothing, as a KeyError's."""
    line = first_line(error)
    return line if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {line}"


def check_pixel_scaling(image_processor: Any) -> None:
    """Refuses settings of `preprocessor_config.json` that divide by zero or say nothing.

    Raises:
        ValueError: Naming the first such setting.
    """
    import numpy as np

    for setting, positive in (("image_mean", False), ("image_std", True), ("rescale_factor", True)):
        value = getattr(image_processor, setting, None)
        if value is None:
            continue
        try:
            numbers = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            numbers = np.asarray(np.nan)
        if not np.isfinite(numbers).all() or (positive and (numbers <= 0).any()):
            raise ValueError(f"{setting} of the image processor is {value!r}, where finite numbers above 0 belong")
