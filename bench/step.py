"""Samples per second of a training step: of the bare UNet, from a cache, and online as diffusers' script does it.

`cached` is `ip2p-train`'s own step: it takes batches from a cache, draws noise, timesteps and dropout, and moves the
average of the weights. `bare` is the same optimizer step, but for the average, on tensors that are there. `online` has
a UNet of its own, and encodes images, their instructions and the empty one at each step; decoding the images is not
counted, though it costs as well.
"""

import argparse
import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from baselines import Online, bare, script, trainable
from common import DEVICE, DTYPES, GPU, Results, Row, parser, ratios, rounds_of, take_turns
from diffusers import UNet2DConditionModel
from shapes import SIZES
from synthetic import build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import DROPOUT, GOALS, Loss, Step, Training, free, from_cache, rate, tune

from ip2p.train.watch.metrics import peak

# What online has to take longer, by size, pixels and whether there is a GPU.
RATIOS = {("small", 256, False): 1.75, ("sd15", 256, True): 1.9}
CHANNELS_LAST = "online, VAE in channels_last"
Cases = tuple[UNet2DConditionModel, dict[str, tuple[Step, Loss]]]  # a UNet, and the steps that it can be trained by
Kind = Callable[[argparse.Namespace, Path], AbstractContextManager[Cases]]


def main() -> None:
    flags = parser(__doc__, rounds=7)
    model_flags(flags)
    flags.add_argument("--steps", type=int, default=20 if GPU else 2, help="of each kind in a round")
    args = flags.parse_args()
    measurement, kinds = Measurement(args), (cached, online)
    with tempfile.TemporaryDirectory() as folder:
        if measurement.fits(kinds, Path(folder)):
            return
        print("not enough memory for two UNets: one after the other")
        for kind in kinds:
            if not measurement.fits([kind], Path(folder)):
                print(f"{kind.__name__}: out of memory")


def model_flags(flags: argparse.ArgumentParser) -> None:
    """Which UNet is trained, and how."""
    flags.add_argument("--size", choices=SIZES, default="small", help="sd15, sdxl: the real shapes, random weights")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=4)
    flags.add_argument("--precision", choices=DTYPES, default="no", help="as --mixed_precision; and of the encoders")
    modes = ("default", "reduce-overhead", "max-autotune", "regions")
    flags.add_argument(
        "--compile", nargs="?", const="default", choices=modes, help="torch.compile the UNet; regions: block by block"
    )
    flags.add_argument(
        "--attention", choices=("pytorch", "xformers", "plain"), default="pytorch", help="plain: unfused"
    )


@contextmanager
def cached(args: argparse.Namespace, folder: Path) -> Iterator[Cases]:
    """The step of `ip2p-train`, and the same on tensors that are there."""
    shape, size = SIZES[args.size], args.batch_size
    training = Training(shape, folder, args.precision, use_ema=True)
    cache = build(folder / "cache", 8 * size, shape.rows(args.resolution))
    place, text = {"batch_size": size, "resolution": args.resolution}, training.precision.dtype
    fixed = bare(training.unet, shape, **place, text_dtype=text)
    with from_cache(training.unet, cache, size, text) as (_, loss):
        yield training.unet, {"bare": (training.step_without_average, fixed), "cached": (training.step, loss)}


@contextmanager
def online(args: argparse.Namespace, _: Path) -> Iterator[Cases]:
    """The step of diffusers' script, its VAE as it is and in channels_last."""
    unet = trainable(SIZES[args.size], args.precision)
    options = {"batch_size": args.batch_size, "resolution": args.resolution, "dtype": DTYPES[args.precision]}
    losses = {
        name: Online(unet, SIZES[args.size], **options, dropout=DROPOUT[0], channels_last=channels_last)
        for name, channels_last in {"online": False, CHANNELS_LAST: True}.items()
    }
    step = script(unet, args.precision)
    yield unet, {name: (step, loss) for name, loss in losses.items()}


class Measurement:
    """What is known so far: samples/s by round of each case, and TFLOP of one of its samples."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.results = args, Results("step", args)
        self.rates: dict[str, list[float]] = {}
        self.tera: dict[str, float] = {}

    def fits(self, kinds: Sequence[Kind], folder: Path) -> bool:
        """Measure some kinds in turns, telling the rows after each round; False if they do not fit into memory."""
        args = self.args
        free()
        try:
            with ExitStack() as stack:
                cases: dict[str, Callable[[], float]] = {}
                for kind in kinds:
                    unet, steps = stack.enter_context(kind(args, folder))
                    for name, (step, loss) in steps.items():
                        self.tera[name] = operations(step, loss) / args.batch_size / 1e12
                        cases[name] = functools.partial(rate, step, loss, args.steps, args.batch_size)
                    tune(unet, args)
                take_turns(1, cases)  # compiles, allocates, reads
                for rates in rounds_of(args.rounds, cases):
                    self.rates |= rates
                    self.results.add(*self.rows())
        except torch.OutOfMemoryError:
            return False
        return True

    def rows(self) -> Iterator[Row]:
        args, rates, tera = self.args, self.rates, self.tera
        half = peak(DEVICE) if args.precision != "no" else None
        goal = GOALS.get((args.size, args.resolution)) if half == 989 else None
        for name, values in rates.items():
            yield Row.of(name, values, "samples/s", goal if name == "cached" else None)
        for name, values in rates.items():
            reached = [value * tera[name] for value in values]
            yield Row.of(f"{name}, achieved", reached, "TFLOP/s")
            if half:
                yield Row.of(f"{name}, share of the peak", [one / half for one in reached], f"of {half:.0f} TFLOP/s")
        if "cached" in rates:
            yield Row.of("time of cached / bare", ratios(rates, "bare", "cached"), "times", at_most=1.05)
            yield Row("arithmetic of a cached sample", tera["cached"], "TFLOP")
        if {"cached", "online"} <= rates.keys():
            bar = RATIOS.get((args.size, args.resolution, GPU))
            yield Row.of("time of online / cached", ratios(rates, "cached", "online"), "times", at_least=bar)
            yield Row.of("the same, VAE in channels_last", ratios(rates, "cached", CHANNELS_LAST), "times")
            yield Row("the same by arithmetic", tera["online"] / tera["cached"], "times")


def operations(step: Step, loss: Loss) -> int:
    """Floating-point operations of one step."""
    known = contextlib.nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)  # not so the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, known:
        step(loss)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
