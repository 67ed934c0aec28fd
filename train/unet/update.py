"""What an optimizer step does with the gradients: unscale, clip, AdamW, the average, the copies in half precision."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .average import Average
from .weights import Weights


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
        self.value.fill_(state["scale"])
        self.good_steps.fill_(state["_growth_tracker"])


@dataclasses.dataclass(eq=False)
class Update:
    """One optimizer step; on a GPU in one pass over the weights, elsewhere by PyTorch's own functions."""

    weights: Weights  # whose gradients are taken
    optimizer: torch.optim.Optimizer  # over the masters: torch's AdamW, or one in 8 bits
    max_grad_norm: float  # to which the norm of all gradients together is clipped
    average: Average | None = None  # moves along
    scale: LossScale | None = None  # of the loss that the gradients are of, for float16
    _: dataclasses.KW_ONLY
    fused: bool = False  # in one pass, by a kernel for GPUs (`takes_one_pass`)
    _kernel: Any = dataclasses.field(default=None, init=False, repr=False)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled as `__call__` expects them."""
        (loss * self.scale.value if self.scale else loss).backward()

    @torch.no_grad()
    def __call__(self, *, averages: bool = True) -> tuple[Tensor, Tensor]:
        """Change the weights, unless a gradient is not finite; the gradients are gone after that.

        Nothing here waits for the device, but for an optimizer in 8 bits.

        Args:
            averages: whether the average moves in this step.

        Returns:
            The norm of the gradients before they are clipped, and 1 if the weights were left as they are, else 0;
            float32 scalars on the device.
        """
        gradients: list[Tensor] = [weight.grad for weight in self.weights.parameters]  # type: ignore[misc]
        scale = 1.0 if self.scale is None else self.scale.value
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))) / scale
        skipped = 1 - norm.isfinite().float()
        divisor = scale * ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # as torch.nn.utils.clip_grad_norm_
        average = self.average if averages else None
        if self.fused:
            self._one_pass(gradients, divisor, skipped, average)
        else:
            self._by_torch(gradients, divisor, skipped, average)
        for weight in self.weights.parameters:
            weight.grad = None
        if self.scale:
            self.scale.update(skipped)
        return norm, skipped

    def _by_torch(self, gradients: list[Tensor], divisor: Tensor, skipped: Tensor, average: Average | None) -> None:
        if isinstance(self.optimizer, torch.optim.AdamW):
            if self.weights.half:
                for master, gradient in zip(self.weights.masters, gradients, strict=True):
                    master.grad = gradient.float()
            # The fused kernel itself reads these, as it does for a gradient scaler: nobody waits for the device.
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, skipped  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad()
        elif not skipped:
            torch._foreach_div_(gradients, divisor)
            self.optimizer.step()
        if average:
            average.step(self.weights.masters)
        self.weights.refresh()

    def _one_pass(self, gradients: list[Tensor], divisor: Tensor, skipped: Tensor, average: Average | None) -> None:
        kernel = self._kernel = self._kernel or self._make_kernel()
        steps = [self.optimizer.state[master]["step"] for master in self.weights.masters]
        torch._foreach_add_(steps, 1 - skipped)
        group = self.optimizer.param_groups[0]
        powers = torch.stack([torch.pow(beta, steps[0].double()) for beta in group["betas"]])
        numbers = torch.cat([divisor[None], (1 - powers).float(), skipped[None]])
        along = average if kernel.averages else None
        kernel(gradients, numbers, group, share=along.share() if along else None)
        if average and not along:  # it lies on another device
            average.step(self.weights.masters)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or the schedule warns that no step was taken

    def _make_kernel(self) -> Any:
        from .fused import FusedStep

        masters, state = self.weights.masters, self.optimizer.state
        for master in masters:
            if not state[master]:
                zeros = {name: torch.zeros_like(master, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                state[master].update(step=torch.zeros((), device=master.device), **zeros)
        first, second = ([state[master][name] for master in masters] for name in ("exp_avg", "exp_avg_sq"))
        average = self.average.tensors if self.average else None
        if average and average[0].device != masters[0].device:
            average = None
        return FusedStep(masters, first, second, average, self.weights.parameters if self.weights.half else None)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the optimizer of a checkpoint, whose tensors may lie in memory in another order.

        Raises:
            ValueError: it is of another optimizer.
        """
        plain = all("exp_avg" in values for values in state["state"].values())
        if plain != isinstance(self.optimizer, torch.optim.AdamW) and state["state"]:
            raise ValueError(f"it was trained {'without' if plain else 'with'} --use_8bit_adam: go on in the same way")
        self.optimizer.load_state_dict(state)
        for master, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    values[name] = torch.empty_like(master, dtype=value.dtype, requires_grad=False).copy_(value)
        self._kernel = None
