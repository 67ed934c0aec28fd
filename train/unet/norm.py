"""The UNet's norms and the blocks around them as they are fastest in channels_last on a GPU.

They take the place of diffusers' own with the same weights under the same names, and compute the same but for rounding.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...encode.base.console import say
from ...encode.base.errors import reason

WIDTH = 128  # channels that a program takes, if a group has no more
TALL = 32  # pixels that it reads at a time
PARTS = 32  # programs at most that share the pixels of one picture
PROGRAMS = 1024  # that fill a GPU


class Plan(NamedTuple):
    """How the work on pictures (B, C, H, W) is divided."""

    grid: tuple[int, int]  # of the kernels that go over pixels: a part of a picture, and some groups
    whole: tuple[int, int]  # of the others: a picture, and some groups
    sizes: tuple[int, ...]  # pixels, channels, pixels in a part, parts of a picture
    group: int  # channels
    width: dict[str, Any]  # constants of all kernels
    parts: dict[str, Any]  # of those that put parts together


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


def plan(x: Tensor, groups: int) -> Plan:
    """Whole groups side by side for each program, and as many parts of a picture as fill the GPU."""
    batch, channels, height, width = x.shape
    group, pixels = channels // groups, height * width
    taken = group * max(1, WIDTH // group)
    blocks = _cdiv(channels, taken)
    most = min(PARTS, _cdiv(pixels, TALL), _cdiv(PROGRAMS, batch * blocks))
    rows = TALL * _cdiv(_cdiv(pixels, most), TALL)
    parts = _cdiv(pixels, rows)
    constants = {"TAKEN": taken, "WIDTH": 1 << (taken - 1).bit_length(), "num_warps": 8}
    few = next(number for number in (1, 8, PARTS) if parts <= number)  # each is compiled for itself
    sizes = pixels, channels, rows, parts
    return Plan((batch * parts, blocks), (batch, blocks), sizes, group, constants, constants | {"PARTS": few})


def kernels() -> Any:
    """Triton's, which is not on every machine."""
    from . import norm_kernels

    return norm_kernels


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        added = weight if shift is None else shift.contiguous()  # some tensor, where there is no shift
        (batch, channels), work, y = x.shape[:2], plan(x, groups), torch.empty_like(x)
        found = torch.empty(batch * work.sizes[3], 2, channels, dtype=torch.float32, device=x.device)
        facts = torch.empty(batch, 3, channels, dtype=torch.float32, device=x.device)
        options = work.width | {"TALL": TALL, "SHIFTED": shift is not None}
        kernels().measure[work.grid](x, added, found, *work.sizes, **options)
        kernels().settle[work.whole](found, facts, *work.sizes, work.group, epsilon, **work.parts)
        kernels().normalise[work.grid](x, added, weight, bias, facts, y, *work.sizes, **options, SILU=silu)
        ctx.save_for_backward(x, added, weight, bias, facts)
        ctx.work, ctx.shifted, ctx.silu = work, shift is not None, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, added, weight, bias, facts = ctx.saved_tensors
        work, (pixels, channels, _, parts) = ctx.work, ctx.work.sizes
        gradient, change = grad_outputs[0].contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        sums = torch.empty(len(x) * parts, 2, channels, dtype=torch.float32, device=x.device)
        slopes, moved = (torch.empty(len(x), n, channels, dtype=torch.float32, device=x.device) for n in (2, 1))
        given = gradient, x, added, weight, bias, facts, sums, slopes, change, *work.sizes
        options = work.width | {"TALL": TALL, "SHIFTED": ctx.shifted, "SILU": ctx.silu}
        kernels().differentiate[work.grid](*given, **options, SUMS=True)
        numbers = pixels, channels, parts, work.group
        kernels().lean[work.whole](sums, weight, facts, slopes, moved, *numbers, **work.parts, SHIFTED=ctx.shifted)
        kernels().differentiate[work.grid](*given, **options, SUMS=False)
        of_bias, of_weight = sums.sum(0)
        of_shift = moved[:, 0].to(added.dtype) if ctx.shifted else None
        return change, of_shift, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, *, silu: bool, shift: Tensor | None = None
) -> Tensor:
    """Group normalisation (arXiv 1803.08494) of `x + shift`, computed in float32, and SiLU of it if `silu`.

    Args:
        x: (B, C, H, W) in any precision, best in channels_last; what is returned is like it, and in channels_last.
        weight, bias: (C,).
        shift: (B, C), for all pixels of a channel alike.
    """
    return _GroupNorm.apply(x, shift, weight, bias, groups, epsilon, silu)  # type: ignore[return-value]


class Norm(torch.nn.GroupNorm):
    """With SiLU after it where a block has that, and with what a residual block adds before it."""

    silu = False

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu, shift=shift)


class Residual(ResnetBlock2D):
    """diffusers' residual block in its usual form, whose training copies its input to the other memory format."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
        hidden = self.conv1(self.norm1(input_tensor))
        shift = self.time_emb_proj(self.nonlinearity(temb)) if self.time_emb_proj is not None else None
        hidden = self.conv2(self.dropout(self.norm2(hidden, shift)))
        skipped = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        total = skipped + hidden
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    @staticmethod
    def replaces(block: torch.nn.Module) -> bool:
        """Whether a module is such a block."""
        usual = type(block) is ResnetBlock2D and block.time_embedding_norm == "default" and not block.skip_time_act
        return usual and block.upsample is block.downsample is None and isinstance(block.nonlinearity, torch.nn.SiLU)


class Transformer(Transformer2DModel):
    """diffusers' transformer over pixels, which copies what it gives to the other memory format."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


def stay_in_channels_last(unet: UNet2DConditionModel) -> None:
    """Replace what would leave that memory format, in place, where it has the form that Stable Diffusion's has."""
    norms: list[tuple[Any, bool]] = []  # and whether SiLU follows
    for module in unet.modules():
        if Residual.replaces(module):
            module.__class__ = Residual
            norms += [(module.norm1, True), (module.norm2, True)]
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.__class__ = Transformer
            norms.append((module.norm, False))
    if isinstance(unet.conv_act, torch.nn.SiLU) and type(unet.conv_norm_out) is torch.nn.GroupNorm:
        unet.conv_act = torch.nn.Identity()
        norms.append((unet.conv_norm_out, True))
    for norm, silu in norms:
        norm.__class__, norm.silu = Norm, silu


def choose_norms(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> None:
    """Take the blocks above on a GPU, in place, if their kernels can be had and do what PyTorch's functions do."""
    if device.type != "cuda":
        return
    try:
        error = disagreement(device, dtype)
    except Exception as error:  # whatever goes wrong between a driver, a compiler and a kernel: there is another way
        problem = reason(error)
    else:
        if error < 1e-2:
            return stay_in_channels_last(unet)
        problem = f"the kernels are off by {error:.1e}"
    say(f"the UNet's norms copy pictures to another memory format and back: {problem}")


def disagreement(device: torch.device, dtype: torch.dtype) -> float:
    """How far the normalisation and its gradients are from PyTorch's in float64, of their size; rounding counts."""
    generator, apart = torch.Generator().manual_seed(0), list[Tensor]()
    for silu, shifted in ((True, True), (True, False), (False, False)):
        shapes = [(2, 320, 24, 24), (320,), (320,), (2, 320)][: 4 if shifted else 3]
        x, *rest = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        slope = torch.randn(x.shape, generator=generator).to(dtype)
        found = _with_gradients(group_norm, [one.to(device) for one in (x, *rest)], slope.to(device), silu)
        expected = _with_gradients(_by_torch, [one.double() for one in (x, *rest)], slope.double(), silu)
        apart += [(a.double().cpu() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return torch.stack(apart).nan_to_num(torch.inf).max().item()


def _with_gradients(function: Any, given: list[Tensor], slope: Tensor, silu: bool) -> list[Tensor]:
    for one in given:
        one.requires_grad_()
    y = function(*given[:3], 32, 1e-5, silu=silu, shift=given[3] if len(given) > 3 else None)
    return [y, *torch.autograd.grad(y, given, slope)]


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, *, silu: bool, shift: Tensor | None
) -> Tensor:
    y = F.group_norm(x if shift is None else x + shift[:, :, None, None], groups, weight, bias, epsilon)
    return F.silu(y) if silu else y
