"""The pairwise sigmoid loss of SigLIP, exact and in blocks.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), section 3.2 and algorithm 1. Every pair of
an image and a text is a term of its own, so the B x B matrix of logits is walked in tiles and never held
(`tiles.py`); `ring.py` carries the walk across processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siglip_hf.losses.ring import ring_loss
from siglip_hf.losses.tiles import LossFunction, Tiles, accumulation_dtype, stored_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Rows and columns of a tile. On a CPU the fp32 tile (4 MB) then stays in cache through its pointwise passes; on a GPU a
# larger one (64 MB) keeps all multiprocessors busy. Matrix products run at full speed with both.
_CPU_TILE = 1024
_GPU_TILE = 4096
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    positives: Tensor | None = None,
) -> Tensor:
    r"""The sigmoid loss of a batch of image-text pairs, with the sum over all pairs divided by the batch size.

    With z_ij = exp(logit_scale) * <image_i, text_j> + logit_bias and l_ij = 1 for a positive pair, -1 for any other,

        loss = -1/B * sum_ij log sigmoid(l_ij * z_ij)

    Loss and gradients come out of one walk over tiles of `chunk_size` x `chunk_size` pairs: beside the gradients
    themselves, memory does not depend on B. They are exact for any tile size. The matrix products run in the dtype of
    the embeddings (that of autocast, where it is on); everything else runs in float32, or in float64 for float64
    embeddings.

    Args:
        image_embeds: (B, E), floating point, L2-normalized by the caller. Row i belongs to row i of `text_embeds`.
        text_embeds: (B, E), L2-normalized by the caller.
        logit_scale: () or (1,), the logarithm t' of the temperature; log 10 at the start of training.
        logit_bias: () or (1,); -10 at the start of training.
        chunk_size: Side of a tile, >= 1. By default 1024 on a CPU and 4096 elsewhere.
        group: Process group whose processes each hold a part of the batch, in any sizes. The loss is then that of all
            B pairs of the group and has the same value on each of its processes, all of which must call. See Note.
        positives: (B,) integers. Image i and text j are a positive pair where their numbers are equal, for captions
            that repeat or pictures with several captions. By default each row is positive with itself alone. With a
            group, numbers are compared across processes.

    Returns:
        Scalar tensor, float32 (float64 for float64 embeddings). It can be differentiated once.

    Raises:
        ValueError: Shapes or dtypes that do not fit (named in the message, on all processes of the group alike).

    Note:
        With a group of W processes, the gradients of the embeddings are W times those of the returned value: they are
        the derivatives of the sum of what the W processes return, as with `torch.distributed.nn`. Gradients of
        `logit_scale` and `logit_bias` are those of the returned value, the same on each process. The mean over
        processes, which DDP and FSDP take, is therefore the exact gradient of the global loss for every parameter.

    Examples:
        >>> import torch
        >>> from siglip_hf import sigmoid_loss
        >>> images, texts = torch.eye(4), torch.eye(4)  # four pairs, each unlike the others
        >>> round(sigmoid_loss(images, texts, torch.tensor(10.0).log(), torch.tensor(-10.0)).item(), 4)
        0.6933
    """
    problem = _describe_problem(image_embeds, text_embeds, positives)
    if group is None:
        if not problem and len(image_embeds) == 0:
            problem = "image_embeds and text_embeds are empty: the loss of no pairs is not defined."
        if problem:
            raise ValueError(problem)
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if value.numel() != 1:
            raise ValueError(f"{name} must hold one number, but its shape is {tuple(value.shape)}.")
    device = image_embeds.device
    if chunk_size is None:
        chunk_size = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}.")

    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device.type)
    inputs = (
        image_embeds.to(dtype),
        text_embeds.to(dtype),
        logit_scale.reshape(()).to(device),
        logit_bias.reshape(()).to(device),
    )
    if group is not None:
        return ring_loss(*inputs, positives, chunk_size, _needs(*inputs), group, problem)
    return _loss_of_one_process(*inputs, None if positives is None else positives.long(), chunk_size)[0]


def _loss_of_one_process(*inputs: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients; `inputs` are those of `_local_loss` without the flags."""
    # A compiler takes the operator as one node; function transforms ask for an autograd.Function.
    function = _local_loss if torch.compiler.is_compiling() else _LocalLoss.apply
    return function(*inputs, *_needs(*inputs[:4]))


def _needs(*values: Tensor) -> list[bool]:
    """Whether a gradient in each of them is wanted."""
    return [torch.is_grad_enabled() and value.requires_grad for value in values]


def _describe_problem(image_embeds: Tensor, text_embeds: Tensor, positives: Tensor | None) -> str:
    """What is wrong with the shapes and dtypes of one process's part of the batch, or an empty string."""
    images, texts = tuple(image_embeds.shape), tuple(text_embeds.shape)
    if len(images) != 2 or len(texts) != 2:
        return f"image_embeds and text_embeds must be (B, E), but their shapes are {images} and {texts}."
    if images[0] != texts[0]:
        return (
            f"Row i of image_embeds and of text_embeds must be a pair, but there are {images[0]} images and {texts[0]} "
            "texts. Repeat the embedding of an image that has several captions, and pass `positives`."
        )
    if images[1] != texts[1]:
        return f"image_embeds have {images[1]} dimensions and text_embeds {texts[1]}: they must share one space."
    if not (image_embeds.is_floating_point() and text_embeds.is_floating_point()):
        return f"Embeddings must be floating point, but are {image_embeds.dtype} and {text_embeds.dtype}."
    if image_embeds.device != text_embeds.device:
        return f"image_embeds are on {image_embeds.device} and text_embeds on {text_embeds.device}."
    if positives is not None and (positives.shape != images[:1] or positives.dtype not in _INTEGERS):
        return (
            f"positives must be ({images[0]},) integers, one number per pair, but are {positives.dtype} of shape "
            f"{tuple(positives.shape)}."
        )
    return ""


# An operator of its own is one opaque node for torch.compile and export, which would otherwise unroll the walk.
@torch.library.custom_op("siglip_hf::sigmoid_loss", mutates_args=())
def _local_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    chunk_size: int,
    image_grad: bool,
    text_grad: bool,
    scale_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients in images, texts, scale and bias; those that are not wanted are empty."""
    batch = len(image_embeds)
    # The gradient in the scale is read off that of the images or of the texts, so one of them must be there.
    walk = Tiles(image_embeds, logit_scale, logit_bias, chunk_size, image_grad or (scale_grad and not text_grad))
    texts_sum = torch.zeros_like(text_embeds, dtype=walk.dtype) if text_grad else None
    with torch.autocast(image_embeds.device.type, enabled=False):
        walk.add(text_embeds, texts_sum, bias_grad=bias_grad, aligned=True, image_ids=positives, text_ids=positives)
    grads = [image_embeds.new_empty(0) for _ in range(4)]
    if scale_grad:
        if walk.image_grad is not None:
            total = walk.scale_sum(image_embeds, walk.image_grad)
        else:
            assert texts_sum is not None
            total = walk.scale_sum(text_embeds, texts_sum)
        grads[2] = (total / batch).to(walk.dtype)
    if bias_grad:
        grads[3] = (walk.bias_sum / batch).to(walk.dtype)
    stored = stored_dtype(image_embeds.dtype)
    if image_grad:
        grads[0] = walk.take_image_grad(walk.scale / batch)
    walk.image_grad = None
    if texts_sum is not None:
        grads[1] = texts_sum.mul_(walk.scale / batch).to(stored)
    return ((walk.loss_sum / batch).to(walk.dtype), *grads)  # type: ignore[return-value]


@_local_loss.register_fake
def _(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    chunk_size: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    shapes: list[Any] = [image_embeds.shape, text_embeds.shape, (), ()]
    wide = accumulation_dtype(image_embeds.dtype)
    stored = stored_dtype(image_embeds.dtype)
    dtypes = (stored, stored, wide, wide)
    return (
        image_embeds.new_empty((), dtype=wide),
        *(
            image_embeds.new_empty(shape, dtype=dtype) if need else image_embeds.new_empty(0)
            for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
        ),
    )


_local_loss.register_autograd(LossFunction.backward, setup_context=LossFunction.setup_context)


class _LocalLoss(LossFunction):
    """The loss of one process."""

    forward = staticmethod(_local_loss)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The losses of several batches in turn, each in its own walk over tiles."""
        results = []
        for place in range(info.batch_size):
            parts = [
                value if dim is None else value.select(dim, place) for value, dim in zip(inputs, in_dims, strict=True)
            ]
            results.append(_loss_of_one_process(*parts[:-4]))  # the flags are asked of the parts themselves
        stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)
