"""What an optimizer step does with the gradients: unscale, clip, change the weights, the average, the copies.

On a GPU one kernel does it all (`fused.py`); a run holds it against PyTorch's functions before it takes it.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...encode.base.errors import SettingsError
from .fit import fit
from .optimizers import MOMENTS, Compact
from .rounding import step_key
from .scale import LossScale
from .weights import Average, PowerAverage, Weights

ALL = slice(None)


@dataclasses.dataclass(eq=False)
class Update:
    """One optimizer step; on a GPU in one pass over the weights, elsewhere by PyTorch's own functions."""

    weights: Weights  # whose gradients are taken
    optimizer: torch.optim.Optimizer  # over the masters: torch's AdamW, or a Compact one
    max_grad_norm: float  # to which the norm of all gradients together is clipped
    average: Average | None = None  # moves along
    scale: LossScale | None = None  # of the loss that the gradients are of, for float16
    _: dataclasses.KW_ONLY
    fused: bool = False  # in one pass, by a kernel for GPUs (`takes_one_pass`)
    backwards: bool = False  # each weight inside the backward pass, and its gradient is gone before the next one comes
    seed: int = 0  # of how numbers are rounded
    powers: Sequence[PowerAverage] = ()  # move along, too
    _kernels: dict[int | None, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _norms: dict[int, Tensor] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Give AdamW its moments, as its first step would, and weights what is called when their gradient is there."""
        for master in self.weights.masters if isinstance(self.optimizer, torch.optim.AdamW) else ():
            if not self.optimizer.state[master]:
                zeros = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
                self.optimizer.state[master] = {"step": torch.zeros((), device=master.device)} | zeros
        for number, weight in enumerate(self.weights.parameters if self.backwards else ()):
            weight.register_post_accumulate_grad_hook(partial(self._at_once, number))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled as `__call__` expects them; or change each weight by its own."""
        self._norms = {}
        (loss * self.scale.value if self.scale else loss).backward()

    @torch.no_grad()
    def __call__(self, *, averages: bool = True) -> tuple[Tensor, Tensor]:
        """Change the weights, and where `averages` their averages, unless a gradient is not finite.

        The gradients are gone after that. Nothing here waits for the device, but for an average on another one.

        Returns:
            The norm of the gradients before they are clipped, and 1 if the weights were left as they are, else 0;
            float32 scalars on the device. Of `backwards`, 1 if a weight was: the others have moved.
        """
        average, powers = (self.average, self.powers) if averages else (None, ())
        if self.backwards:
            norms, self._norms = self._norms or {}, None
            norm = torch.linalg.vector_norm(torch.stack([norms[number] for number in sorted(norms)]))
            for mean in filter(None, (average, *powers)):
                mean.step(self.weights.masters)
            return norm, 1 - norm.isfinite().float()
        gradients: list[Tensor] = [weight.grad for weight in self.weights.parameters]  # type: ignore[misc]
        scale = 1.0 if self.scale is None else self.scale.value
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))) / scale
        skipped = 1 - norm.isfinite().float()
        divisor = scale * ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # as torch.nn.utils.clip_grad_norm_
        self._change(ALL, gradients, divisor, skipped, average)
        for mean in powers:
            mean.step(self.weights.masters)
        if self.scale:
            self.scale.update(skipped)
        return norm, skipped

    @torch.no_grad()
    def _at_once(self, number: int, weight: Tensor) -> None:
        """Change a weight whose gradient is there, in a step's own backward pass; what is compared keeps gradients."""
        if self._norms is None or weight.grad is None:
            return
        (norm,) = torch._foreach_norm([weight.grad], 2, dtype=torch.float32)
        self._norms[number] = norm
        skipped = 1 - norm.isfinite().float()
        self._change(slice(number, number + 1), [weight.grad], torch.ones_like(norm), skipped, None)

    def _change(
        self, part: slice, gradients: list[Tensor], divisor: Tensor, skipped: Tensor, average: Average | None
    ) -> None:
        """Change a part of the weights by their gradients, which are gone after that."""
        change = self._one_pass if self.fused else self._by_torch
        change(part, gradients, divisor, skipped, average)
        for weight in self.weights.parameters[part]:
            weight.grad = None

    def _by_torch(
        self, part: slice, gradients: list[Tensor], divisor: Tensor, skipped: Tensor, average: Average | None
    ) -> None:
        masters, optimizer = self.weights.masters[part], self.optimizer
        if self.weights.copies:
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
        # The optimizer itself reads these, as PyTorch's does for a gradient scaler: nobody waits for the device.
        for name, value in {"grad_scale": divisor, "found_inf": skipped, "seed": self.seed}.items():
            setattr(optimizer, name, value)
        group = optimizer.param_groups[0]
        every, group["params"] = group["params"], masters
        optimizer.step()
        for master in masters:
            master.grad = None
        group["params"] = every
        if average:
            average.step(masters)
        self.weights.refresh(part)

    def _one_pass(
        self, part: slice, gradients: list[Tensor], divisor: Tensor, skipped: Tensor, average: Average | None
    ) -> None:
        kernel = self._kernels.get(part.start) or self._kernels.setdefault(part.start, self._make_kernel(part))
        steps = [self.optimizer.state[master]["step"] for master in self.weights.masters[part]]
        torch._foreach_add_(steps, [1 - skipped] * len(steps))  # a single tensor it would read, and wait for the device
        group = self.optimizer.param_groups[0]
        powers = torch.stack([torch.pow(beta, steps[0].double()) for beta in group["betas"]])
        numbers = torch.cat([divisor[None], (1 - powers).float(), skipped[None]])
        along = average if kernel.averages else None
        key = step_key(self.seed, steps[0]) if isinstance(self.optimizer, Compact) else None
        kernel(gradients, numbers, group, key=key, share=along.share() if along else None)
        if average and not along:  # it lies on another device
            average.step(self.weights.masters)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or the schedule warns that no step was taken

    def _make_kernel(self, part: slice) -> Any:
        from .fused import FusedStep

        masters = self.weights.masters[part]
        state = [self.optimizer.state[master] for master in masters]
        first, second = ([kept[name] for kept in state] for name in MOMENTS)
        scales = [[kept[f"{name}_scale"] for kept in state] for name in MOMENTS if f"{name}_scale" in state[0]]
        average = self.average.tensors if self.average and not self.backwards else None
        if average and average[0].device != masters[0].device:
            average = None
        copies = self.weights.parameters[part] if self.weights.copies else None
        return FusedStep(masters, first, second, average, copies, scales, part.start or 0)

    @property
    def kind(self) -> dict[str, str]:
        """The optimizer and the weights that moments are of, as the flags name them."""
        weights = "fp32" if self.weights.masters[0].dtype == torch.float32 else "bf16"
        return {"optimizer": getattr(self.optimizer, "name", "adamw"), "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """The moments; learning rate, betas and the like are those of the flags, when a run goes on as well."""
        return {"state": self.optimizer.state_dict()["state"]} | self.kind

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the moments of a checkpoint, in whatever order their tensors lie.

        Raises Misfit, or SettingsError where they are of another optimizer, or of weights in another precision.
        """
        fit(state, {"state": {0: {}}})
        if "state1" in state["state"][0]:
            raise SettingsError("the checkpoint holds moments of bitsandbytes: go on with the version that wrote it")
        found = {"optimizer": "adamw", "weights": "fp32"}  # what those of earlier versions are, which do not say it
        if found.keys() & state.keys():
            fit(state, dict.fromkeys(found))
            found = {name: state[name] for name in found}
        if found != self.kind:
            was, now = (" ".join(f"--{name} {value}" for name, value in kind.items()) for kind in (found, self.kind))
            raise SettingsError(f"the checkpoint was trained with {was}: go on with that, not with {now}")
        masters = self.weights.masters
        fit(state, {"state": {number: self.optimizer.state[master] for number, master in enumerate(masters)}})
        for number, master in enumerate(masters):
            values = self.optimizer.state[master]
            for name, value in values.items():
                saved = state["state"][number][name]
                if isinstance(value, Tensor):
                    value.copy_(saved)
                else:
                    values[name] = saved
