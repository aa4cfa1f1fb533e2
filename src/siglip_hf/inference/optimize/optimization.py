"""`siglip_hf.optimize`: a model made faster for inference where it is, checked against itself, with a report.

On a CPU nothing is compiled, so there is no warm-up: the weights are packed once, in less time than a few pictures
take. On a GPU the blocks are compiled, once for all of a tower.
"""

from __future__ import annotations

import platform
import threading
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from siglip_hf.files import first_line
from siglip_hf.inference.optimize import onednn
from siglip_hf.inference.optimize.compiled import CompiledBlock, FusedBlock
from siglip_hf.inference.optimize.packed import PackedBlock, is_held, is_packable
from siglip_hf.models.configuration_siglip import SiglipTextConfig, as_pair
from siglip_hf.models.configuration_siglip2 import Siglip2VisionConfig
from siglip_hf.models.layers import SiglipEncoder, SiglipEncoderLayer
from siglip_hf.models.modeling_siglip import SiglipPreTrainedModel, SiglipTextModel, SiglipVisionModel, l2_normalize
from siglip_hf.parallel import usable_cores

logger = logging.get_logger(__name__)

#: The least cosine of embeddings before and after in bfloat16, whose rounding alone costs a small tower 0.0002 on the
#: probe, and the largest difference of unit embeddings in float32, for a model to stay optimized.
LEAST_COSINE = 0.9995
LARGEST_DIFFERENCE = 1e-5
LEAST_COSINE_INT8 = 0.99

# A model is being changed in place: a second thread that asks for the same must wait for it.
_ONE_AT_A_TIME = threading.RLock()

_PROBES = 2  # pictures, and texts: enough to see a fault, few enough to be quick

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Optimization:
    """What `optimize` did to a model.

    Attributes:
        dtype: The dtype that the model computes in, such as "bfloat16".
        threads: Threads of torch.
        packed_blocks: Encoder blocks with prepacked weights; 0 if the model is as it was.
        cosine: The least cosine between embeddings before and after, on a probe batch; None if nothing was changed.
        notes: Each choice, and why, in words.
    """

    dtype: str
    threads: int
    packed_blocks: int = 0
    cosine: float | None = None
    notes: list[str] = field(default_factory=list)


def optimize(
    model: Model,
    dtype: torch.dtype | None = None,
    *,
    int8: bool = False,
    device: str | torch.device | None = None,
) -> Model:
    """Makes a SigLIP model faster for inference on a CPU or a GPU, in place.

    It picks bfloat16 where the CPU multiplies in it, float32 elsewhere; packs the weights of the encoder blocks once
    in oneDNN's order; makes queries, keys and values in one product; and takes activations and sums into the
    products. Then it embeds a probe batch. If that differs from before by more than rounding (cosine below 0.9999 in
    bfloat16, 1e-5 in float32), it takes the next safer way: float32, at last the model as it was.

    On a CUDA device it picks bfloat16 (float16 where the GPU has none) and compiles the blocks. What gives other
    embeddings, fails, or takes longer on the probe is not taken: next comes one product for queries, keys and values
    alone, at last the model as it was, in the dtype picked.

    It is for inference: parameters no longer require gradients. Whoever asks for more than the packed weights give
    (gradients, attention weights, a state dict, another dtype or device, adapters, hooks, autocast) gets it: a block
    that is asked has its weights back bit for bit, in the dtype that was picked, and is a plain one from then on; call
    it again to pack it again. In int8 the weights are gone, and asking is an error. What cannot be packed (blocks with
    LoRA, quantized weights, hooks or offload; models on other accelerators) stays as it is, and the report says so.
    Threads may call it for one model: the first does it, the others wait; but none may compute with the model
    meanwhile. torch gets no more threads than there are usable cores, in all of the process.

    Args:
        model: A `SiglipModel`, `Siglip2Model`, one of their towers or classifiers, in whatever dtype it was loaded.
        dtype: `torch.float32` or `torch.bfloat16`; by default the one that suits the hardware. A dtype given is taken
            as wanted, and the probe compares with the plain model in it. float16 is many times slower on CPUs: the
            model then gets the default, with a warning.
        int8: Multiply by the blocks' weights in int8, which costs accuracy (docs/speed.md says how much); inputs are
            quantized as they come, without calibration. The probe must then agree to a cosine of 0.99. On a CPU only.
        device: Move the model there first; by default it stays where it is.

    Returns:
        The same model, in evaluation mode, with an `Optimization` as its attribute `optimization`.

    Raises:
        ValueError: For another dtype.

    Examples:
        >>> import siglip_hf
        >>> model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint())
        >>> siglip_hf.optimize(model).optimization.dtype in ("float32", "bfloat16")
        True
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype} is none to optimize for; pass torch.bfloat16, torch.float32 or None.")
    with _ONE_AT_A_TIME:
        if device is not None:
            model.to(device)
        report = getattr(model, "optimization", None)
        if not isinstance(report, Optimization) or report.packed_blocks > _packed_blocks(model):
            model.optimization = _optimize(model, dtype, int8)  # type: ignore[assignment]
    return model


def pack(model: nn.Module) -> bool:
    """Packs the weights of a float32 model on a CPU: nothing that a user can see changes but the time that it takes.

    What `optimize` does, but dtype, threads and `requires_grad` stay; and a model that is in use elsewhere (an
    optimizer holds a weight, or a weight has a gradient) is left alone. No thread may compute with the model meanwhile.

    Returns:
        Whether it is packed now.
    """
    with _ONE_AT_A_TIME:
        report = Optimization(dtype="float32", threads=torch.get_num_threads())
        if (
            isinstance(getattr(model, "optimization", None), Optimization)
            or _reason_against(model)
            or {parameter.dtype for parameter in model.parameters()} != {torch.float32}
            or any(is_held(block) for encoder in _encoders(model) for block in encoder.layers)  # type: ignore[arg-type]
            or not _pack(model, torch.float32, report, int8=False)
        ):
            return False
        model.optimization = report  # type: ignore[assignment]
        return True


def _optimize(model: nn.Module, dtype: torch.dtype | None, int8: bool) -> Optimization:
    """Does it; the report."""
    report = Optimization(
        dtype=str(getattr(model, "dtype", "")).removeprefix("torch."), threads=torch.get_num_threads()
    )
    gpu = _device_type(model) == "cuda"
    reason = _reason_against(model, "cuda" if gpu else "cpu")
    if reason:
        report.notes.append(f"left as it is: {reason}")
    elif gpu:
        compile_blocks(model, dtype, report, int8=int8)
    else:
        _limit_threads(report)
        model.eval()
        if dtype == torch.float16:
            logger.warning("float16 is many times slower than float32 on a CPU; optimize chooses another dtype")
            report.notes.append("float16 was asked for, but CPUs compute it many times slower than float32")
            dtype = None
        if dtype is None:
            choices = _choose_dtypes(report)
        else:
            choices = [dtype]
            model.to(dtype)  # type: ignore[call-overload]
            report.dtype = _name(dtype)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.requires_grad_(False)
        if not any(_pack(model, choice, report, int8) for choice in choices):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            report.notes.append("left as it is: no faster way gave the same embeddings")
    return report


@torch.inference_mode(False)  # outermost, since it turns gradients on
@torch.no_grad()
def compile_blocks(model: nn.Module, dtype: torch.dtype | None, report: Optimization, *, int8: bool = False) -> None:
    """What `optimize` does on a GPU; it runs on a CPU as well, to be tried there."""
    if int8:
        report.notes.append("not in int8, which serves CPUs")
    model.eval()
    if dtype is None:
        dtype = _convert_to_16_bits(model, report)
    model.to(dtype)  # type: ignore[call-overload]
    report.dtype = _name(dtype)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    if not any(_pack(model, dtype, report, False, kind) for kind in (CompiledBlock, FusedBlock)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        report.notes.append(f"plain blocks in {_name(dtype)}: no other way gave the same embeddings in less time")


def _convert_to_16_bits(model: nn.Module, report: Optimization) -> torch.dtype:
    """Converts a model on a GPU to the 16 bits that it computes in; if it then embeds otherwise, puts it back."""
    wide = _device_type(model) != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if wide else torch.float16
    before = _embed_probe(model)
    original = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    model.to(dtype)  # type: ignore[call-overload]
    cosine = nn.functional.cosine_similarity(before, _embed_probe(model)).min().item()
    report.cosine = cosine
    if cosine >= LEAST_COSINE:
        report.notes.append(f"{_name(dtype)}: this GPU computes in it; least cosine to the model before {cosine:.6f}")
        return dtype
    for tensor, data in original:
        tensor.data = data
    report.notes.append(f"not in {_name(dtype)}: the probe's embeddings differ (least cosine {cosine:.6f})")
    return original[0][1].dtype


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16 (AVX-512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _reason_against(model: nn.Module, device: str = "cpu") -> str | None:
    """Why a model cannot be optimized, or None."""
    no_onednn = not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64")
    if device == "cpu" and no_onednn:
        return "this is no x86 CPU with oneDNN"
    if not isinstance(model, SiglipPreTrainedModel) or not (encoders := _encoders(model)):
        return f"{type(model).__name__} is no SigLIP model of this package"
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {device}:
        return f"its weights are on {', '.join(sorted(devices))}, and this serves a CPU or a CUDA device"
    if any(encoder.config._attn_implementation not in ("sdpa", "eager") for encoder in encoders):
        return f"its attention is {encoders[0].config._attn_implementation!r}, not 'sdpa'"
    if not all(is_packable(block, device) for encoder in encoders for block in encoder.layers):
        return "its blocks hold adapters, quantized weights or hooks"
    return None


def _choose_dtypes(report: Optimization) -> list[torch.dtype]:
    """Dtypes to try, fastest first."""
    if multiplies_bfloat16():
        report.notes.append("bfloat16: this CPU has instructions for it (AVX-512-BF16 or AMX)")
        return [torch.bfloat16, torch.float32]
    report.notes.append("float32: this CPU has no instructions for bfloat16 (AVX-512-BF16 or AMX)")
    return [torch.float32]


def _limit_threads(report: Optimization) -> None:
    """No more threads than cores that this process may use: in a container torch counts those of the whole machine."""
    usable = usable_cores()
    if torch.get_num_threads() > usable:
        report.notes.append(f"{usable} threads instead of {torch.get_num_threads()}: so many cores are this process's")
        torch.set_num_threads(usable)
    else:
        report.notes.append(f"{torch.get_num_threads()} threads, as torch has set; {usable} cores are usable")
    report.threads = torch.get_num_threads()


@torch.inference_mode(False)  # outermost, since it turns gradients on
@torch.no_grad()
def _pack(
    model: nn.Module, dtype: torch.dtype, report: Optimization, int8: bool, kind: type[PackedBlock] = PackedBlock
) -> bool:
    """Packs the model's blocks in a dtype; if it then embeds the probe otherwise, puts everything back.

    Weights that are only put in another order are dropped block by block, since packing can be undone: at no time are
    there two copies of the model.

    Returns:
        Whether the model is packed.
    """
    if kind is PackedBlock and (reason := onednn.why_not(dtype, int8)):
        report.notes.append(f"not in {_name(dtype)}{' with int8' if int8 else ''}: {reason}")
        return False
    before, plain_seconds = _embed_probe(model), _probe_seconds(model)
    only_reordered = {parameter.dtype for parameter in model.parameters()} == {dtype} and not int8
    original = [] if only_reordered else [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    blocks = [block for encoder in _encoders(model) for block in _to_pack(encoder)]
    trouble = None
    try:
        model.to(dtype)  # type: ignore[call-overload]
        for block in blocks:
            kind(block, int8)
        after = _embed_probe(model)
        cosine = nn.functional.cosine_similarity(before, after).min().item()
        difference = (before - after).abs().max().item()
        exact = only_reordered and dtype == torch.float32
        least = LEAST_COSINE_INT8 if int8 else LEAST_COSINE
        if not (difference <= LARGEST_DIFFERENCE if exact else cosine >= least):
            trouble = f"the probe's embeddings differ (least cosine {cosine:.6f})"
        elif plain_seconds is not None and (seconds := _probe_seconds(model) or 0) > plain_seconds:
            trouble = f"it takes {1000 * seconds:.2f} ms, the plain blocks {1000 * plain_seconds:.2f} ms"
    except RuntimeError as error:  # of oneDNN, for shapes that its self-test does not have; of torch.compile
        trouble = first_line(error)
    if trouble:
        for block in blocks:
            if block.packed is not None:
                block.packed.restore()
        for tensor, data in original:
            tensor.data = data
        what = _name(dtype) if kind is PackedBlock else kind.kind
        report.notes.append(f"not in {what}: {trouble}")
        return False

    report.dtype, report.cosine, report.packed_blocks = _name(dtype), cosine, len(blocks)
    way = kind.kind.replace("packed weights", "weights in int8") if int8 else kind.kind
    report.notes.append(f"{len(blocks)} blocks {way}")
    report.notes.append(f"least cosine to the model before, on {len(before)} probe inputs: {cosine:.6f}")
    return True


def _packed_blocks(model: nn.Module) -> int:
    return sum(block.packed is not None for encoder in _encoders(model) for block in encoder.layers)


def _encoders(model: nn.Module) -> list[SiglipEncoder]:
    return [module for module in model.modules() if isinstance(module, SiglipEncoder)]


def _to_pack(encoder: SiglipEncoder) -> list[SiglipEncoderLayer]:
    """The blocks to pack: not the text tower's last, of which one position counts; for that the plain one is faster."""
    blocks: list[Any] = list(encoder.layers)
    return blocks[:-1] if isinstance(encoder.config, SiglipTextConfig) else blocks


def _embed_probe(model: nn.Module) -> torch.Tensor:
    """Unit embeddings (M, E) in float32 of two smooth pictures and two short texts, by each tower of the model."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    embeds = []
    for tower in model.modules():
        if isinstance(tower, SiglipVisionModel):
            output = tower(
                **{name: value.to(device) for name, value in _probe_pictures(tower.config, generator).items()}
            )
        elif isinstance(tower, SiglipTextModel):
            output = tower(_probe_texts(tower.config, generator).to(device), last_token_only=True)
        else:
            continue
        pooled = output.pooler_output
        embeds.append(l2_normalize((output.last_hidden_state.mean(dim=1) if pooled is None else pooled).float()))
    width = max(embed.shape[-1] for embed in embeds)
    return torch.cat([nn.functional.pad(embed, (0, width - embed.shape[-1])) for embed in embeds])


def _probe_seconds(model: nn.Module) -> float | None:
    """The least of several times that a GPU takes for the probe; None on a CPU, whose packed way is known faster."""
    if _device_type(model) != "cuda":
        return None
    times = []
    for _ in range(7):  # the first ones compile and warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _embed_probe(model)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _probe_pictures(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Smooth noise, as the tower takes it: pixels, or the patches of NaFlex."""
    rows, columns = config.patch_grid
    height, width = (count * side for count, side in zip((rows, columns), as_pair(config.patch_size), strict=True))
    noise = torch.rand(_PROBES, config.num_channels, 4, 4, generator=generator) * 2 - 1
    pixels = nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    if not isinstance(config, Siglip2VisionConfig):
        return {"pixel_values": pixels}
    patches = nn.functional.unfold(pixels, as_pair(config.patch_size), stride=as_pair(config.patch_size))  # (M, P, N)
    return {"pixel_values": patches.transpose(1, 2), "spatial_shapes": torch.tensor([[rows, columns]] * _PROBES)}


def _probe_texts(config: SiglipTextConfig, generator: torch.Generator) -> torch.Tensor:
    """Token ids (M, L) of four tokens and padding, like a label."""
    padding = 0 if config.pad_token_id is None else config.pad_token_id
    ids = torch.full((_PROBES, config.max_position_embeddings), padding)
    ids[:, :4] = torch.randint(config.vocab_size, ids[:, :4].shape, generator=generator)
    return ids


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
