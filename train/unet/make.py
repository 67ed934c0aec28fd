"""What a run's flags ask of a UNet and an optimizer step: one pass where a kernel does what PyTorch's functions do."""

from typing import Any

import torch
from diffusers.optimization import get_scheduler

from ...encode.base.console import say
from ...encode.base.errors import SettingsError, reason
from ...encode.models.checkpoint import Checkpoint, layout
from ..config import TrainConfig
from ..learning import Optimizer
from .load import choose_attention, load_unet
from .lora import add_adapters
from .norm import choose_norms
from .optimizers import make_optimizer, optimizer_over
from .scale import LossScale
from .update import Update
from .weights import LENGTHS, Average, PowerAverage, Precision, Weights

FLIPS = 1e-2  # share of the numbers that are rounded at random, which two ways to compute may round otherwise


def make_unet(
    config: TrainConfig, checkpoint: Checkpoint, precision: Precision, device: torch.device, seed: int
) -> Any:
    """The UNet of a run on its device, with adapters if there shall be some; what is trained of it is float32.

    Raises as `load_unet` and `add_adapters` do.
    """
    unet: Any = load_unet(config, checkpoint)
    if config.lora.lora_rank:
        add_adapters(unet, config.lora, seed, precision.dtype)
    unet.to(device, memory_format=layout(device))
    choose_attention(unet, device, precision.name)
    if not config.machine.compile:  # which fuses norms in its own way
        choose_norms(unet, device, precision.dtype)
    return unet


def make_update(config: TrainConfig, unet: torch.nn.Module, precision: Precision, processes: int) -> Update:
    """All that a step changes of a UNet, which is on its device and in float32; its weights may be so no longer.

    Raises SettingsError for numbers that the optimizer does not take, and for several processes where each would
    change its weights before the others' gradients are there.
    """
    flags, device = config.optimizer, next(unet.parameters()).device
    if flags.fused_backward and processes > 1:
        raise SettingsError(
            f"--fused_backward changes a weight as soon as its own gradient is there, and cannot wait for those of "
            f"{processes} processes: leave it out, or train on one GPU"
        )
    weights = Weights(unet, precision.half, rounded=precision.rounded)
    beside = torch.device(flags.ema_device) if flags.ema_device else None
    average = Average(weights.masters, flags.ema_decay, beside) if flags.use_ema else None
    powers = [PowerAverage(weights.masters, length, beside) for length in LENGTHS] if flags.ema_power else ()
    scale = LossScale(device) if precision.name == "fp16" else None
    optimizer = make_optimizer(config, weights, processes)
    fused = takes_one_pass(device, precision.half, flags.name, rounded=precision.rounded)
    how = {"fused": fused, "backwards": flags.fused_backward, "powers": powers}
    return Update(weights, optimizer, flags.max_grad_norm, average, scale, **how)


def takes_one_pass(
    device: torch.device, half: torch.dtype | None, name: str = "adamw", *, rounded: bool = False
) -> bool:
    """Whether the kernel for one pass can be had, and does on small tensors what PyTorch's functions do."""
    if device.type != "cuda" or name == "adafactor":
        return False
    try:
        error = disagreement(device, half, name, rounded=rounded)
    except Exception as error:  # whatever goes wrong between a driver, a compiler and a kernel: there is another way
        problem = reason(error)
    else:
        if error < 1e-5:
            return True
        problem = f"its kernel is off by {error:.1e}"
    say(f"the optimizer takes several passes over the weights instead of one: {problem}")
    return False


def disagreement(
    device: torch.device, half: torch.dtype | None, name: str = "adamw", *, rounded: bool = False
) -> float:
    """How far the weights, moments and averages of both ways are apart after four steps, of which one is skipped.

    A difference in the last digit of float32 now and then rounds a number the other way, which is a step of its last
    digit. That counts as none, for at most `FLIPS` of all numbers.
    """
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        unet = torch.nn.Sequential(torch.nn.Conv2d(8, 20, 3), torch.nn.Linear(41, 1000), torch.nn.Linear(5, 3))
        for weight in unet.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = Weights(unet, half, rounded=rounded)
        average = Average(weights.masters, 0.9)
        optimizer = optimizer_over(weights.masters, name, lr=0.1, weight_decay=0.1)
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
    pairs = (
        (one.float(), other.float(), 64 if one.dtype == torch.uint8 else 1) for one, other in zip(*found, strict=True)
    )
    apart = torch.cat([((one - other).abs() / size).flatten() for one, other, size in pairs])
    flips = (apart > 1e-5) & (apart < 0.1)
    if (name != "adamw" or rounded) and flips.float().mean() < FLIPS:
        apart = apart.where(~flips, 0)
    return apart.max().item()  # which is no number where one of them is none


def make_schedule(flags: Optimizer, optimizer: Any, step: int, total: int) -> Any:
    """The learning rate as a function of flags and step, whatever it was in a run that is gone on with."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(flags.lr_scheduler, optimizer, None, flags.lr_warmup_steps, total, last_epoch=step - 1)
