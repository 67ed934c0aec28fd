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

import torch
from baselines import Online, bare
from common import Row, ratio, report, take_turns
from diffusers import DDPMScheduler, UNet2DConditionModel
from synthetic import build, row_shapes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ip2p.encode.cache import Cache
from ip2p.encode.reader import Reader
from ip2p.train.data import Batches, Order, Samples, null_conditioning
from ip2p.train.objective import Objective

# Widths of UNet, VAE and text encoder, and the UNet's group size. `small` is a fifth of SD 1.5, but for the VAE: a
# quarter, since processors like powers of two. So its arithmetic favors a cache more than that of the real one.
SIZES = {
    "small": ((64, 128, 256, 256), (32, 64, 128, 128), 160, 8),
    "sd15": ((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 32),
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DROPOUT = (0.05, 0.05, 0.05)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Loss = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="sd15: the real shapes, random weights")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--precision", choices=DTYPES, default="no", help="of autocast, and of the encoders' weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--xformers", action="store_true", help="attention by xformers instead of PyTorch")
    parser.add_argument("--rounds", type=int, default=7, help="medians are taken over these (default: 7)")
    parser.add_argument("--steps", type=int, default=20 if GPU else 2, help="of each kind in a round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates, tera = measure(Path(folder), args)
    bar = {("small", 256, False): 1.75, ("sd15", 256, True): 1.9}.get((args.size, args.resolution, GPU))
    rows = [Row(name, median(values), "samples/s") for name, values in rates.items()]
    rows += [Row(f"{name}, achieved", median(rates[name]) * tera[name], "TFLOP/s") for name in rates]
    rows += [
        Row("time of cached / bare", ratio(rates, "bare", "cached"), "times", at_most=1.05),
        Row("time of online / cached", ratio(rates, "cached", "online"), "times", at_least=bar),
        Row("the same, VAE in channels_last", ratio(rates, "cached", "online, VAE in channels_last"), "times"),
        Row("the same by arithmetic", tera["online"] / tera["cached"], "times"),
    ]
    report("step", vars(args), rows)


def measure(folder: Path, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples/s by round, and TFLOP per sample, of the three kinds of step."""
    unet_width, vae_width, text_width, groups = SIZES[args.size]
    size, side, dtype = args.batch_size, args.resolution // 8, DTYPES[args.precision]
    with DEVICE:
        unet = UNet2DConditionModel(
            in_channels=8, block_out_channels=unet_width, cross_attention_dim=text_width, norm_num_groups=groups
        )
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != torch.float32:
        unet.forward = torch.autocast(DEVICE.type, dtype)(unet.forward)  # as accelerate does it
    batches, cached = from_cache(build(folder, 8 * size, row_shapes(side, text_width)), unet, size)
    options = {"batch_size": size, "resolution": args.resolution, "dtype": dtype, "dropout": DROPOUT[0]}
    losses: dict[str, Loss] = {
        "bare": bare(unet, text_width, batch_size=size, resolution=args.resolution),
        "cached": cached,
        "online": Online(unet, vae_width, text_width, **options),
        "online, VAE in channels_last": Online(unet, vae_width, text_width, **options, channels_last=True),
    }
    train = trainer(unet, args.precision)
    tera = {name: operations(train, loss) / size / 1e12 for name, loss in losses.items()}
    if args.xformers:
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        unet.compile()
    cases = {name: functools.partial(rate, train, loss, args.steps, size) for name, loss in losses.items()}
    take_turns(1, cases)  # compiles, allocates, reads
    rates = take_turns(args.rounds, cases)
    batches.close()
    return rates, tera


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


def trainer(unet: UNet2DConditionModel, precision: str) -> Callable[[Loss], None]:
    """One optimizer step on a loss, alike for all three."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def train(loss: Loss) -> None:
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return train


def operations(train: Callable[[Loss], None], loss: Loss) -> int:
    """Floating-point operations of one step."""
    known = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)  # not so the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, known:
        train(loss)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
