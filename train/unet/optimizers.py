"""The optimizers by name: PyTorch's AdamW, and others whose weights and moments are kept in fewer bits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from ...encode.base.errors import SettingsError, explained
from ..config import TrainConfig
from .rounding import BLOCK, code, draw, from_8_bits, step_key, tensor_key, to_8_bits, to_bfloat16
from .weights import Weights

MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam, under the names that PyTorch gives them


def make_optimizer(config: TrainConfig, weights: Weights, processes: int) -> torch.optim.Optimizer:
    """The optimizer of the flags over the masters; raises SettingsError for numbers that it does not take."""
    flags = config.optimizer
    options: dict[str, Any] = {
        "lr": flags.learning_rate * (config.steps.samples(processes) if flags.scale_lr else 1),
        "weight_decay": flags.adam_weight_decay,
    }
    if flags.name != "adafactor":
        options |= {"betas": (flags.adam_beta1, flags.adam_beta2), "eps": flags.adam_epsilon}
    with explained(SettingsError, "--adam_*", ValueError):
        return optimizer_over(weights.masters, flags.name, **options)


def optimizer_over(weights: Sequence[Tensor], name: str, **options: Any) -> torch.optim.Optimizer:
    """adamw, adamw8bit or adafactor over float32 or bfloat16 weights, which stay as they lie in memory."""
    if name == "adamw" and weights[0].dtype == torch.float32:
        return (
            Scaled(weights, **options)
            if weights[0].device.type == "mps"
            else torch.optim.AdamW(weights, fused=True, **options)
        )
    return Compact(weights, name, **options)


class Scaled(torch.optim.AdamW):
    """AdamW that heeds `grad_scale` and `found_inf`: PyTorch's fused one leaves them unread on Apple's GPU.

    See FusedAdamWKernelImpl.mm there: gradients would not be clipped, and one that is not finite would end up in the
    weights, without a word.
    """

    grad_scale: Tensor  # as of `Compact`
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all weights that have a gradient, unless they shall stay: the device is waited for."""
        divisor, skipped = self.grad_scale, self.found_inf
        del self.grad_scale, self.found_inf  # which PyTorch takes where it is fused alone
        if not skipped:
            gradients = [weight.grad for group in self.param_groups for weight in group["params"]]
            torch._foreach_div_([gradient for gradient in gradients if gradient is not None], divisor)
            super().step()


class Compact(torch.optim.Optimizer):
    """An optimizer over weights, moments, or both that are kept in fewer bits than it computes in.

    One tensor after the other is widened to float32, changed by the library's own optimizer and rounded again, up or
    down at random, so that there is never more than one of them in float32. On a GPU a kernel does that instead
    (`fused.py`). Libraries' optimizers with few bits have none for bfloat16 weights, or lay weights out anew in each
    step (bitsandbytes), or talk to the user as soon as they are installed (torchao).

    adamw: PyTorch's AdamW, both moments in bfloat16, 4 bytes a weight.
    adamw8bit: the same with 8 bits in blocks of 256 numbers, as they lie in memory, 2.03 bytes a weight; of the second
        moment its root, so that where it is too small for 8 bits the first one is too (arXiv 2110.02861).
    adafactor: transformers', without first moment and with steps of the learning rate that is given, as Adam's are
        (arXiv 1804.04235). Kernels of convolutions are matrices of their output channels, so all second moments are
        kept as sums of rows and columns.

    Args:
        weights: float32, or bfloat16, which is rounded at random.
        options: of the library's optimizer.
    """

    seed = 0  # of what is drawn, with Adam's count of steps
    grad_scale: Tensor  # by which gradients are divided, () float32
    found_inf: Tensor  # 1 if weights and moments shall stay as they are, else 0, () float32

    def __init__(self, weights: Sequence[Tensor], name: str, **options: Any):
        device = weights[0].device
        nothing = [torch.zeros(1, device=device, requires_grad=True)]
        if name == "adafactor":
            self.library: torch.optim.Optimizer = Adafactor(
                nothing, scale_parameter=False, relative_step=False, **options
            )
        else:
            self.library = torch.optim.AdamW(nothing, fused=True, **options)
        super().__init__(weights, self.library.defaults)
        self.name, self.numbers = name, {weight: number for number, weight in enumerate(weights)}
        self.levels = [code(signed=signed).to(device) for signed in (True, False)]
        for weight in weights:
            self.state[weight] = self._fresh(weight)

    def _fresh(self, weight: Tensor) -> dict[str, Any]:
        """What is kept of a weight that has not moved yet; under the names of the library."""
        device = weight.device
        if self.name == "adafactor":  # which counts steps that are skipped too, since the device alone knows of them
            rows, *columns = memory(weight).shape
            shapes = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns[0]} if columns else {"exp_avg_sq": rows}
            return {"step": 0} | {key: torch.zeros(size, device=device) for key, size in shapes.items()}
        kept = {"step": torch.zeros((), device=device)}
        for moment in MOMENTS:
            if self.name == "adamw":
                kept[moment] = torch.zeros_like(weight, dtype=torch.bfloat16, requires_grad=False)
            else:
                kept[moment] = torch.zeros(weight.numel(), dtype=torch.uint8, device=device)
                kept[f"{moment}_scale"] = torch.zeros(-(-weight.numel() // BLOCK), device=device)
        return kept

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all weights that have a gradient."""
        (group,) = self.param_groups
        for weight in group["params"]:
            if weight.grad is not None:
                self._change(weight, group)

    def _change(self, weight: Tensor, group: dict[str, Any]) -> None:
        kept, place = self.state[weight], memory(weight)
        wide = torch.nn.Parameter(place.to(torch.float32, copy=True))
        wide.grad = memory(weight.grad, weight).float() / self.grad_scale  # type: ignore[arg-type]
        state = self._widened(weight)
        self.library.param_groups[0].update(group, params=[wide])
        self.library.state.clear()
        self.library.state[wide] = state
        self.library.step()
        count = torch.zeros((), device=weight.device) + state["step"]
        key = tensor_key(step_key(self.seed, count), self.numbers[weight])
        drawn, *others = draw(key, weight.numel())
        skipped = self.found_inf > 0
        new = wide.detach()
        if weight.dtype == torch.bfloat16:
            new = to_bfloat16(new.flatten(), drawn).view_as(new)
        place.copy_(torch.where(skipped, place, new))
        for key, value in self._narrowed(state, others).items():
            if isinstance(value, Tensor):
                old = memory(kept[key]) if key in MOMENTS else kept[key]
                old.copy_(torch.where(skipped, old, value.view_as(old)))
            else:
                kept[key] = value

    def _widened(self, weight: Tensor) -> dict[str, Any]:
        """What is kept of a weight in float32, as the library takes it: a copy."""
        kept, shape = self.state[weight], memory(weight).shape
        state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kept.items()}
        for moment, levels in zip(MOMENTS, self.levels, strict=True):
            if self.name == "adamw":
                state[moment] = memory(kept[moment]).float()
            elif self.name == "adamw8bit":
                scale = state.pop(f"{moment}_scale")
                state[moment] = from_8_bits(kept[moment], levels, scale).view(shape)
        if self.name == "adamw8bit":
            state["exp_avg_sq"].square_()
        return state

    def _narrowed(self, state: dict[str, Any], drawn: list[Tensor]) -> dict[str, Any]:
        """What is to be kept of what the library made of it."""
        state.pop("RMS", None)  # Adafactor's, of no use without scale_parameter
        if self.name == "adamw8bit":
            state["exp_avg_sq"].sqrt_()
        for moment, levels, bits in zip(MOMENTS, self.levels, drawn, strict=True):
            if self.name == "adamw":
                state[moment] = to_bfloat16(state[moment].flatten(), bits)
            elif self.name == "adamw8bit":
                state[moment], state[f"{moment}_scale"] = to_8_bits(state[moment].flatten(), levels, bits)
        return state


def ordered(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor with its numbers in the order of the weight's: itself where it is so already."""
    strides = zip(tensor.shape, tensor.stride(), weight.stride(), strict=True)
    if all(one == other for size, one, other in strides if size > 1):
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def memory(tensor: Tensor, weight: Tensor | None = None) -> Tensor:
    """The numbers of a dense tensor as they lie in memory, in rows of the first dimension: (n,) or (rows, columns).

    Of another one than `weight` they are laid out in its order first; else this is no copy.
    """
    tensor = tensor if weight is None else ordered(tensor, weight)
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(len(tensor), -1) if tensor.dim() > 1 else flat
