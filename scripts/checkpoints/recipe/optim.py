"""Muon for the matrices and AdamW for all else, under one schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly, of (K, rows, columns), by Newton-Schulz iteration."""
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon that treats all matrices of one shape as one batch, which on a CPU takes a tenth of torch.optim.Muon's time.

    Args:
        parameters: Matrices.
        lr: Learning rate on the scale of AdamW's: an update has a root mean square of 0.2 lr.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, members in by_shape.items():
                updates = []
                for parameter in members:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                directions = orthogonalized(torch.stack(updates))
                for parameter, direction in zip(members, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for all else, one schedule for both.

    Args:
        modules: Modules to train.
        others: Further parameters for AdamW.
        muon_lr: Peak learning rate of Muon.
        adamw_lr: Peak learning rate of AdamW.
        weight_decay: On matrices only.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        others: list[nn.Parameter],
        *,
        muon_lr: float = 2e-3,
        adamw_lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        named = [(name, p) for module in modules for name, p in module.named_parameters()]
        matrices = [p for name, p in named if p.ndim == 2 and ("layers" in name or "head" in name)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named] + others
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1] + others, "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.98)),
        ]
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, loss: Tensor | None, progress: float) -> None:
        """One step; `progress` in 0..1 through the stage sets the rate: warm-up, constant, linear to zero.

        Args:
            loss: To be differentiated; None if the gradients are there already.
            progress: See above.
        """
        if loss is not None:
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, progress / 0.02 + 0.02, (1.0 - progress) / 0.45)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * max(factor, 0.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
