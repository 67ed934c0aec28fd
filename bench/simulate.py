"""Kernels, bytes, FLOPs and saved tensors of one training step of the real UNets, by simulation.

diffusers' UNet of SD 1.5 or SDXL runs forward and backward on tensors that have a shape and no contents, and each
operation is counted as CUDA would run it (counting.py). Nothing is measured, and no GPU is needed. The settings:

autocast  float32 weights under autocast to bfloat16; clip_grad_norm_, fused AdamW, and the average as diffusers'
          EMAModel updates it
half      bfloat16 copies of float32 masters, inputs cast to bfloat16 at the door; norm, clip, AdamW, average and new
          copies by one kernel

The time is a simple model: products at a fixed speed for each class, and all else as long as its bytes take. Launches
cost nothing and no two kernels overlap. The speeds are assumptions about an H100, not measurements.
"""

import contextlib
import re
from typing import NamedTuple

import torch
from baselines import bare
from common import Row, parser, report
from counting import CLASSES, HIDDEN, PRODUCTS, REST, Count, Saved
from diffusers import UNet2DConditionModel
from shapes import SIZES, Shape, make_unet
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ip2p.train.memory import as_on_cuda

TERA = {"convolutions": 500, "linear layers": 580, "attention": 212}  # TFLOP/s on an H100
BANDWIDTH = 3.0  # TB/s of an H100 for what reads and writes
GROUPS = [*(name for name in CLASSES if name not in PRODUCTS), REST]


class Case(NamedTuple):
    """A batch, and how fast training is meant to be with it."""

    size: str
    resolution: int
    batch: int
    goal: float | None = None  # samples/s on one H100
    checkpointing: bool = False

    def __str__(self) -> str:
        words = f"{self.size} {self.resolution} px b{self.batch}"
        return f"{words} checkpointing" if self.checkpointing else words


CASES = [
    Case("sd15", 256, 64, goal=800),
    Case("sd15", 512, 32, goal=160),
    Case("sdxl", 512, 8),
    Case("sdxl", 1024, 4, goal=17),
    Case("sdxl", 1024, 4, checkpointing=True),
]
SETTINGS = ("autocast", "half")
# Bytes of a float32 weight that each part of the update reads and writes.
CLIP = 4 + 8  # the norm reads the gradient, the product reads and writes it
ADAMW = 4 * (4 + 3)  # reads weight, gradient and two moments, writes all but the gradient
DIFFUSERS_EMA = 4 * (3 + 3)  # the difference goes to a temporary, which is then subtracted
PARTS = {
    "clip_grad_norm_": CLIP,
    "fused AdamW": ADAMW,
    "fused AdamW, given grad_scale": ADAMW + 4,  # it writes the gradient back
    "average, diffusers' EMAModel": DIFFUSERS_EMA,
    "average, torch._foreach_lerp_": 4 * 3,
    "unscale_, with fp16": 4 * 2,
}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--only", default="", help="cases whose names match, for instance 'sd15 256'")
    args = flags.parse_args()
    rows = []
    for case in CASES:
        if re.search(args.only, str(case)):
            rows += simulated(case)
    for size in sorted({case.size for case in CASES if re.search(args.only, str(case))}):
        rows += [Row(f"{size} update, {name}", milliseconds(size, part), "ms") for name, part in updates().items()]
    report("simulate", args, rows)


def simulated(case: Case) -> list[Row]:
    """The rows of a case in all settings."""
    rows = []
    for setting in SETTINGS:
        forward, backward, saved = step(SIZES[case.size], case, setting)
        flops, moved = forward.flops + backward.flops, forward.bytes + backward.bytes
        arithmetic = {name: flops[name] / 1e9 / speed for name, speed in TERA.items()}  # ms
        outside, hidden = forward.outside + backward.outside, sum(moved[name] for name in HIDDEN)
        else_, update = (outside + hidden) / 1e9 / BANDWIDTH, milliseconds(case.size, default_update(setting))
        total = sum(arithmetic.values()) + else_ + update
        name = f"{case}, {setting}"
        rows += [
            Row(f"{name}: kernels forward", forward.kernels, ""),
            Row(f"{name}: kernels backward", backward.kernels, ""),
            Row(f"{name}: moved outside products", outside / 1e9, "GB"),
            *(Row(f"{name}: moved by {group}", moved[group] / 1e9, "GB") for group in (*GROUPS, *HIDDEN)),
            Row(f"{name}: moved by products", sum(moved[kind] for kind in PRODUCTS) / 1e9, "GB"),
            Row(f"{name}: kept for backward", saved / 2**30, "GiB"),
            *(Row(f"{name}: arithmetic of {kind}", flops[kind] / 1e12, "TFLOP") for kind in PRODUCTS),
            *(Row(f"{name}: time of {kind}", arithmetic[kind], "ms") for kind in PRODUCTS),
            Row(f"{name}: time of all else", else_, "ms"),
            Row(f"{name}: time of the update", update, "ms"),
            Row(f"{name}: time of the step", total, "ms"),
            Row(f"{name}: rate", 1000 * case.batch / total, "samples/s", at_least=case.goal),
        ]
    return rows


def step(shape: Shape, case: Case, setting: str) -> tuple[Count, Count, int]:
    """Counts of the forward and the backward pass, and the bytes that are kept in between."""
    half = setting == "half"
    with FakeTensorMode(), as_on_cuda():
        unet = fake_unet(shape, torch.bfloat16 if half else torch.float32)
        if case.checkpointing:
            unet.enable_gradient_checkpointing()
        if half:
            unet.register_forward_pre_hook(door)
        loss = bare(unet, shape, batch_size=case.batch, resolution=case.resolution)
        autocast = contextlib.nullcontext() if half else torch.autocast("cpu", torch.bfloat16)
        saved = Saved(unet.parameters())
        with Count() as forward, saved, autocast:
            result = loss()
        with Count() as backward:
            result.backward()
    return forward, backward, saved.bytes


def fake_unet(shape: Shape, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet in channels_last whose weights have no contents; the caller is in a FakeTensorMode."""
    with unset_fake_temporarily(), torch.device("meta"):
        unet = make_unet(shape).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fill(unet)
    return unet


def fill(model: torch.nn.Module) -> None:
    """Give a model on the meta device tensors of the mode that is active, in place, laid out as they are."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)


def door(unet: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and text in the dtype of the weights; the timesteps, and SDXL's sizes, are numbers that it would round."""
    sample, timesteps, text = args
    return sample.bfloat16(), timesteps, text.bfloat16()


def fused_update(*, half: bool, ema: bool) -> int:
    """Bytes of a weight that one kernel for norm, clip, AdamW, average and new copies reads and writes.

    The norm reads the gradients first, in a pass of its own. Then gradient, master, two moments and average are read,
    and all but the gradient written, with the copy in half precision if there is one.
    """
    gradient, states = (2 if half else 4), 4 * (4 if ema else 3)
    return gradient + gradient + states + states + (2 if half else 0)


def default_update(setting: str) -> int:
    """Bytes of a weight that the update of a setting reads and writes, average included."""
    return fused_update(half=True, ema=True) if setting == "half" else CLIP + ADAMW + DIFFUSERS_EMA


def updates() -> dict[str, int]:
    """Bytes of a weight by name: the parts of an update, and whole ones."""
    whole = {"autocast, all": default_update("autocast"), "autocast, all without average": CLIP + ADAMW}
    for name, half in (("half", True), ("float32", False)):
        whole[f"{name}, one kernel"] = fused_update(half=half, ema=True)
        whole[f"{name}, one kernel without average"] = fused_update(half=half, ema=False)
    return PARTS | whole


def milliseconds(size: str, per_weight: int) -> float:
    """How long the update takes that moves so many bytes of each weight of a model."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in make_unet(SIZES[size]).parameters())
    return weights * per_weight / 1e9 / BANDWIDTH


if __name__ == "__main__":
    main()
