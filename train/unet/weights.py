"""The float32 weights that are trained, their average, what the UNet computes with, and the scale of its loss."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...encode.base.errors import SettingsError
from ..config import TrainConfig
from .fit import Misfit, fit


class Precision(NamedTuple):
    """The precision that the UNet computes in, and how."""

    name: str  # no, fp16 or bf16
    copies: bool  # by weights that are copies of float32 masters in this precision, in place of autocast

    @property
    def dtype(self) -> torch.dtype:
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.name]

    @property
    def half(self) -> torch.dtype | None:
        """That of the weights, if they are copies."""
        return self.dtype if self.copies else None


def choose_precision(config: TrainConfig, *, cuda: bool) -> Precision:
    """Take the precision of the flags, or of accelerate's launcher.

    On a GPU the weights become half-precision copies, which spares autocast's casts. Gradients that are summed over
    several batches would lose too much in that precision, AdamW in 8 bits takes no others than float32, and adapters
    are cast cheaply: there autocast stays. Raises SettingsError where the launcher's is none that is known here.
    """
    name = config.machine.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name not in ("no", "fp16", "bf16"):
        raise SettingsError(f"accelerate's mixed precision {name}: expected no, fp16 or bf16 (--mixed_precision)")
    summed = config.steps.gradient_accumulation_steps > 1
    stays = summed or config.optimizer.use_8bit_adam or config.lora.lora_rank is not None
    return Precision(name, cuda and name != "no" and not stays)


class Average:
    """An exponential moving average with the warm-up of diffusers' `EMAModel`: equal to it for decays above a half.

    It begins as a copy of the float32 `weights`, on their device or another one. `decay` is the largest; early on it
    is (1 + update) / (10 + update).
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
        """Go on from a checkpoint, or raise Misfit; the tensors stay on their device, `decay` what the flags say."""
        fit(state, {"optimization_step": 0, "shadow_params": self.tensors})
        self.updates = state["optimization_step"]
        for mean, saved in zip(self.tensors, state["shadow_params"], strict=True):
            mean.copy_(saved)


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


class Weights:
    """The parameters of a UNet that are trained, and the float32 masters behind them.

    With `half`, the UNet's own `parameters`, which get the gradients, become copies in that precision, so that no step
    casts its weights and their gradients again and again, as autocast does (arXiv 1710.03740, section 3.1). The
    optimizer changes the float32 `masters`, and checkpoints hold them. Who calls the UNet gives and gets float32.

    Args:
        unet: on its device, what is trained of it in float32; changed in place.
        half: torch.float16 or torch.bfloat16, or None: the parameters are the masters themselves.
    """

    def __init__(self, unet: torch.nn.Module, half: torch.dtype | None = None):
        named = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
        self.half, self.names, self.parameters = half, list(named), list[Tensor](named.values())
        self.masters: list[Tensor] = list(self.parameters)
        if half:
            self.masters = [torch.nn.Parameter(weight.detach().clone()) for weight in self.parameters]
            torch.nn.Module.to(unet, half)  # diffusers' own `to` warns that a pipeline could not use it on a CPU
            take_float32(unet, half)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date with the masters."""
        if self.half:
            torch._foreach_copy_(self.parameters, self.masters)

    @contextlib.contextmanager
    def averaged(self, average: Average | None) -> Iterator[None]:
        """Let the UNet compute with the average for a while."""
        self._exchange(average)
        try:
            yield
        finally:
            self._exchange(average)

    @torch.no_grad()
    def _exchange(self, average: Average | None) -> None:
        """Swap masters and average, one tensor after the other: at no time is there a second copy."""
        if average:
            for master, mean in zip(self.masters, average.tensors, strict=True):
                kept = master.detach().clone()
                master.copy_(mean)
                mean.copy_(kept)
            self.refresh()

    @torch.no_grad()
    def finish(self, average: Average | None) -> None:
        """Leave what was trained in the UNet, in float32: the average if there is one. Nothing trains after that."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master.data
        if average:
            for parameter, mean in zip(self.parameters, average.tensors, strict=True):
                parameter.copy_(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by name: what a checkpoint keeps."""
        return {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the masters of a checkpoint; Misfit: one is missing, too many, or of another shape."""
        fit(state, self.state_dict())
        if unknown := state.keys() - set(self.names):
            raise Misfit(f"holds {min(unknown)}, which this UNet lacks")
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(state[name])
        self.refresh()


def take_float32(unet: torch.nn.Module, half: torch.dtype) -> None:
    """Let a UNet in half precision take float32 latents and text, and give a float32 prediction, in place."""
    forward = unet.forward

    def cast(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *rest: Any, **options: Any) -> Any:
        output = forward(sample.to(half), timestep, encoder_hidden_states.to(half), *rest, **options)
        if isinstance(output, tuple):
            return tuple(part.float() for part in output)
        output.sample = output.sample.float()
        return output

    unet.forward = cast  # type: ignore[method-assign]
