"""The average of the weights over time, which edits better than the weights themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Average:
    """An exponential moving average with the warm-up of diffusers' `EMAModel`: equal to it for decays above a half.

    Args:
        weights: float32; the average begins as their copy.
        decay: the largest; early on it is (1 + update) / (10 + update).
        device: where the average lies. Default: where the weights are.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, device: torch.device | None = None):
        self.tensors = [weight.detach().to(device, copy=True) for weight in weights]
        self.decay, self.updates = decay, 0

    def share(self) -> float:
        """Count an update, and say how much of it the weights of now get."""
        self.updates += 1
        warm = (self.updates / (self.updates + 9)) if self.updates > 1 else 0.0
        return 1 - min(self.decay, warm)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor]) -> None:
        """Move towards the weights: one pass, and no second copy where both are on one device."""
        near = [weight.detach().to(mean.device) for weight, mean in zip(weights, self.tensors, strict=True)]
        torch._foreach_lerp_(self.tensors, near, self.share())

    def state_dict(self) -> dict[str, Any]:
        """Under the names that diffusers gives it."""
        return {"decay": self.decay, "optimization_step": self.updates, "shadow_params": self.tensors}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the tensors stay on their device, and `decay` what the flags say."""
        self.updates = state["optimization_step"]
        for mean, saved in zip(self.tensors, state["shadow_params"], strict=True):
            mean.copy_(saved)
