"""SigLIP as ONNX: one file per tower, held against PyTorch before it is kept, and the class that runs the two.

Numbers such as the picture's size travel in the files' metadata, so that a program without this package can prepare
its inputs. Exported through `torch.onnx` and its torch.export-based exporter.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from siglip_hf import extras
from siglip_hf._version import __version__
from siglip_hf.files import check_output_folder, first_line, new_folder, parse_json
from siglip_hf.loading import from_checkpoint, load_model, load_processor
from siglip_hf.models.configuration_siglip import SiglipConfig, as_pair

if TYPE_CHECKING:
    from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline

#: Lowest cosine between ONNX Runtime's embeddings and PyTorch's in float32, by the dtype of the export.
MIN_COSINE = {torch.float32: 0.9999, torch.float16: 0.999}

#: The first opset with a GELU of its own; 18 is there for older runtimes.
DEFAULT_OPSET = 20
OPSETS = range(18, 24)

_FILES = {"vision": "vision.onnx", "text": "text.onnx"}

# Pictures and texts that each tower is checked with; another number than it is traced with, so that a batch size that
# got fixed in the graph cannot pass.
_TRACED, _CHECKED = 2, 5


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        folder: Where it is.
        cosines: Lowest cosine to PyTorch in float32, by tower ("vision", "text").
        metadata: What the files say about preparing their inputs, see `export`.
    """

    folder: Path
    cosines: dict[str, float]
    metadata: dict[str, Any]


def export_onnx(
    model: Any,
    output_folder: str | os.PathLike[str],
    *,
    processor: Any = None,
    dtype: torch.dtype | str = torch.float32,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> Exported:
    """Writes `vision.onnx` (pixels to embeddings) and `text.onnx` (token ids to embeddings), for any batch size.

    `vision.onnx` maps `pixel_values` (B, C, height, width) float32 and `text.onnx` maps `input_ids` (B, L) int64 to
    `embeds` (B, E) float32, L2-normalized; picture size and text length L are fixed. The logit of a pair is
    `embeds @ embeds * exp(logit_scale) + logit_bias`. Weights above 2 GB lie beside their file in `*.onnx.data`.

    Both files carry, as JSON in their metadata: `model_type`, `image_size` [height, width], `image_mean`, `image_std`,
    `rescale_factor`, `resample` (a `PIL.Image.Resampling`), `text_length`, `logit_scale`, `logit_bias`, `dtype` and
    `siglip_hf` (its version).

    Args:
        model: A `SiglipModel`, or the name or folder of one.
        output_folder: Folder to write. Beside the two files it gets `config.json` and the processor's files, so that
            `AutoProcessor` loads from it.
        processor: The model's processor. Loaded with the model if that is given by name; without one, pictures are
            taken to be prepared as published SigLIP checkpoints do, and the folder has no tokenizer.
        dtype: float32, or float16 for weights of half the size; inputs and outputs stay float32.
        opset: ONNX operator set, 18 to 23.
        overwrite: Replace an earlier export in the folder.

    Raises:
        ValueError: If the embeddings of ONNX Runtime differ from PyTorch's in float32, with a lowest cosine under
            0.9999 (float32) or 0.999 (float16); nothing is written then. Also for a model, dtype, opset or folder that
            cannot be used.
        ImportError: Without the `export` extra; the message says what to install.
    """
    require_packages("onnx", "onnxscript", "onnxruntime")
    torch_dtype = {str(known): known for known in MIN_COSINE}.get(f"torch.{str(dtype).removeprefix('torch.')}")
    if torch_dtype is None:
        raise ValueError(f"dtype={dtype!r} cannot be exported; give float32 or float16")
    if opset not in OPSETS:
        raise ValueError(f"opset={opset} cannot be exported; give one of {OPSETS[0]} to {OPSETS[-1]}")
    check_output_folder(output_folder, overwrite=overwrite, marker=_FILES["vision"])
    if isinstance(model, str | os.PathLike):
        folder_or_name = model
        model = load_model(folder_or_name, dtype=torch.float32)
        processor = load_processor(folder_or_name, model) if processor is None else processor
    check_model(model)

    metadata = _metadata(model, processor, torch_dtype)
    reference = for_export(model, torch.float32)
    exported = reference if torch_dtype == torch.float32 else for_export(model, torch_dtype)
    cosines: dict[str, float] = {}
    with new_folder(output_folder, overwrite=overwrite, marker=_FILES["vision"]) as folder:
        for tower, file in _FILES.items():
            wrapper = _TOWERS[tower]
            program = to_onnx(wrapper(exported), (wrapper.example(model.config, _TRACED),), opset)
            example = wrapper.example(model.config, _CHECKED)
            with torch.inference_mode():
                expected = wrapper(reference)(example).numpy()  # (B, E)
            for key, value in metadata.items():
                program.model.metadata_props[key] = json.dumps(value)
            program.save(folder / file)
            session = open_session(folder / file, ["CPUExecutionProvider"])
            cosines[tower] = lowest_cosine(_run(session, example.numpy()), expected)
            # Written so that NaN, which compares false with everything, is refused as well.
            if not cosines[tower] >= MIN_COSINE[torch_dtype]:
                raise ValueError(
                    f"the exported {tower} tower does not give PyTorch's embeddings: the lowest cosine is "
                    f"{cosines[tower]:.6f}, at least {MIN_COSINE[torch_dtype]} is needed in {metadata['dtype']}; "
                    + ("export in float32" if torch_dtype == torch.float16 else f"try another opset than {opset}")
                )
        model.config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return Exported(Path(output_folder), cosines, metadata)


class OnnxSiglip(nn.Module):
    """The two files of an export behind the methods of `SiglipModel`; `onnx_classifier` makes a pipeline of it.

        model = OnnxSiglip("exported")
        embeds = model.encode_image(pixel_values)

    Attributes:
        config: The model's configuration.
        metadata: What the files say about themselves, see `export`.
        logit_scale: (1,), the logarithm of the temperature.
        logit_bias: (1,).
        device: Where outputs are: the CPU. Which device computes is the business of ONNX Runtime's providers.
        dtype: float32.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        num_threads: int | None = None,
    ):
        """Opens an export.

        Args:
            folder: What `export_onnx` wrote.
            providers: Names of ONNX Runtime's execution providers, in order of preference; all available by default.
            num_threads: CPU threads per tower; ONNX Runtime chooses by default.

        Raises:
            ValueError: If the folder is no export.
            ImportError: Without onnxruntime; the message says what to install.
        """
        require_packages("onnxruntime")
        super().__init__()
        folder = Path(folder)
        for file in (*_FILES.values(), "config.json"):
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; make it with `siglip-hf export MODEL {folder}`")
        self.config = from_checkpoint(SiglipConfig, folder)
        sessions = {tower: open_session(folder / file, providers, num_threads) for tower, file in _FILES.items()}
        properties = sessions["vision"].get_modelmeta().custom_metadata_map
        try:
            self.metadata: dict[str, Any] = {key: parse_json(value) for key, value in properties.items()}
        except ValueError as error:
            raise ValueError(f"the metadata of {folder / _FILES['vision']} are damaged: {error}") from error
        if lacking := {"image_size", "text_length", "logit_scale", "logit_bias"} - self.metadata.keys():
            raise ValueError(f"the metadata of {folder / _FILES['vision']} lack {', '.join(sorted(lacking))}")
        for name in ("logit_scale", "logit_bias"):
            if not (isinstance(self.metadata[name], int | float) and math.isfinite(self.metadata[name])):
                raise ValueError(f"the metadata of {folder / _FILES['vision']} are damaged: {name} is no number")
        self.vision_model = _OnnxTower(sessions["vision"])
        self.text_model = _OnnxTower(sessions["text"])
        self.logit_scale = nn.Buffer(torch.tensor([self.metadata["logit_scale"]]))
        self.logit_bias = nn.Buffer(torch.tensor([self.metadata["logit_bias"]]))
        self.eval()

    def encode_image(self, pixel_values: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Embeds pictures: (B, C, height, width), as the image processor makes them, to (B, E), L2-normalized.

        Raises:
            ValueError: For pictures of another size than the exported one.
        """
        size = list(pixel_values.shape[-2:])
        if size != self.metadata["image_size"]:
            raise ValueError(f"the pictures are {size}, the exported tower takes {self.metadata['image_size']}; resize")
        return self.vision_model(pixel_values)

    def encode_text(self, input_ids: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Embeds texts: (B, L) token ids, padded to the exported length, to (B, E), L2-normalized.

        Raises:
            ValueError: For texts of another length than the exported one.
        """
        length = self.metadata["text_length"]
        if input_ids.shape[-1] != length:
            raise ValueError(
                f"the texts have {input_ids.shape[-1]} tokens, the exported tower takes {length}; tokenize with "
                f'padding="max_length", max_length={length}, truncation=True'
            )
        return self.text_model(input_ids)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compares every picture with every text.

        Args:
            input_ids: (texts, L), padded to the exported length.
            pixel_values: (images, C, height, width), as the image processor makes them.

        Returns:
            Logits, (images, texts), float32.
        """
        cosines = self.encode_image(pixel_values) @ self.encode_text(input_ids).t()
        return cosines * self.logit_scale.exp() + self.logit_bias


def onnx_classifier(folder: str | os.PathLike[str], **options: Any) -> SiglipZeroShotImageClassificationPipeline:
    """The zero-shot pipeline on an export.

    Args:
        folder: What `export_onnx` wrote, with the processor's files in it.
        **options: As of `OnnxSiglip`.

    Raises:
        ValueError: If the folder is no export, or has no processor files.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    from siglip_hf.inference.pipeline import SiglipZeroShotImageClassificationPipeline

    model = OnnxSiglip(folder, **options)
    if not (Path(folder) / "preprocessor_config.json").is_file() or not list(
        Path(folder).glob("tokenizer_config.json")
    ):
        raise ValueError(
            f"{folder} has no tokenizer or image processor; export a checkpoint folder, or with processor="
        )

    return SiglipZeroShotImageClassificationPipeline(
        task="zero-shot-image-classification",
        model=model,
        tokenizer=from_checkpoint(AutoTokenizer, folder),
        image_processor=from_checkpoint(AutoImageProcessor, folder),
    )


class _OnnxTower(nn.Module):
    """A tower that ONNX Runtime computes. It has no parameters: they are in the file."""

    def __init__(self, session: Any):
        super().__init__()
        self.session = session

    def forward(self, values: torch.Tensor | np.ndarray) -> torch.Tensor:
        array = (
            values.detach().cpu().float().numpy() if torch.is_tensor(values) and values.is_floating_point() else values
        )
        return torch.from_numpy(_run(self.session, np.asarray(array)))


class _VisionTower(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @staticmethod
    def example(config: Any, batch: int) -> torch.Tensor:
        shape = (batch, config.vision_config.num_channels, *as_pair(config.vision_config.image_size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return normalized(self.model.encode_image(pixel_values, normalize=False))


class _TextTower(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @staticmethod
    def example(config: Any, batch: int) -> torch.Tensor:
        text = config.text_config
        shape = (batch, text.max_position_embeddings)
        return torch.randint(text.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return normalized(self.model.encode_text(input_ids, normalize=False))


_TOWERS: dict[str, Any] = {"vision": _VisionTower, "text": _TextTower}


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Scales each row of (B, E) to length 1, in float32."""
    # In float32 in a float16 export too: a sum of squares leaves float16's range early.
    return nn.functional.normalize(embeds.float(), dim=-1)


def require_packages(*names: str) -> None:
    """Refuses to begin without them.

    Args:
        *names: Modules of the extra `export`.

    Raises:
        ImportError: with what to install.
    """
    import importlib.util

    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise extras.missing(f"this needs {', '.join(missing)}", "export")


def check_model(model: Any) -> None:
    """Refuses what cannot be exported.

    Raises:
        ValueError: If it is no `SiglipModel`, or is quantized.
    """
    from siglip_hf.models.modeling_siglip import SiglipModel

    if not isinstance(model, SiglipModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported; give a SiglipModel (merge LoRA adapters with "
            "merge_and_unload() first)"
        )
    if not hasattr(model.config.vision_config, "image_size"):
        raise ValueError(
            "a NaFlex model cannot be exported: its pictures have no one size; give a SigLIP of fixed size"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("a quantized model cannot be exported; load it without quantization_config")


def for_export(model: Any, dtype: torch.dtype) -> Any:
    """A copy on the CPU with attention that torch.export can follow."""
    model = copy.deepcopy(model).cpu().to(dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


def _metadata(model: Any, processor: Any, dtype: torch.dtype) -> dict[str, Any]:
    from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor

    size = list(as_pair(model.config.vision_config.image_size))
    images = SiglipImageProcessor() if processor is None else processor.image_processor
    if processor is not None and [images.size.get("height"), images.size.get("width")] != size:
        raise ValueError(f"the processor resizes pictures to {dict(images.size)}, but the model takes {size}")
    return {
        "siglip_hf": __version__,
        "model_type": model.config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "image_size": size,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "rescale_factor": images.rescale_factor,
        "resample": int(images.resample),
        "text_length": model.config.text_config.max_position_embeddings,
        "logit_scale": model.logit_scale.item(),
        "logit_bias": model.logit_bias.item(),
    }


def to_onnx(
    tower: nn.Module,
    example: tuple[torch.Tensor, ...],
    opset: int,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] = ("embeds",),
    batches: Sequence[str] = ("batch",),
) -> Any:
    """The program of a module with a free first axis of every input.

    Args:
        tower: the module.
        example: its inputs, (B, ...) each.
        opset: ONNX operator set.
        inputs: their names; those of `forward` by default.
        outputs: names of what it gives.
        batches: names of the inputs' first axes.

    Raises:
        ValueError: If the installed torch exports another opset.
    """
    with _quiet():
        program = torch.onnx.export(
            tower.eval(),
            example,
            dynamo=True,
            dynamic_shapes=tuple({0: torch.export.Dim(name)} for name in batches),
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    made = program.model.opset_imports[""]
    if made != opset:
        raise ValueError(f"the installed torch exports opset {made}, not {opset}; choose that or update torch")
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed here and on its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def open_session(path: Path, providers: Sequence[str] | None = None, num_threads: int | None = None) -> Any:
    """ONNX Runtime's session of a file; arguments as of `OnnxSiglip`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=list(providers or onnxruntime.get_available_providers())
        )
    except Exception as error:  # its own kinds of errors have no base class
        raise ValueError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error


def _run(session: Any, values: np.ndarray) -> np.ndarray:
    (embeds,) = session.run(None, {session.get_inputs()[0].name: values})
    return embeds


def lowest_cosine(embeds: np.ndarray, expected: np.ndarray) -> float:
    """Of the rows of two (B, E); NaN where a row is not finite."""
    first, second = embeds.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        cosines = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return float(cosines.min())


export = export_onnx  # its name in version 0.1

__all__ = ["DEFAULT_OPSET", "MIN_COSINE", "Exported", "OnnxSiglip", "export", "export_onnx", "onnx_classifier"]
