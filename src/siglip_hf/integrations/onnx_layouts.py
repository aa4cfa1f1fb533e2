"""ONNX in the layouts that other programs read: transformers.js in a browser or Node, immich's server.

Every file is held against PyTorch in float32 before it is kept. Names of files, inputs and outputs are those that the
programs look for: https://huggingface.co/docs/transformers.js/guides/dtypes and immich's `machine-learning` folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siglip_hf.files import check_output_folder, new_folder, write_json
from siglip_hf.integrations.onnx import (
    DEFAULT_OPSET,
    MIN_COSINE,
    check_model,
    for_export,
    lowest_cosine,
    normalized,
    open_session,
    require_packages,
    to_onnx,
)
from siglip_hf.loading import load_model, load_processor
from siglip_hf.models.configuration_siglip import as_pair

#: Layout -> the file that each of its folders has.
LAYOUTS = {"transformers.js": "onnx/model.onnx", "immich": "visual/model.onnx"}

#: Precision -> what transformers.js puts behind a file's name.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}

#: Lowest cosine to PyTorch in float32 with weights of 8 bits, one scale for each output channel.
MIN_COSINE_Q8 = 0.97

_TRACED, _CHECKED = 2, 5


@dataclass(frozen=True)
class ExportedLayout:
    """What `export_layout` wrote.

    Attributes:
        folder: where it is.
        layout: its name.
        cosines: lowest cosine to PyTorch in float32, by file.
    """

    folder: Path
    layout: str
    cosines: dict[str, float] = field(default_factory=dict)


def export_layout(
    model: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    layout: str,
    precisions: Sequence[str] | None = None,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> ExportedLayout:
    """Writes a checkpoint as ONNX files where another program looks for them.

    - **transformers.js**: `onnx/model.onnx`, `onnx/vision_model.onnx` and `onnx/text_model.onnx`, and the same with
      `_fp16` and `_quantized` (8 bits), with the configuration, image processor and `tokenizer.json`.
    - **immich**: `visual/model.onnx` and `textual/model.onnx` with their settings and tokenizer.

    Args:
        model: folder or name of a SigLIP checkpoint of fixed resolution.
        output_folder: the folder to write.
        layout: one of `LAYOUTS`.
        precisions: of "fp32", "fp16" and "q8"; by default all for transformers.js, "fp32" for immich, which reads a
            single file of each tower.
        opset: ONNX operator set, 18 to 23.
        overwrite: replace an earlier export in the folder.

    Raises:
        ValueError: for another layout or precision, a model that cannot be exported, and a file whose embeddings are
            not PyTorch's: cosines under 0.9999 (fp32), 0.999 (fp16) or 0.97 (q8). Nothing is written then.
        ImportError: without the packages that it needs.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; give one of {', '.join(LAYOUTS)}.")
    several = layout == "transformers.js"
    precisions = list(precisions or (SUFFIXES if several else ("fp32",)))
    if wrong := [one for one in precisions if one not in SUFFIXES] or (not several and len(precisions) > 1):
        known = ", ".join(SUFFIXES)
        raise ValueError(
            f"precision {wrong if several else precisions!r} is not for {layout}; give of {known}"
            f"{'' if several else ' one'}."
        )
    require_packages("onnx", "onnxscript", "onnxruntime")
    marker = LAYOUTS[layout] if not several else f"onnx/model{SUFFIXES[precisions[0]]}.onnx"
    check_output_folder(output_folder, overwrite=overwrite, marker=marker)
    loaded = load_model(model, dtype=torch.float32)
    check_model(loaded)
    processor = load_processor(model, loaded)
    result = ExportedLayout(Path(output_folder), layout)
    with new_folder(output_folder, overwrite=overwrite, marker=marker) as folder:
        for file, part in _parts(layout, loaded.config).items():
            _write(folder, file, part, loaded, precisions, opset, layout, result.cosines)
        _write_settings(folder, layout, loaded, processor)
    return result


@dataclass(frozen=True)
class _Part:
    """A file: what it computes, the names of its inputs and outputs, and which outputs are embeddings."""

    module: type[nn.Module]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    embeddings: tuple[int, ...] = (0,)

    def example(self, config: Any, batch: int) -> tuple[torch.Tensor, ...]:
        """Random pictures (B, C, height, width) and token ids (B, L), as it takes them."""
        generator = torch.Generator().manual_seed(0)
        vision, text = config.vision_config, config.text_config
        pictures = torch.randn((batch, vision.num_channels, *as_pair(vision.image_size)), generator=generator)
        ids = torch.randint(text.vocab_size, (batch, text.max_position_embeddings), generator=generator)
        # immich gives int32, everyone else int64.
        given = {"pixel_values": pictures, "image": pictures, "input_ids": ids, "text": ids.int()}
        return tuple(
            given[name].clamp(-1, 1) if given[name].is_floating_point() else given[name] for name in self.inputs
        )


class _Wrapper(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model


class _Vision(_Wrapper):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return normalized(self.model.encode_image(pixel_values, normalize=False))


class _Text(_Wrapper):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return normalized(self.model.encode_text(input_ids.long(), normalize=False))


class _VisionStates(_Wrapper):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model.vision_model(pixel_values.to(self.model.dtype))
        return output.last_hidden_state.float(), output.pooler_output.float()


class _TextStates(_Wrapper):
    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model.text_model(input_ids)
        return output.last_hidden_state.float(), output.pooler_output.float()


class _Joint(_Wrapper):
    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        texts = normalized(self.model.encode_text(input_ids, normalize=False))
        images = normalized(self.model.encode_image(pixel_values, normalize=False))
        scale, bias = self.model.logit_scale.float().exp(), self.model.logit_bias.float()
        logits = texts @ images.t() * scale + bias  # (texts, images)
        return logits.t(), logits, texts, images


_STATES = ("last_hidden_state", "pooler_output")


def _parts(layout: str, config: Any) -> dict[str, _Part]:
    if layout == "transformers.js":
        outputs = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
        return {
            "onnx/model": _Part(_Joint, ("input_ids", "pixel_values"), outputs, (2, 3)),
            "onnx/vision_model": _Part(_VisionStates, ("pixel_values",), _STATES, (1,)),
            "onnx/text_model": _Part(_TextStates, ("input_ids",), _STATES, (1,)),
        }
    return {
        "visual/model": _Part(_Vision, ("image",), ("embeds",)),
        "textual/model": _Part(_Text, ("text",), ("embeds",)),
    }


def _write(
    folder: Path,
    file: str,
    part: _Part,
    model: Any,
    precisions: Sequence[str],
    opset: int,
    layout: str,
    cosines: dict[str, float],
) -> None:
    """Writes one part in every precision, each held against PyTorch."""
    reference = for_export(model, torch.float32)
    example = part.example(model.config, _CHECKED)
    with torch.inference_mode():
        given = part.module(reference)(*example)
    expected = [given] if isinstance(given, torch.Tensor) else list(given)
    batches = ("texts", "images") if len(part.inputs) == 2 else ("batch",)
    with tempfile.TemporaryDirectory() as temporary:

        def made(precision: str) -> Path:
            """The file in a folder of its own, by its final name: weights of more than 2 GB lie beside it."""
            suffix = SUFFIXES[precision] if layout == "transformers.js" else ""
            path = Path(temporary) / precision / f"{Path(file).name}{suffix}.onnx"
            if path.exists():
                return path
            path.parent.mkdir()
            if precision == "q8":
                _quantize(made("fp32"), path)
                return path
            module = part.module(for_export(model, torch.float16) if precision == "fp16" else reference)
            traced = part.example(model.config, _TRACED)
            to_onnx(module, traced, opset, part.inputs, part.outputs, batches).save(path)
            return path

        for precision in precisions:
            source = made(precision)
            target = folder / file
            shutil.copytree(source.parent, target.parent, dirs_exist_ok=True)
            target = target.with_name(source.name)
            session = open_session(target, ["CPUExecutionProvider"])
            names = [one.name for one in session.get_inputs()]
            feed = dict(zip(names, (value.numpy() for value in example), strict=True))
            outputs = session.run(list(part.outputs), feed)
            lowest = min(lowest_cosine(outputs[number], expected[number].numpy()) for number in part.embeddings)
            least = (
                MIN_COSINE_Q8
                if precision == "q8"
                else MIN_COSINE[torch.float16 if precision == "fp16" else torch.float32]
            )
            # Written so that NaN, which compares false with everything, is refused as well.
            if not lowest >= least:
                raise ValueError(
                    f"{target.name} does not give PyTorch's embeddings: the lowest cosine is {lowest:.6f}, at least "
                    f"{least} is needed in {precision}; leave that precision out."
                )
            cosines[target.relative_to(folder).as_posix()] = lowest


def _quantize(full: Path, made: Path) -> None:
    """Weights in 8 bits, a scale for each output channel; inputs are quantized as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(full)
    # The exporter's notes on shapes in between contradict ONNX's own inference, which the quantization asks.
    del model.graph.value_info[:]
    quantize_dynamic(
        model,
        made,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
    )


def _write_settings(folder: Path, layout: str, model: Any, processor: Any) -> None:
    if layout != "immich":
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _check_tokenizer(folder)
        return
    images, text = processor.image_processor, model.config.text_config
    processor.tokenizer.save_pretrained(folder / "textual")
    _check_tokenizer(folder / "textual")
    # immich reads open_clip's configuration, and lowercases and cleans the text itself.
    vision = {"image_size": model.config.vision_config.image_size}
    written = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    write_json(folder / "config.json", {"embed_dim": text.projection_size, "vision_cfg": vision, "text_cfg": written})
    height, width = as_pair(model.config.vision_config.image_size)
    settings = {
        "size": [height, width],
        "mode": "RGB",
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(int(images.resample), "bicubic"),
        "resize_mode": "squash",
        "fill_color": 0,
    }
    write_json(folder / "visual" / "preprocess_cfg.json", settings)


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            "this layout needs a tokenizer.json, and the checkpoint's tokenizer has none; load it with "
            "use_fast=True and save it first."
        )
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    # Special tokens as bare strings: the readers take no dicts.
    plain = {
        name: value["content"] if isinstance(value, dict) and "content" in value else value
        for name, value in content.items()
    }
    write_json(settings, plain, indent=2)
