"""What an optimizer step does with the gradients: unscale, clip, AdamW, the average, the copies in half precision.

On a GPU one kernel does it all (`fused.py`); a run holds it against PyTorch's functions before it takes it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...encode.base.console import say
from ...encode.base.errors import SettingsError, reason
from ..config import TrainConfig
from .weights import Average, Precision, Weights


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
        """Change the weights, and where `averages` their average, unless a gradient is not finite.

        The gradients are gone after that. Nothing here waits for the device, but for an optimizer in 8 bits.

        Returns:
            The norm of the gradients before they are clipped, and 1 if the weights were left as they are, else 0;
            float32 scalars on the device.
        """
        gradients: list[Tensor] = [weight.grad for weight in self.weights.parameters]  # type: ignore[misc]
        scale = 1.0 if self.scale is None else self.scale.value
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))) / scale
        skipped = 1 - norm.isfinite().float()
        divisor = scale * ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # as torch.nn.utils.clip_grad_norm_
        change = self._one_pass if self.fused else self._by_torch
        change(gradients, divisor, skipped, self.average if averages else None)
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
        """Go on with the optimizer of a checkpoint, in whatever order its tensors lie; ValueError: it is another."""
        plain = all("exp_avg" in values for values in state["state"].values())
        if plain != isinstance(self.optimizer, torch.optim.AdamW) and state["state"]:
            raise ValueError(f"it was trained {'without' if plain else 'with'} --use_8bit_adam: go on in the same way")
        self.optimizer.load_state_dict(state)
        for master, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    values[name] = torch.empty_like(master, dtype=value.dtype, requires_grad=False).copy_(value)
        self._kernel = None


def make_update(config: TrainConfig, unet: torch.nn.Module, precision: Precision, processes: int) -> Update:
    """All that a step changes of a UNet, which is on its device and in float32; its weights may become copies."""
    flags, device, weights = config.optimizer, next(unet.parameters()).device, Weights(unet, precision.half)
    average = Average(weights.masters, flags.ema_decay) if flags.use_ema else None
    scale = LossScale(device) if precision.name == "fp16" else None
    optimizer = make_optimizer(config, weights, processes)
    fused = not flags.use_8bit_adam and takes_one_pass(device, precision.half)
    return Update(weights, optimizer, flags.max_grad_norm, average, scale, fused=fused)


def make_optimizer(config: TrainConfig, weights: Weights, processes: int) -> torch.optim.Optimizer:
    """AdamW over the masters, fused or in 8 bits."""
    flags = config.optimizer
    options: dict[str, Any] = {
        "lr": flags.learning_rate * (config.steps.samples(processes) if flags.scale_lr else 1),
        "betas": (flags.adam_beta1, flags.adam_beta2),
        "weight_decay": flags.adam_weight_decay,
        "eps": flags.adam_epsilon,
    }
    if not flags.use_8bit_adam:
        return torch.optim.AdamW(weights.masters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError("--use_8bit_adam needs bitsandbytes (pip install 'ip2p[gpu]'), or leave it out") from None
    return AdamW8bit(weights.masters, **options)


def takes_one_pass(device: torch.device, half: torch.dtype | None) -> bool:
    """Whether the kernel for one pass can be had, and does on small tensors what PyTorch's functions do."""
    if device.type != "cuda":
        return False
    try:
        error = disagreement(device, half)
    except Exception as error:  # whatever goes wrong between a driver, a compiler and a kernel: there is another way
        problem = reason(error)
    else:
        if error < 1e-5:
            return True
        problem = f"its kernel is off by {error:.1e}"
    say(f"the optimizer takes several passes over the weights instead of one: {problem}")
    return False


def disagreement(device: torch.device, half: torch.dtype | None) -> float:
    """How far the weights, moments and averages of both ways are apart after four steps, of which one is skipped."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        unet = torch.nn.Sequential(torch.nn.Conv2d(8, 20, 3), torch.nn.Linear(41, 1000), torch.nn.Linear(5, 3))
        for weight in unet.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = Weights(unet, half)
        average = Average(weights.masters, 0.9)
        optimizer = torch.optim.AdamW(weights.masters, lr=0.1, weight_decay=0.1, fused=True)
        update = Update(weights, optimizer, 10.0, average, fused=fused)
        for step in range(4):
            for weight in weights.parameters:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.grad = torch.empty_like(weight).copy_(noise * (torch.nan if step == 2 else 1))
            update(averages=step != 1)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        pairs = zip(weights.parameters, weights.masters, strict=True)
        stale = [copy.float() - master.to(copy).float() for copy, master in pairs]
        found.append([*weights.masters, *average.tensors, *moments, *stale])
    apart = [(one - other).abs().max() for one, other in zip(*found, strict=True)]
    return torch.stack(apart).max().item()  # which is no number where one of them is none
