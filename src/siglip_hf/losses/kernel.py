"""One Triton kernel for a tile of the loss: product, softplus and derivatives, so that no logit is ever in memory.

It serves embeddings of 16 bits on a GPU. What stays in memory is the tile of derivatives in the dtype of the
embeddings, which torch's own products multiply into the gradients. Importing this module needs triton.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# (rows, columns, width of a step, warps, stages), each with the shared memory that it takes in 16 bits. The first is
# for data-centre GPUs, the second for the others (99 KB at most). With wider blocks, or fewer warps, registers spill.
_BLOCKS = ((98_304, (128, 128, 64, 8, 3)), (49_152, (128, 128, 32, 8, 4)))
_INTERPRETER_BLOCK = (16, 32, 16, 1, 1)  # several programs and steps also for small tiles
_MULTIPLE = 16  # rows of a tile are padded to as many numbers, so that they can be written in wide pieces

# How far the self-test may be off, relative to the largest value: the rounding of derivatives in 16 bits.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def weigh(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sums of the loss and of its derivatives over the pairs of some images and texts.

    Args:
        images: (R, E), contiguous.
        texts: (C, E), contiguous, in the same dtype.
        scale: (), float32, the temperature.
        bias: (), float32.
        image_ids: (R,) int64; equal numbers make a positive pair.
        text_ids: (C,) int64.
        weights: (R, C), from `tile_of_weights`: is filled with the derivatives. None if they are not wanted.

    Returns:
        Two float64 sums: of the loss, and of the derivatives in the logits (0 without `weights`).
    """
    (rows, width), columns = images.shape, len(texts)
    block_rows, block_columns, step, warps, stages = _block(images.device)
    programs = triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)
    sums = torch.empty(programs, 2, dtype=torch.float32, device=images.device)
    out = sums if weights is None else weights
    # Triton starts a kernel on the current device, which need not be that of the tensors.
    with torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext():
        _weigh_tile[(programs,)](
            *(images, texts, image_ids, text_ids, scale, bias, out, sums, rows, columns, out.stride(0)),
            WIDTH=width,
            WRITES=weights is not None,
            WIDENS=images.device.type == "cpu",
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            STEP=step,
            MULTIPLE=_MULTIPLE,
            num_warps=warps,
            num_stages=stages,
        )
    loss_sum, weight_sum = sums.sum(dim=0, dtype=torch.float64)
    return loss_sum, weight_sum


def tile_of_weights(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for derivatives (rows, columns) or fewer. The place of a row is the same for all widths of tiles."""
    padded = triton.cdiv(columns, _MULTIPLE) * _MULTIPLE
    return torch.empty(rows, padded, dtype=dtype, device=device)


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compiles the kernel and tries it on a small tile, once for each device and dtype.

    Returns:
        Why it cannot be used there, or None if it works.
    """
    try:
        difference = _try(device, dtype)
    except Exception as error:  # triton has many of its own, and the driver and the compiler have theirs
        reason = str(error).partition("\n")[0]
        return f"the loss's Triton kernel does not work here ({type(error).__name__}: {reason})"
    if not difference <= _TOLERANCE[dtype]:
        return f"the loss's Triton kernel gives other numbers here (off by {difference:.1e})"
    return None


def _try(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from the plain formula in double precision, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 72, generator=generator), dim=-1).to(dtype) for count in (70, 50))
    image_ids, text_ids = torch.arange(70) % 40, torch.arange(50)
    positive = image_ids[:, None] == text_ids
    logits = torch.where(positive, -1.0, 1.0) * (10 * images.double() @ texts.double().t() - 3)
    expected = torch.where(positive, -1.0, 1.0) * logits.sigmoid()
    weights = tile_of_weights(70, 50, dtype, device)[:, :50]
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-3.0, device=device)
    ids = image_ids.to(device), text_ids.to(device)
    loss, total = weigh(images.to(device), texts.to(device), scale, bias, *ids, weights)
    sums = torch.stack([loss.cpu() / F.softplus(logits).sum(), total.cpu() / expected.sum()])
    return max((weights.cpu().double() - expected).abs().max().item(), (sums - 1).abs().max().item())


def _block(device: torch.device) -> tuple[int, int, int, int, int]:
    """The largest block that the device's shared memory holds."""
    if device.type == "cpu":
        return _INTERPRETER_BLOCK
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return next((block for needed, block in _BLOCKS if needed < memory), _BLOCKS[-1][1])


# Rows and columns are left unspecialized: a remainder of one row, or of 16, would otherwise be compiled once more.
@triton.jit(do_not_specialize=["rows", "columns"])
def _weigh_tile(
    images,
    texts,
    image_ids,
    text_ids,
    scale,
    bias,
    weights,
    sums,
    rows,
    columns,
    stride,
    WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """One program: (BLOCK_ROWS, BLOCK_COLUMNS) pairs of the tile; see `weigh`."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (program // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    step = tl.arange(0, STEP)
    # Beyond the edge the first rows are read again, which needs no mask; those pairs are left out below.
    image = images + (row % rows).to(tl.int64)[:, None] * WIDTH + step[None, :]  # (BLOCK_ROWS, STEP)
    text = texts + (column % columns).to(tl.int64)[None, :] * WIDTH + step[:, None]  # (STEP, BLOCK_COLUMNS)
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, STEP):
        if WIDTH % STEP == 0:
            left, right = tl.load(image + start), tl.load(text + start)
        else:
            inside = start + step < WIDTH
            left = tl.load(image + start, mask=inside[None, :], other=0.0)
            right = tl.load(text + start, mask=inside[:, None], other=0.0)
        if WIDENS:  # the interpreter would multiply the bits of bfloat16 as whole numbers
            left, right = left.to(tl.float32), right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")

    in_rows, in_columns = row < rows, column < columns
    image_id = tl.load(image_ids + row, mask=in_rows, other=0)
    text_id = tl.load(text_ids + column, mask=in_columns, other=0)
    # With the sign of the positives turned, every pair is a negative one: its loss is softplus(z).
    sign = tl.where(image_id[:, None] == text_id[None, :], -1.0, 1.0)
    logits = sign * (products * tl.load(scale) + tl.load(bias))
    # softplus(z) = max(z, 0) + log(1 + e), e = exp(-|z|). The logarithm is 2 artanh(s), s = e / (2 + e) <= 1/3, as a
    # series up to s^13: it is accurate also for the small e of most pairs, for which log(1 + e) would be 0 in float32.
    e = tl.exp(-tl.abs(logits))
    s = e / (2 + e)
    q = s * s
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    losses = tl.maximum(logits, 0.0) + 2 * s * (1 + q * series)
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(sums + 2 * program, tl.sum(tl.where(inside, losses, 0.0)))
    derivatives_sum = 0.0
    if WRITES:
        derivatives = sign * tl.where(logits >= 0, 1.0, e) / (1 + e)
        place = weights + row.to(tl.int64)[:, None] * stride + column[None, :]
        # Up to the next multiple, which is the row's memory too: then 16 bytes are written at a time.
        in_memory = column < tl.cdiv(columns, MULTIPLE) * MULTIPLE
        tl.store(place, derivatives.to(weights.dtype.element_ty), mask=in_rows[:, None] & in_memory[None, :])
        derivatives_sum = tl.sum(tl.where(inside, derivatives, 0.0))
    tl.store(sums + 2 * program + 1, derivatives_sum)
