"""The scale of the loss in float16."""

from typing import Any

import torch
from torch import Tensor

from .fit import fit


class LossScale:
    """The factor that keeps gradients of float16 above its smallest numbers (arXiv 1710.03740, section 3.2).

    The rule and the numbers of `torch.amp.GradScaler`, which refuses gradients that are float16 themselves.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device):
        self.value = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """Halve it after a step that overflowed, double it after many that did not."""
        torch._amp_update_scale_(self.value, self.good_steps, skipped, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def state_dict(self) -> dict[str, Any]:
        """As that of `GradScaler`."""
        return {
            "scale": self.value.item(),
            "growth_factor": self.GROWTH,
            "backoff_factor": self.BACKOFF,
            "growth_interval": self.INTERVAL,
            "_growth_tracker": self.good_steps.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, or raise Misfit."""
        fit(state, {"scale": 0.0, "_growth_tracker": 0})
        self.value.fill_(state["scale"])
        self.good_steps.fill_(state["_growth_tracker"])
