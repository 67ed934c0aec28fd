"""Samples per second of a training step: of the bare UNet, from a cache, and online as diffusers' script does it.

`bare` is forward, backward, clip and optimizer on tensors that are there. `cached` takes batches from a cache and draws
noise, timesteps and dropout, as `ip2p-train` does. `online` encodes images, their instructions and the empty one at
each step; decoding the images is not counted, though it costs as well.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import Online, bare
from common import DEVICE, DTYPES, GPU, Row, parser, peak, ratio, report, take_turns
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from shapes import SIZES, make_unet
from synthetic import build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ip2p.encode.cache import Cache
from ip2p.encode.reader import Reader
from ip2p.train.data import Batches, null_conditioning
from ip2p.train.objective import Objective
from ip2p.train.order import Order
from ip2p.train.samples import Samples

DROPOUT = (0.05, 0.05, 0.05)
# What the budgets ask for, by size, pixels and whether there is a GPU; samples/s of an H100.
RATIOS = {("small", 256, False): 1.75, ("sd15", 256, True): 1.9}
RATES = {("sd15", 256): 640, ("sd15", 512): 150}
Loss = Callable[[], Tensor]


def main() -> None:
    flags = parser(__doc__, rounds=7)
    model_flags(flags)
    flags.add_argument("--steps", type=int, default=20 if GPU else 2, help="of each kind in a round")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates, tera = measure(Path(folder), args)
    half = peak() if args.precision != "no" else None
    floor = RATES.get((args.size, args.resolution)) if half == 989 else None
    rows = [
        Row(name, median(values), "samples/s", floor if name == "cached" else None) for name, values in rates.items()
    ]
    for name in rates:
        reached = median(rates[name]) * tera[name]
        rows.append(Row(f"{name}, achieved", reached, "TFLOP/s"))
        if half:
            rows.append(Row(f"{name}, share of the peak", reached / half, f"of {half:.0f} TFLOP/s"))
    bar = RATIOS.get((args.size, args.resolution, GPU))
    rows += [
        Row("time of cached / bare", ratio(rates, "bare", "cached"), "times", at_most=1.05),
        Row("time of online / cached", ratio(rates, "cached", "online"), "times", at_least=bar),
        Row("the same, VAE in channels_last", ratio(rates, "cached", "online, VAE in channels_last"), "times"),
        Row("the same by arithmetic", tera["online"] / tera["cached"], "times"),
        Row("arithmetic of a cached sample", tera["cached"], "TFLOP"),
    ]
    report("step", args, rows)


def model_flags(flags: argparse.ArgumentParser) -> None:
    """Which UNet is trained, and how."""
    flags.add_argument("--size", choices=SIZES, default="small", help="sd15, sdxl: the real shapes, random weights")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=4)
    flags.add_argument("--precision", choices=DTYPES, default="no", help="of autocast, and of the encoders' weights")
    modes = ("default", "reduce-overhead", "max-autotune")
    flags.add_argument("--compile", nargs="?", const="default", choices=modes, help="torch.compile the UNet")
    flags.add_argument(
        "--attention", choices=("pytorch", "xformers", "plain"), default="pytorch", help="plain: unfused"
    )


def measure(folder: Path, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples/s by round, and TFLOP per sample, of all kinds of step."""
    shape, size, unet = SIZES[args.size], args.batch_size, trainable(args)
    batches, cached = from_cache(build(folder, 8 * size, shape.rows(args.resolution)), unet, size)
    place = {"batch_size": size, "resolution": args.resolution}
    options = place | {"dtype": DTYPES[args.precision], "dropout": DROPOUT[0]}
    losses: dict[str, Loss] = {
        "bare": bare(unet, shape, **place),
        "cached": cached,
        "online": Online(unet, shape, **options),
        "online, VAE in channels_last": Online(unet, shape, **options, channels_last=True),
    }
    train = trainer(unet, args.precision)
    tera = {name: operations(train, loss) / size / 1e12 for name, loss in losses.items()}
    tune(unet, args)
    cases = {name: functools.partial(rate, train, loss, args.steps, size) for name, loss in losses.items()}
    take_turns(1, cases)  # compiles, allocates, reads
    rates = take_turns(args.rounds, cases)
    batches.close()
    return rates, tera


def trainable(args: argparse.Namespace) -> UNet2DConditionModel:
    """The UNet on the device, in channels_last and under autocast."""
    with DEVICE:
        unet = make_unet(SIZES[args.size])
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if (dtype := DTYPES[args.precision]) != torch.float32:
        unet.forward = torch.autocast(DEVICE.type, dtype)(unet.forward)  # as accelerate does it
    return unet


def tune(unet: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """Choose the attention and compile: after the operations were counted, which neither lets through."""
    if args.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif args.attention == "plain":
        unet.set_attn_processor(AttnProcessor())
    if args.compile:
        unet.compile(mode=args.compile)


def rate(train: Callable[[Loss], None], loss: Loss, steps: int, size: int) -> float:
    """Samples/s over some steps."""
    began = time.perf_counter()
    for _ in range(steps):
        train(loss)
    if GPU:
        torch.cuda.synchronize()
    return steps * size / (time.perf_counter() - began)


def from_cache(cache: Cache, unet: UNet2DConditionModel, size: int) -> tuple[Batches, Loss]:
    """What `ip2p-train` does."""
    reader, samples = Reader(cache), Samples.of(cache, None)
    order = Order(len(samples.rows), views=1, seed=0)
    batches = Batches(reader, samples, order, DEVICE, batch_size=size, start=0, stride=size)
    objective = Objective(DDPMScheduler(), null_conditioning(cache, reader, DEVICE), 0.18215, DROPOUT)

    def loss() -> Tensor:
        batch = next(batches)
        return objective.loss(unet, batch, objective.draw(batch, 0))

    return batches, loss


def trainer(unet: UNet2DConditionModel, precision: str, optimizer: Any = None) -> Callable[[Loss], None]:
    """One optimizer step on a loss, alike for all kinds; by fused AdamW as in `ip2p-train`, unless told otherwise."""
    chosen = optimizer or torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def train(loss: Loss) -> None:
        scaler.scale(loss()).backward()
        scaler.unscale_(chosen)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(chosen)
        scaler.update()
        chosen.zero_grad(set_to_none=True)

    return train


def operations(train: Callable[[Loss], None], loss: Loss) -> int:
    """Floating-point operations of one step."""
    known = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)  # not so the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, known:
        train(loss)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
