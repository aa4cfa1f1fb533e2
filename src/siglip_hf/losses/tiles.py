"""One process's work on the sigmoid loss: a walk over tiles of the B x B matrix of logits, which is never held.

Both forms of the loss stand on it, that of one process (`sigmoid.py`) and that of a group (`ring.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Tiles:
    """Sums over the pairs of images with one or more blocks of texts, and the unscaled gradients of the loss.

    With G_ij the derivative of the summed loss in z_ij, `add` leaves in `image_grad` the sum over blocks of G @ texts
    (a tensor for each `chunk_size` rows), in the caller's `text_grad` G^T @ images, and in `loss_sum` and `bias_sum`
    the sums of the loss and of G.
    """

    def __init__(self, images: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk_size: int, image_grad: bool):
        self.images = images.contiguous()
        self.dtype = accumulation_dtype(images.dtype)
        self.form = _form(images.device, images.dtype)
        self.scale = logit_scale.to(self.dtype).exp()
        self.bias = logit_bias.detach().to(self.dtype)
        self.chunk_size = chunk_size
        self.image_grad: list[Tensor] | None = None
        self._whole: Tensor | None = None
        if image_grad:
            # Gradients stored in another dtype: a tensor per row of tiles, so that both are never there as a whole.
            if stored_dtype(images.dtype) == self.dtype:
                self._whole = torch.zeros_like(self.images, dtype=self.dtype)
                self.image_grad = list(self._whole.split(chunk_size))
            else:
                self.image_grad = [torch.zeros_like(part, dtype=self.dtype) for part in self.images.split(chunk_size)]
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
            texts: (M, E), contiguous, a block of texts in the dtype of the images.
            text_grad: (M, E) accumulator, or None if it is not wanted.
            bias_grad: Whether the sum of G is wanted.
            aligned: Whether text j belongs to image j. Not used with ids.
            image_ids: (B,) integers; equal numbers make a positive pair.
            text_ids: (M,) integers.
        """
        size = self.chunk_size
        wants_grad = bias_grad or text_grad is not None or self.image_grad is not None
        form = self.form if wants_grad or self.form == "triton" else "plain"
        if form != "plain" and (image_ids is None or text_ids is None):
            # With numbers always there, a kernel is compiled once for diagonal, other and numbered tiles alike.
            image_ids = torch.arange(len(self.images), device=texts.device)
            text_ids = image_ids if aligned else image_ids.new_full(texts.shape[:1], -1)
        memory = self._memory(form, texts, wants_grad)
        for top in range(0, len(self.images), size):
            images = self.images[top : top + size]  # (R, E)
            for left in range(0, len(texts), size):
                block = texts[left : left + size]  # (C, E)
                ids = None
                if image_ids is not None and text_ids is not None:
                    ids = (image_ids[top : top + size], text_ids[left : left + size])
                weights, loss_sum, bias_sum = self._weigh_tile(
                    form, images, block, ids, aligned and top == left, wants_grad, memory
                )
                self.loss_sum += loss_sum
                if wants_grad:
                    self.bias_sum += bias_sum
                    self._add_gradients(weights.to(texts.dtype), images, block, top, left, text_grad)

    def _memory(self, form: str, texts: Tensor, wants_grad: bool) -> Tensor:
        """Memory for one tile, in which all have their turn: products, or derivatives in the dtype of the texts."""
        rows, columns = (min(self.chunk_size, len(part)) for part in (self.images, texts))
        if form == "triton":
            rows = rows if wants_grad else 0
            return _triton_kernel().tile_of_weights(rows, columns, texts.dtype, texts.device)
        # Two numbers at least: for a buffer of one, the kernel would be compiled once more.
        return torch.empty(max(2, rows * columns), dtype=self.dtype, device=texts.device)

    def _weigh_tile(
        self,
        form: str,
        images: Tensor,
        texts: Tensor,
        ids: tuple[Tensor, Tensor] | None,
        diagonal: bool,
        wants_grad: bool,
        memory: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives (R, C), the sum of the loss and that of the derivatives."""
        rows, columns = len(images), len(texts)
        if form == "triton" and ids is not None:
            tile = memory[:rows, :columns]
            sums = _triton_kernel().weigh(images, texts, self.scale, self.bias, *ids, tile if wants_grad else None)
            return tile, *sums
        tile = memory[: rows * columns].view(rows, columns)  # (R, C)
        _product(images, texts.t(), tile)
        if form == "inductor" and ids is not None:
            return _fused_weigh(tile, self.scale, self.bias, *ids, texts.dtype)
        return self._weigh_in_place(tile, ids, diagonal, wants_grad)

    def _weigh_in_place(
        self, tile: Tensor, ids: tuple[Tensor, Tensor] | None, diagonal: bool, wants_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_weigh` returns, in the memory of the tile (R, C): a CPU holds it in its cache meanwhile."""
        tile.mul_(self.scale).add_(self.bias)
        # With the sign of the positives turned, every pair is a negative one: its loss is softplus(z), and both that
        # and its derivative are accurate however sure the model is, where softplus(z) - z would cancel.
        mask = ids[0][:, None] == ids[1] if ids else None
        _negate(tile, mask, diagonal)
        loss_sum = F.softplus(tile).sum()
        if wants_grad:
            _negate(tile.sigmoid_(), mask, diagonal)
        return tile, loss_sum, tile.sum() if wants_grad else loss_sum

    def _add_gradients(
        self, weights: Tensor, images: Tensor, texts: Tensor, top: int, left: int, text_grad: Tensor | None
    ) -> None:
        """Add what the derivatives (R, C) of one tile give for its images (R, E) and texts (C, E)."""
        if self.image_grad is not None:
            _add_product(self.image_grad[top // self.chunk_size], weights, texts)
        if text_grad is not None:
            _add_product(text_grad[left : left + len(texts)], weights.t(), images)

    def scale_sum(self, embeds: Tensor, embed_grad: Tensor | list[Tensor]) -> Tensor:
        """Sum of G_ij * d z_ij / d logit_scale, as sum_i <embeds_i, embed_grad_i> * exp(logit_scale): no B x B pass."""
        total = torch.zeros_like(self.loss_sum)
        grads = embed_grad.split(self.chunk_size) if isinstance(embed_grad, Tensor) else embed_grad
        for part, grad in zip(embeds.split(self.chunk_size), grads, strict=True):
            total += (part * grad).sum(dtype=total.dtype)
        return total * self.scale

    def take_image_grad(self, factor: Tensor) -> Tensor:
        """The gradient (B, E) times a factor, as it is stored until backward; nothing is left here."""
        parts, self.image_grad = self.image_grad, None
        assert parts is not None
        stored = stored_dtype(self.images.dtype)
        for index, part in enumerate(parts):
            parts[index] = part.mul_(factor).to(stored)
        return torch.cat(parts) if self._whole is None else self._whole


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


@functools.cache
def _form(device: torch.device, dtype: torch.dtype) -> str:
    """What makes a tile: "triton" (product and all in one kernel), "inductor" (one kernel behind the product), "plain".

    A GPU waits for memory between the steps, a CPU does not. Products in float32 are torch's own, whose precision
    (TF32 or not) is the user's to choose.
    """
    if device.type != "cuda":
        return "plain"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "plain"
    if dtype not in (torch.bfloat16, torch.float16):
        return "inductor"
    if reason := _triton_kernel().why_not(device, dtype):
        logger.warning("%s; the loss uses torch.compile's kernel, which takes more memory", reason)
        return "inductor"
    return "triton"


def _triton_kernel() -> Any:
    from siglip_hf.losses import kernel  # needs triton, which only CUDA builds of torch bring along

    return kernel


@functools.cache
def _compiled_weigh() -> Any:
    return torch.compile(_weigh, dynamic=True)


def _fused_weigh(
    products: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`_weigh` as one kernel, compiled once for tiles of every shape: also for those of one row, or square ones."""
    from torch._dynamo.decorators import mark_unbacked  # takes long to import, as torch.compile itself does

    image_ids, text_ids = image_ids.clone(), text_ids.clone()  # a slice's place in its tensor would be compiled in
    for value in (products, image_ids, text_ids):
        for dimension in range(value.dim()):
            mark_unbacked(value, dimension)
    return _compiled_weigh()(products, scale, bias, image_ids, text_ids, dtype)


def _weigh(
    products: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The pointwise part of a tile in one function.

    Args:
        products: (R, C) <image, text>.
        scale: (), the temperature.
        bias: ().
        image_ids: (R,) int64; equal numbers make a positive pair.
        text_ids: (C,) int64.
        dtype: That of the derivatives.

    Returns:
        The derivatives G (R, C), the sum of the loss and that of G.
    """
    positive = image_ids[:, None] == text_ids
    logits = products * scale + bias
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
    elif _adds_to_wider(a.device, a.dtype):
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    elif a.is_cuda:
        accumulator += torch.mm(a, b, out_dtype=accumulator.dtype)
    else:
        accumulator += torch.mm(a, b)


@functools.cache
def _adds_to_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of 16 bits to float32 in one step there; not every version and device does."""
    factor = torch.eye(16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return torch.equal(total, 1 + factor.float())


class LossFunction(torch.autograd.Function):
    """How both forms of the loss meet autograd: their forward pass returns the loss and its four gradients.

    Its inputs begin with images, texts, scale and bias; its outputs are the loss and the gradients in these.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients that the forward pass has made, and the dtypes in which autograd expects them."""
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = [value.dtype for value in inputs[:4]]
        ctx.others = len(inputs) - 4

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times that of the loss.

        Raises:
            RuntimeError: Under `create_graph=True`, which torch.func.grad always sets: the saved gradients are
                constants, so that a second derivative would silently miss them.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sigmoid_loss can be differentiated only once, by backward() or torch.autograd.grad: do not use "
                "create_graph=True or torch.func.grad with it."
            )
        grads = [
            (grad * loss_grad).to(dtype) if needed else None
            for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*grads, *(None for _ in range(ctx.others)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Forward mode is refused.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "sigmoid_loss has no forward-mode derivative (jvp, jacfwd, dual tensors): use backward() or "
            "torch.autograd.grad."
        )
