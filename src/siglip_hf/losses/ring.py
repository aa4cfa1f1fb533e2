"""The sigmoid loss of a batch that is spread over processes, with memory flat in their number.

Source: Zhai et al. (2023), section 3.3: the images stay, blocks of texts are passed from process to process. Here their
gradients travel behind them, so that nothing is gathered and the backward pass needs no communication.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_hf.losses.tiles import LossFunction, Tiles, stored_dtype

# Messages between the same two processes are told apart by their tag (two processes are each other's both neighbours).
_TEXTS, _IDS, _GRADS = range(3)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable  # messages between processes are no part of a graph
def ring_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    chunk_size: int,
    needs: list[bool],
    group: dist.ProcessGroup,
    problem: str,
) -> Tensor:
    """`sigmoid_loss` over a process group; see there for what its value and gradients mean.

    Args:
        image_embeds: (B_r, E), this process's part, in the dtype of the matrix products.
        text_embeds: (B_r, E), likewise.
        logit_scale: ().
        logit_bias: ().
        positives: (B_r,) integers or None.
        chunk_size: Side of a tile.
        needs: Whether a gradient in each of the four tensors is wanted here.
        group: The process group.
        problem: What is wrong with this process's part, or an empty string: all must know before any stops.
    """
    sizes, needs = _agree(image_embeds, text_embeds, positives, needs, group, problem)
    inputs = (image_embeds, text_embeds, logit_scale, logit_bias, positives, chunk_size, needs, group, sizes)
    return _RingLoss.apply(*inputs)[0]


class _Ring:
    """The two neighbours of this process, and the messages on their way. Texts go down in rank, one place per step."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.down = dist.get_global_rank(group, (self.rank - 1) % self.world)
        self.up = dist.get_global_rank(group, (self.rank + 1) % self.world)

    def pass_on(self, messages: list[tuple[int, Tensor, Tensor]]) -> list[dist.Work]:
        """Start to send the first tensor of each (tag, out, in) down and to fill the second from above."""
        operations = []
        for tag, outgoing, incoming in messages:
            # A process without pairs has nothing to say; both ends know, as every size is known to all.
            if outgoing.numel():
                operations.append(dist.P2POp(dist.isend, outgoing, self.down, self.group, tag))
            if incoming.numel():
                operations.append(dist.P2POp(dist.irecv, incoming, self.up, self.group, tag))
        return dist.batch_isend_irecv(operations) if operations else []


def _loss_and_gradients(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor | None,
    chunk_size: int,
    needs: list[bool],
    group: dist.ProcessGroup,
    sizes: list[int],
) -> tuple[Tensor, ...]:
    """The loss of the whole batch and this process's gradients in images, texts, scale and bias."""
    ring = _Ring(group)
    image_grad, text_grad, scale_grad, bias_grad = needs
    batch = sum(sizes)
    walk = Tiles(images, logit_scale, logit_bias, chunk_size, image_grad or (scale_grad and not text_grad))

    block, ids = texts.contiguous(), None if positives is None else positives.long().contiguous()
    travelling = texts.new_empty(0)  # the gradient of `block` as summed by the processes it has visited
    for step in range(ring.world):
        # While the tiles of this block are computed, the next block comes in, and so does what the process above has
        # summed for this one.
        upcoming = sizes[(ring.rank + step + 1) % ring.world] if step + 1 < ring.world else 0
        next_block, next_ids = texts.new_empty(upcoming, texts.shape[1]), None
        messages = []
        if step + 1 < ring.world:
            messages.append((_TEXTS, block, next_block))
            if ids is not None:
                next_ids = ids.new_empty(upcoming)
                messages.append((_IDS, ids, next_ids))
        share = torch.zeros_like(block, dtype=walk.dtype) if text_grad else None
        earlier = None
        if share is not None and step > 0:
            earlier = torch.empty_like(share)
            messages.append((_GRADS, travelling, earlier))
        works = ring.pass_on(messages)
        with torch.autocast(images.device.type, enabled=False):
            walk.add(block, share, bias_grad=bias_grad, aligned=step == 0, image_ids=positives, text_ids=ids)
        for work in works:
            work.wait()
        if share is not None:
            travelling = share if earlier is None else share.add_(earlier)
        block, ids = next_block, next_ids
    text_sum = travelling
    if text_grad and ring.world > 1:
        text_sum = torch.empty_like(texts, dtype=walk.dtype)  # one more place, and each gradient is at home
        for work in ring.pass_on([(_GRADS, travelling, text_sum)]):
            work.wait()

    scale_sum = torch.zeros_like(walk.loss_sum)
    if scale_grad and walk.image_grad is not None:
        scale_sum = walk.scale_sum(images, walk.image_grad)
    elif scale_grad:
        scale_sum = walk.scale_sum(texts, text_sum)
    totals = torch.stack([walk.loss_sum, scale_sum, walk.bias_sum])
    dist.all_reduce(totals, group=group)
    # Clones, as a view could not be changed in place by the caller.
    loss, *scalars = (total.clone() for total in (totals / batch).to(walk.dtype))

    # The derivative of the sum over the processes' equal values, hence the factor: see sigmoid_loss.
    factor = walk.scale * (ring.world / batch)
    stored = stored_dtype(images.dtype)
    none = images.new_empty(0)
    image_out = walk.take_image_grad(factor) if image_grad else none
    text_out = text_sum.mul_(factor).to(stored) if text_grad else none
    return loss, image_out, text_out, *scalars


class _RingLoss(LossFunction):
    """The loss of a group. All work is done in the forward pass, as in the form for one process."""

    forward = staticmethod(_loss_and_gradients)


@functools.cache
def control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes that exchanges tensors on the CPU; all of them must call.

    What a CPU must know before it goes on, such as sizes, would wait on an accelerator for all that was begun there.

    Args:
        group: The group; it is its own control group if it can do this itself, otherwise one of gloo is made once.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _agree(
    images: Tensor,
    texts: Tensor,
    positives: Tensor | None,
    needs: list[bool],
    group: dist.ProcessGroup,
    problem: str,
) -> tuple[list[int], list[bool]]:
    """The batch size of every process, and what gradients any of them needs.

    Raises:
        ValueError: On every process alike, so that none waits for one that has stopped.
    """
    width = texts.shape[-1] if texts.dim() == 2 else 0
    dtype = _DTYPES.index(images.dtype) if images.dtype in _DTYPES else -1
    mine = [bool(problem), len(texts) if texts.dim() else 0, width, dtype, positives is not None, *needs]
    row = torch.tensor([int(value) for value in mine])
    table = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(table, row, group=control_group(group))
    problems, sizes, widths, dtypes, with_ids, *wanted = torch.stack(table, dim=1).tolist()
    if problem:
        raise ValueError(problem)
    if any(problems):
        raise ValueError(f"Process {problems.index(1)} of the group was given embeddings or positives that do not fit.")
    for name, values in (("embedding size", widths), ("dtype", dtypes), ("presence of positives", with_ids)):
        if len(set(values)) > 1:
            shown = [_DTYPES[value] for value in values] if name == "dtype" else values
            raise ValueError(f"The {name} must be the same on all processes of the group, but is {shown}.")
    if sum(sizes) == 0:
        raise ValueError("No process of the group has any pair: the loss of no pairs is not defined.")
    return sizes, [any(column) for column in wanted]
