"""What an optimizer step does with the gradients: unscale, clip, AdamW, the average, the copies in half precision.

On a GPU one kernel does it all (`fused.py`); a run holds it against PyTorch's functions before it takes it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...encode.base.console import say
from ...encode.base.errors import SettingsError, explained, reason
from ..config import TrainConfig
from .fit import fit
from .weights import Average, LossScale, Precision, Weights


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

    def __post_init__(self) -> None:
        """Give AdamW its moments, as its first step would."""
        for master in self.weights.masters if isinstance(self.optimizer, torch.optim.AdamW) else ():
            if not self.optimizer.state[master]:
                zeros = {name: torch.zeros_like(master, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[master] = {"step": torch.zeros((), device=master.device)} | zeros

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
        torch._foreach_add_(steps, [1 - skipped] * len(steps))  # a single tensor it would read, and wait for the device
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
        first, second = ([state[master][name] for master in masters] for name in ("exp_avg", "exp_avg_sq"))
        average = self.average.tensors if self.average else None
        if average and average[0].device != masters[0].device:
            average = None
        return FusedStep(masters, first, second, average, self.weights.parameters if self.weights.half else None)

    def state_dict(self) -> dict[str, Any]:
        """The moments; learning rate, betas and the like are those of the flags, when a run goes on as well."""
        return {"state": self.optimizer.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the moments of a checkpoint, in whatever order their tensors lie.

        Raises Misfit, or SettingsError where they are of the other optimizer.
        """
        masters, plain = self.weights.masters, isinstance(self.optimizer, torch.optim.AdamW)
        fit(state, {"state": {0: {}}})
        if ("state1" in state["state"][0]) == plain:
            used = "with" if plain else "without"
            raise SettingsError(f"the checkpoint was trained {used} --use_8bit_adam: go on in the same way")
        names = ("exp_avg", "exp_avg_sq") if plain else ("state1", "state2")
        needed = [{"step": torch.zeros(()) if plain else 0} | dict.fromkeys(names, master) for master in masters]
        fit(state, {"state": dict(enumerate(needed))})
        if not plain:  # its state is made in its first step, or here
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        for number, master in enumerate(masters):
            values = self.optimizer.state[master]
            for name, saved in state["state"][number].items():
                if plain and name in values:
                    values[name].copy_(saved)
                elif isinstance(saved, Tensor) and saved.shape == master.shape:
                    values[name] = torch.empty_like(master, dtype=saved.dtype, requires_grad=False).copy_(saved)


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
        with explained(SettingsError, "--adam_*", ValueError):
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
