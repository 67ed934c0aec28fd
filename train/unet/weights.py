"""The weights that are trained, their average, and what the UNet computes with."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...encode.base.errors import SettingsError
from ..config import TrainConfig
from .fit import Misfit, fit

LENGTHS = (0.05, 0.1)
"""Of the averages that --ema_power tracks: those of arXiv 2312.02696, section 3.2."""


class Precision(NamedTuple):
    """The precision that the UNet computes in, and how."""

    name: str  # no, fp16 or bf16
    copies: bool  # by weights that are copies of float32 masters in this precision, in place of autocast
    rounded: bool = False  # by weights that are in this precision themselves, and are rounded at random

    @property
    def dtype(self) -> torch.dtype:
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.name]

    @property
    def half(self) -> torch.dtype | None:
        """That of the weights, if they are not float32."""
        return self.dtype if self.copies or self.rounded else None

    @property
    def casts(self) -> torch.dtype | None:
        """That of autocast, if it is needed."""
        return None if self.half or self.name == "no" else self.dtype


def choose_precision(config: TrainConfig, *, cuda: bool) -> Precision:
    """Take the precision of the flags, or of accelerate's launcher.

    On a GPU the weights become half-precision copies, which spares autocast's casts. Gradients that are summed over
    several batches would lose too much in that precision, who takes another optimizer wants to spare memory, and
    adapters are cast cheaply: there autocast stays. With --weights bf16 the weights themselves are bfloat16, and so are
    sums of gradients. Raises SettingsError where the launcher's precision is none that is known here, or does not go
    with the other flags.
    """
    flags = config.optimizer
    name = config.machine.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name not in ("no", "fp16", "bf16"):
        raise SettingsError(f"accelerate's mixed precision {name}: expected no, fp16 or bf16 (--mixed_precision)")
    if name == "fp16" and (flags.fused_backward or flags.weights == "bf16"):
        flag = "--fused_backward" if flags.fused_backward else "--weights bf16"
        raise SettingsError(f"accelerate's mixed precision fp16 does not go with {flag}: give --mixed_precision bf16")
    if flags.weights == "bf16":
        return Precision("bf16", copies=False, rounded=True)
    summed = config.steps.gradient_accumulation_steps > 1
    stays = summed or flags.name != "adamw" or config.lora.lora_rank is not None
    return Precision(name, cuda and name != "no" and not stays)


class Average:
    """An exponential moving average with the warm-up of diffusers' `EMAModel`: equal to it for decays above a half.

    It is float32, and begins as a copy of the `weights`, on their device or another one. In bfloat16 it would stand
    still: what an update adds is less than half of its last digit. `decay` is the largest; early on it is
    (1 + update) / (10 + update).
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, device: torch.device | None = None):
        self.tensors = [weight.detach().to(device, torch.float32, copy=True) for weight in weights]
        self.decay, self.updates = decay, 0

    def share(self) -> float:
        """Count an update, and say how much of it the weights of now get."""
        self.updates += 1
        warm = (self.updates / (self.updates + 9)) if self.updates > 1 else 0.0
        return 1 - min(self.decay, warm)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor]) -> None:
        """Move towards the weights: in one pass, or tensor by tensor where they lie elsewhere or are bfloat16."""
        share = self.share()
        if all(weight.dtype == mean.dtype and weight.device == mean.device for weight, mean in self._pairs(weights)):
            torch._foreach_lerp_(self.tensors, list(weights), share)
        else:
            for weight, mean in self._pairs(weights):
                mean.lerp_(weight.detach().to(mean), share)

    def _pairs(self, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(weights, self.tensors, strict=True)

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


class PowerAverage(Average):
    """One whose length stays a share of the training so far: it counts the weights of update s as s ** exponent.

    Equation 127 of arXiv 2312.02696; `length` is the standard deviation of that profile as a share of all updates.
    """

    def __init__(self, weights: Sequence[Tensor], length: float, device: torch.device | None = None):
        super().__init__(weights, 1.0, device)
        self.length, self.exponent = length, exponent(length)

    def share(self) -> float:
        """Count an update, and say how much of it the weights of now get: of the first one, all."""
        self.updates += 1
        return 1 - (1 - 1 / self.updates) ** (self.exponent + 1)


def exponent(length: float) -> float:
    """That of the power function with a length (algorithm 2 there)."""
    return max(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real)


class Weights:
    """The parameters of a UNet that are trained, and the masters behind them.

    With `half`, the UNet's own `parameters`, which get the gradients, become copies in that precision, so that no step
    casts its weights and their gradients again and again, as autocast does (arXiv 1710.03740, section 3.1). The
    optimizer changes the float32 `masters`, and checkpoints hold them. Who calls the UNet gives and gets float32.

    With `rounded` there are no masters but the parameters in half precision, which the optimizer rounds at random.

    Args:
        unet: on its device, what is trained of it in float32; changed in place.
        half: torch.float16 or torch.bfloat16, or None: the parameters are float32, and the masters themselves.
        rounded: whether the parameters are the masters with `half`, too.
    """

    def __init__(self, unet: torch.nn.Module, half: torch.dtype | None = None, *, rounded: bool = False):
        named = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
        self.names, self.parameters = list(named), list[Tensor](named.values())
        self.masters: list[Tensor] = list(self.parameters)
        self.copies = half is not None and not rounded
        if self.copies:
            self.masters = [torch.nn.Parameter(weight.detach().clone()) for weight in self.parameters]
        if half:
            torch.nn.Module.to(unet, half)  # diffusers' own `to` warns that a pipeline could not use it on a CPU
            take_float32(unet, half)

    @torch.no_grad()
    def refresh(self, part: slice = slice(None)) -> None:
        """Bring the copies, or a part of them, up to date with the masters."""
        if self.copies:
            torch._foreach_copy_(self.parameters[part], self.masters[part])

    @contextlib.contextmanager
    def averaged(self, average: Average | None) -> Iterator[None]:
        """Let the UNet compute with the average for a while."""
        means = kept = average.tensors if average else self.masters[:0]
        if means and means[0].dtype != self.masters[0].dtype:  # an average would not come back whole from bfloat16
            kept = [master.detach().to("cpu", copy=True) for master in self.masters]
        self._exchange(means)
        try:
            yield
        finally:
            self._exchange(kept)

    @torch.no_grad()
    def _exchange(self, others: Sequence[Tensor]) -> None:
        """Swap masters with others, one tensor after the other: at no time is there a second copy on the device."""
        for master, other in zip(self.masters[: len(others)], others, strict=True):
            kept = master.detach().clone()
            master.copy_(other)
            if other.dtype == kept.dtype:
                other.copy_(kept)
        self.refresh()

    def trained(self, average: Sequence[Tensor] | None) -> dict[str, Tensor]:
        """What comes out by name, with all its digits and no more: an average if there is one.

        That is float32 but for bfloat16 weights without an average. Nothing of it is a copy.
        """
        return {name: tensor.detach() for name, tensor in zip(self.names, average or self.masters, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by name: what a checkpoint keeps."""
        return self.trained(None)

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
