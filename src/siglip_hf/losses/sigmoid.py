"""The pairwise sigmoid loss of SigLIP, exact and in blocks.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), section 3.2 and algorithm 1. Every pair of
an image and a text is a term of its own, so the B x B matrix of logits is walked in tiles and never held;
`loss_ring.py` carries the walk across processes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    grad = torch.is_grad_enabled()
    needs = [grad and value.requires_grad for value in inputs]
    if group is None:
        return _local_loss(*inputs, positives, chunk_size, *needs)[0]
    from siglip_hf.losses.ring import ring_loss

    return ring_loss(*inputs, positives, chunk_size, needs, group, problem)


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


class Tiles:
    """Sums over the pairs of images with one or more blocks of texts, and the unscaled gradients of the loss.

    With G_ij the derivative of the summed loss in z_ij, `add` leaves in `image_grad` the sum over blocks of G @ texts,
    in the caller's `text_grad` G^T @ images, and in `loss_sum` and `bias_sum` the sums of the loss and of G.
    """

    def __init__(self, images: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk_size: int, image_grad: bool):
        self.images = images
        self.dtype = accumulation_dtype(images.dtype)
        self.fused = _can_fuse(images.device)
        self.scale = logit_scale.to(self.dtype).exp()
        self.bias = logit_bias.to(self.dtype)
        self.chunk_size = chunk_size
        self.image_grad = torch.zeros_like(images, dtype=self.dtype) if image_grad else None
        # A million pairs make thousands of tiles: their sums are added in double precision where the device has it.
        wide = self.dtype if images.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=wide, device=images.device)
        self.bias_sum = torch.zeros_like(self.loss_sum)

    def add(
        self,
        texts: Tensor,
        text_grad: Tensor | None,
        *,
        bias_grad: bool,
        aligned: bool,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> None:
        """Walk the tiles of images x texts.

        Args:
            texts: (M, E), a block of texts in the dtype of the images.
            text_grad: (M, E) accumulator, or None if it is not wanted.
            bias_grad: Whether the sum of G is wanted.
            aligned: Whether text j belongs to image j. Not used with ids.
            image_ids: (B,) integers; equal numbers make a positive pair.
            text_ids: (M,) integers.
        """
        size = self.chunk_size
        wants_grad = bias_grad or text_grad is not None or self.image_grad is not None
        rows, columns = (min(size, len(part)) for part in (self.images, texts))
        buffer = torch.empty(rows * columns, dtype=self.dtype, device=texts.device)
        for top in range(0, len(self.images), size):
            images = self.images[top : top + size]  # (R, E)
            for left in range(0, len(texts), size):
                block = texts[left : left + size]  # (C, E)
                tile = buffer[: len(images) * len(block)].view(len(images), len(block))  # (R, C)
                _product(images, block.t(), tile)
                if self.fused and wants_grad:
                    ids = (
                        ()
                        if image_ids is None or text_ids is None
                        else (image_ids[top:][:size], text_ids[left:][:size])
                    )
                    diagonal = aligned and not ids and top == left
                    weights, loss_sum, bias_sum = _fused()(tile, self.scale, self.bias, ids, diagonal, texts.dtype)
                    self.loss_sum += loss_sum
                    self.bias_sum += bias_sum
                    self._add_gradients(weights, images, block, top, left, text_grad)
                    continue
                tile.mul_(self.scale).add_(self.bias)
                # With the sign of the positives turned, every pair is a negative one: its loss is softplus(z), and both
                # that and its derivative are accurate however sure the model is, where softplus(z) - z would cancel.
                mask = None
                if image_ids is not None and text_ids is not None:
                    mask = image_ids[top : top + size, None] == text_ids[left : left + size]
                turn = aligned and mask is None and top == left
                _negate(tile, mask, turn)
                self.loss_sum += F.softplus(tile).sum()
                if not wants_grad:
                    continue
                tile.sigmoid_()
                _negate(tile, mask, turn)
                if bias_grad:
                    self.bias_sum += tile.sum()
                self._add_gradients(tile.to(texts.dtype), images, block, top, left, text_grad)

    def _add_gradients(
        self, weights: Tensor, images: Tensor, texts: Tensor, top: int, left: int, text_grad: Tensor | None
    ) -> None:
        """Add what the derivatives (R, C) of one tile give for its images (R, E) and texts (C, E)."""
        if self.image_grad is not None:
            _add_product(self.image_grad[top : top + len(images)], weights, texts)
        if text_grad is not None:
            _add_product(text_grad[left : left + len(texts)], weights.t(), images)

    def scale_sum(self, embeds: Tensor, embed_grad: Tensor) -> Tensor:
        """Sum of G_ij * d z_ij / d logit_scale, as sum_i <embeds_i, embed_grad_i> * exp(logit_scale): no B x B pass."""
        total = torch.zeros_like(self.loss_sum)
        for top in range(0, len(embeds), self.chunk_size):
            part = slice(top, top + self.chunk_size)
            total += (embeds[part] * embed_grad[part]).sum(dtype=total.dtype)
        return total * self.scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What embeddings of `dtype` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are kept in until backward: the range of fp16 is too small for them before loss scaling."""
    return torch.float32 if dtype == torch.float16 else dtype


def _negate(tile: Tensor, mask: Tensor | None, diagonal: bool) -> None:
    """Turn the sign of the positive pairs, given by a mask (R, C) or as the diagonal."""
    if mask is not None:
        torch.where(mask, -tile, tile, out=tile)
    elif diagonal:
        tile.diagonal().neg_()


def _can_fuse(device: torch.device) -> bool:
    """Whether inductor makes one kernel of what is done to a tile. A GPU waits for memory there; a CPU does not."""
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return has_triton()


@functools.cache
def _fused() -> Any:
    return torch.compile(_weigh, dynamic=True)


def _weigh(
    products: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, ...], diagonal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The pointwise part of a tile in one function, as `Tiles.add` does it in place.

    Args:
        products: (R, C) <image, text>.
        scale: (), the temperature.
        bias: ().
        ids: numbers (R,) of the images and (C,) of the texts, or nothing.
        diagonal: Whether text j belongs to image j, where there are no ids.
        dtype: That of the derivatives.

    Returns:
        The derivatives G (R, C), the sum of the loss and that of G.
    """
    logits = products * scale + bias
    if ids:
        positive = ids[0][:, None] == ids[1]
    elif diagonal:
        rows, columns = (torch.arange(n, device=products.device) for n in products.shape)
        positive = rows[:, None] == columns
    else:
        positive = torch.zeros((), dtype=torch.bool, device=products.device)
    logits = torch.where(positive, -logits, logits)
    weights = torch.where(positive, -logits.sigmoid(), logits.sigmoid())
    return weights.to(dtype), F.softplus(logits).sum(), weights.sum()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where `out` may be wider than the factors."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b, where the accumulator may be wider than the factors."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    elif a.is_cuda:
        accumulator += torch.mm(a, b, out_dtype=accumulator.dtype)
    else:
        accumulator += torch.mm(a, b)


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
        assert walk.image_grad is not None
        grads[0] = walk.image_grad.mul_(walk.scale / batch).to(stored)
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


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the forward pass has made, and the dtypes in which autograd expects them."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [value.dtype for value in inputs[:4]]
    ctx.others = len(inputs) - 4


def scale_gradients(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The saved gradients times that of the loss.

    Raises:
        RuntimeError: Under `create_graph=True`: the saved gradients are constants, so that a second derivative would
            silently miss them.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("sigmoid_loss can be differentiated only once: do not use create_graph=True with it.")
    grads = [
        (grad * loss_grad).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*grads, *(None for _ in range(ctx.others)))


_local_loss.register_autograd(scale_gradients, setup_context=save_gradients)
