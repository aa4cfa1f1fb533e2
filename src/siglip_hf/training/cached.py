"""One exact optimizer step on a batch that is larger than memory.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021). The loss sees the
model only through the embeddings, so their gradients can be computed first, and each micro-batch be sent back alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from siglip_hf.losses.sigmoid import sigmoid_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The inputs of the text tower; all others are the image tower's.
_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
# Where a backward pass starts: a tensor and the gradient of the loss in it, either of which may be missing.
_Root = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class CachedLoss:
    """What `cached_backward` has computed; nothing here has a graph.

    Attributes:
        loss: Scalar, that of the whole batch (with a group, of all its processes).
        image_embeds: (B, E), of this process, in the order of the micro-batches.
        text_embeds: (B, E).
    """

    loss: Tensor
    image_embeds: Tensor
    text_embeds: Tensor


def cached_backward(
    model: nn.Module,
    micro_batches: Iterable[Mapping[str, Any]],
    *,
    group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    positives: Tensor | None = None,
    keep_graphs: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> CachedLoss:
    """Adds to every parameter's `grad` the gradient of the sigmoid loss of all micro-batches as one batch.

    All micro-batches are embedded without a graph, the loss gives the gradient of each embedding, then each micro-batch
    is embedded again, with the random numbers of the first time, and sent back. Memory is that of one micro-batch plus
    the embeddings. The gradients are those of the large batch; ordinary accumulation leaves out all pairs between
    micro-batches.

    M micro-batches cost one backward pass and 2 - keep_graphs / M forward passes. There is no exact way below that:
    what backward needs is either kept or computed again. A tower that is frozen, and draws no random numbers, is run
    only once.

    Args:
        model: A `SiglipModel`, or one wrapped in DDP, sharded by `fully_shard` or compiled: a module that when called
            returns `image_embeds` and `text_embeds`, and owns `logit_scale` and `logit_bias`. DDP and FSDP exchange
            gradients once, with the last micro-batch, or not at all inside the caller's `no_sync`.
        micro_batches: Keyword arguments of the model, such as `input_ids` and `pixel_values`. Sizes may differ. With
            DDP their number may differ between processes; with FSDP it may not. Tensors may wait on the CPU: each
            micro-batch is moved to the model's device for itself. `image_embeds` (B, E), L2-normalized, may stand in
            for pictures, as stored by locked-image tuning.
        group: Process group over which the loss is global. By default that of DDP; to be given with FSDP.
        chunk_size: See `sigmoid_loss`.
        positives: (B,) integers for the whole batch of this process; see `sigmoid_loss`.
        keep_graphs: How many micro-batches, from 1 to M, keep what backward needs from the first time, and so are run
            only once. The first costs no memory beyond the one graph that is needed anyway. With DDP and FSDP, one
            micro-batch is always run again.
        scaler: Scales the loss for float16. The returned loss is not scaled.

    Returns:
        The loss and the embeddings, all detached.

    Raises:
        ValueError: Without micro-batches, without anything to train, for `keep_graphs` below 1, and for a model or
            micro-batch that does not give both kinds of embeddings.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("micro_batches is empty: a step needs at least one.")
    if keep_graphs < 1:
        raise ValueError(f"keep_graphs must be at least 1, but is {keep_graphs}.")
    owner = owner_of_scale(model)
    if group is None:
        group = getattr(model, "process_group", None)
    # The first ones are embedded again, the others keep their graphs. The exchange of gradients is prepared by a
    # forward pass, which must come after the loss on every process: one at least is embedded again then.
    exchanges = hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync")
    repeated = max(len(batches) - keep_graphs, 1 if exchanges else 0)

    visits: list[_Visit] = []
    for index, batch in enumerate(batches):
        # The last one always has a graph: it shows what is trained.
        grad = index >= repeated or index == len(batches) - 1
        with _gradient_exchange(model, False), torch.set_grad_enabled(grad):
            visits.append(_Visit(model, batch))

    with torch.enable_grad():
        scalars = [whole_parameter(owner.logit_scale), whole_parameter(owner.logit_bias)]
        leaves = [
            torch.cat([visit.images.detach() for visit in visits]).requires_grad_(visits[-1].images.requires_grad),
            torch.cat([visit.texts.detach() for visit in visits]).requires_grad_(visits[-1].texts.requires_grad),
            *(scalar.detach().requires_grad_(scalar.requires_grad) for scalar in scalars),
        ]
        if not any(leaf.requires_grad for leaf in leaves):
            raise ValueError("Nothing to train: no parameter that the loss depends on requires a gradient.")
        loss = sigmoid_loss(*leaves, positives=positives, chunk_size=chunk_size, group=group)
        scaled = loss if scaler is None else scaler.scale(loss)
    _send_back([(scaled, torch.ones_like(scaled))])

    image_grads = _parts(leaves[0].grad, [len(visit.images) for visit in visits])
    text_grads = _parts(leaves[1].grad, [len(visit.texts) for visit in visits])
    # DDP waits for every parameter in the one backward pass that exchanges, so scale and bias take part in that.
    ends: list[_Root] = [(scalar, leaf.grad) for scalar, leaf in zip(scalars, leaves[2:], strict=True)]

    roots = [] if repeated else ends
    for index in range(repeated, len(batches)):
        roots = [*roots, (visits[index].images, image_grads[index]), (visits[index].texts, text_grads[index])]
    with _gradient_exchange(model, False):
        _send_back(roots)
    trained = (leaves[0].requires_grad, leaves[1].requires_grad)
    for index in range(repeated):
        exchange = index == repeated - 1
        with _gradient_exchange(model, exchange), torch.enable_grad():
            images, texts = visits[index].repeat(model, *trained)
            roots = [(images, image_grads[index]), (texts, text_grads[index])]
            _send_back([*roots, *ends] if exchange else roots)
    return CachedLoss(loss.detach(), leaves[0].detach(), leaves[1].detach())


class _Visit:
    """A micro-batch and its embeddings, with what it takes to compute them again."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]):
        devices = {parameter.device for parameter in model.parameters()}
        self.batch = batch
        self.state = _random_state(devices)
        self.images, self.texts = embed_pairs(model, batch)
        for name, embeds in (("image_embeds", self.images), ("text_embeds", self.texts)):
            if embeds is None:
                raise ValueError(
                    f"The model returned no {name} for a micro-batch of {sorted(batch)}: the loss needs both kinds."
                )
        self.drew = any(not torch.equal(after, self.state[device]) for device, after in _random_state(devices).items())

    def repeat(self, model: nn.Module, images: bool, texts: bool) -> tuple[Tensor | None, Tensor | None]:
        """Embed again with the random numbers of the first time; a tower that is not trained is left out.

        It is run all the same if random numbers were drawn, as the other tower's depend on their order.
        """
        batch = self.batch
        if not (images or texts):
            return None, None
        if not (images and texts) and not self.drew:
            batch = {name: value for name, value in batch.items() if (name in _TEXT_INPUTS) == texts}
        present = _random_state(self.state)
        _set_random_state(self.state)
        try:
            return embed_pairs(model, batch)
        finally:
            _set_random_state(present)


def embed_pairs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The embeddings of a micro-batch of images and texts, in a graph where gradients are on; None for what is missing.

    Args:
        model: A SigLIP model, possibly in wrappers.
        batch: Its inputs; `image_embeds` (B, E) among them are handed through.

    Returns:
        Images and texts, (B, E) each.
    """
    # Autocast keeps the weights it has converted. Converted without a graph, they would have no gradient later.
    torch.clear_autocast_cache()
    inputs = on_device(batch, next(model.parameters()).device)
    stored = inputs.pop("image_embeds", None)
    output = model(**inputs, return_dict=True) if inputs else None
    images, texts = (None, None) if output is None else (output.image_embeds, output.text_embeds)
    return images if stored is None else stored, texts


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch whose tensors have left the CPU for the model's device.

    Args:
        batch: Inputs of the model and other values; those that are no tensors stay as they are.
        device: Where to.
    """
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in batch.items()
    }


def _send_back(roots: list[_Root]) -> None:
    """One backward pass from the tensors that have a gradient, outside of autocast, as PyTorch asks for."""
    given = [(value, grad) for value, grad in roots if value is not None and grad is not None]
    if given:
        with torch.autocast(given[0][0].device.type, enabled=False):
            torch.autograd.backward([value for value, _ in given], [grad for _, grad in given])


def _parts(grad: Tensor | None, sizes: list[int]) -> list[Any]:
    """The gradient of each micro-batch, or None for each."""
    return [None] * len(sizes) if grad is None else list(grad.split(sizes))


def owner_of_scale(model: nn.Module) -> Any:
    """The model inside of wrappers such as DDP.

    Raises:
        ValueError: If there is no SigLIP model in them.
    """
    inner: Any = model
    while not hasattr(inner, "logit_scale"):
        if not hasattr(inner, "module"):
            raise ValueError(f"{type(model).__name__} has no logit_scale and logit_bias: the loss needs a SiglipModel.")
        inner = inner.module
    return inner


def whole_parameter(parameter: Tensor) -> Tensor:
    """The full tensor of a parameter that FSDP may have sharded; any shape."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@contextmanager
def _gradient_exchange(model: nn.Module, exchange: bool) -> Iterator[None]:
    """Let DDP or FSDP exchange gradients between processes, as the caller has it set, or keep them from it."""
    if not exchange and hasattr(model, "no_sync"):
        with model.no_sync():  # type: ignore[operator]
            yield
    elif exchange or not hasattr(model, "set_requires_gradient_sync"):
        yield
    else:
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]


def _random_state(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """The state of PyTorch's random number generators, that of the CPU among them."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_state(states: Mapping[torch.device, Tensor]) -> None:
    """Undo what was drawn since `_random_state`."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
