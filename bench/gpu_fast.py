"""The sections of bench/gpu.py that say how fast a training step is, in which setting and in which way."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from baselines import Online, bare, script, trainable
from common import DEVICE, DTYPES, GPU
from diffusers.training_utils import EMAModel
from gpu_frame import Bench
from shapes import SIZES
from torch._inductor import utils as inductor
from training import DROPOUT, GOALS, Loss, Step, Training, compile_regions, from_cache, rate

from ip2p.encode.base.errors import TrainError
from ip2p.train.data.batches import Batches
from ip2p.train.unet.load import check_gradients
from ip2p.train.watch.metrics import peak, peak_memory, training_flops


class Setting(NamedTuple):
    """A model, pixels and samples in a batch."""

    size: str
    resolution: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.size}, {self.resolution} px, batch {self.batch}"

    @property
    def place(self) -> dict[str, Any]:
        return {"batch_size": self.batch, "resolution": self.resolution}


def measure(bench: Bench, name: str, step: Step, loss: Loss, setting: Setting, goal: float | None = None) -> float:
    """Samples/s: the median of some turns, after a few steps that warm up."""
    rate(step, loss, 3 if GPU else 1, setting.batch)
    found = median(rate(step, loss, bench.sizes.steps, setting.batch) for _ in range(bench.sizes.turns))
    bench.add(f"{setting.name}: {name}", found, "samples/s", goal)
    bench.rates[f"{setting.name}: {name}"] = found
    return found


@contextlib.contextmanager
def built(
    bench: Bench, setting: Setting, precision: str | None = None, **how: Any
) -> Iterator[tuple[Training, Batches, Loss]]:
    """The step of the command, and what it takes from a cache."""
    training = Training(SIZES[setting.size], bench.folder, precision or bench.sizes.half, use_ema=True, **how)
    cache, text = bench.cache(setting.size, setting.resolution, 8 * setting.batch), training.precision.dtype
    with from_cache(training.unet, cache, setting.batch, text) as (batches, loss):
        yield training, batches, loss


def base(bench: Bench, batch: int | None = None) -> Setting:
    """What most is measured with."""
    return Setting(bench.sizes.base, bench.sizes.resolution, batch or bench.sizes.batch)


def base_model(bench: Bench) -> None:
    """The step as it is, the bare UNet's, the step as it was with autocast, and the online one."""
    setting = base(bench)
    for what, part in {"the step": as_it_is, "the other ways": other_ways}.items():
        with bench.part(what):
            part(bench, setting)


def as_it_is(bench: Bench, setting: Setting) -> None:
    """The command's step, with and without average, against the bare UNet's."""
    shape, goal = SIZES[setting.size], GOALS.get((setting.size, setting.resolution))
    with built(bench, setting) as (training, batches, loss):
        fixed = bare(training.unet, shape, **setting.place, text_dtype=training.precision.dtype)
        bare_rate = measure(bench, "bare", training.step_without_average, fixed, setting)
        measure(bench, "cached, without average", training.step_without_average, loss, setting)
        began, waited = time.perf_counter(), batches.waited
        found = measure(bench, "cached", training.step, loss, setting, goal)
        share = (batches.waited - waited) / (time.perf_counter() - began)
        bench.add(f"{setting.name}: waiting for data", share, "of 1", at_most=None if bench.demo else 0.01)
        bench.add(f"{setting.name}: time of cached with average / bare", bare_rate / found, "times")
        bench.add(f"{setting.name}: peak memory", peak_memory(DEVICE) / 2**30, "GiB")
        if half := peak(DEVICE):
            rows = shape.rows(setting.resolution)
            latents = (8, *rows["images"]["original"][1:])
            tera = training_flops(training.unet.config, latents, rows["text"]["text"], shape.pooled)
            bench.add(f"{setting.name}: share of the peak", found * tera / half, f"of {half:.0f} TFLOP/s")


def other_ways(bench: Bench, setting: Setting) -> None:
    """What a step took with autocast and diffusers' average, and what it takes online."""
    shape, half = SIZES[setting.size], bench.sizes.half
    unet, cache = trainable(shape, half), bench.cache(setting.size, setting.resolution, 8 * setting.batch)
    online = Online(unet, shape, **setting.place, dtype=DTYPES[half], dropout=DROPOUT[0])
    step = script(unet, half)
    found = measure(bench, "online", step, online, setting)
    if cached := bench.rates.get(f"{setting.name}: cached"):
        bar = 1.9 if GPU else None
        bench.add(f"{setting.name}: time of online / cached", cached / found, "times", at_least=bar)
    step = script(unet, half, EMAModel(unet.parameters(), decay=0.9999))
    with from_cache(unet, cache, setting.batch, torch.float32) as (_, loss):
        measure(bench, "cached, autocast and diffusers' average", step, loss, setting)


def one_setting(bench: Bench, setting: Setting, name: str = "cached", **how: Any) -> None:
    """The step in one setting, and its memory."""
    with bench.part(f"{setting.name}: {name}"), built(bench, setting, **how) as (training, _, loss):
        if name == "cached, without cudnn.benchmark":
            torch.backends.cudnn.benchmark = False
        measure(bench, name, training.step, loss, setting, GOALS.get((setting.size, setting.resolution)))
        bench.add(f"{setting.name}: {name}, peak memory", peak_memory(DEVICE) / 2**30, "GiB")


def compiled(bench: Bench) -> None:
    """The UNet compiled, and twice the batch in both ways: whatever there is still time for."""
    setting, larger = base(bench), base(bench, 2 * bench.sizes.batch)
    with bench.part("compiled"):
        one_compiled(bench, "compiled", torch.nn.Module.compile, setting)
    one_setting(bench, larger)
    if bench.left > 250:
        with bench.part("compiled, twice the batch"):
            one_compiled(bench, "compiled", torch.nn.Module.compile, larger)


def by_regions(bench: Bench) -> None:
    """The UNet compiled block by block."""
    one_compiled(bench, "compiled by regions", compile_regions, base(bench))


def one_compiled(bench: Bench, name: str, how: Callable[..., object], setting: Setting) -> None:
    """How long it takes to compile, with nothing compiled before, whether that is right, and what it gains."""
    with inductor.fresh_inductor_cache(), built(bench, setting, norms=False) as (training, _, loss):
        how(training.unet, backend="eager" if bench.demo else "inductor")
        text = training.precision.dtype
        fixed = bare(training.unet, SIZES[setting.size], **setting.place, text_dtype=text)
        bench.add(f"{setting.name}: {name}, first step", 1 / rate(training.step, loss, 1, 1), "s")
        measure(bench, f"cached, {name}", training.step, loss, setting, GOALS.get((setting.size, setting.resolution)))
        bench.add(f"{setting.name}: {name}, peak memory", peak_memory(DEVICE) / 2**30, "GiB")
        wrong = 0
        try:
            check_gradients(training.unet, fixed, training.precision.name)
        except TrainError as error:
            wrong = 1
            bench.note(str(error))
        bench.add(f"{setting.name}: {name}, wrong gradients", wrong, "", at_most=0)


def variants(bench: Bench) -> None:
    """What single choices gain or lose, against the step as it is."""
    setting = base(bench)
    ways: dict[str, dict[str, Any]] = {
        "PyTorch's norms": {"norms": False},
        "without cudnn.benchmark": {},
        "contiguous": {"channels_last": False},
        "fp16": {"precision": "fp16"},
        "autocast": {"gradient_accumulation_steps": 2},  # whose sums need it
        "several passes of the optimizer": {"one_pass": False},
        "8-bit Adam": {"use_8bit_adam": True},
        "bfloat16 weights": {"weights": "bf16", "precision": "bf16"},
        "bfloat16 weights, 8-bit Adam": {"weights": "bf16", "use_8bit_adam": True, "precision": "bf16"},
        "steps in the backward pass": {"fused_backward": True, "max_grad_norm": math.inf},
        "average on the host": {"ema_device": "cpu"},
        "deterministic": {"deterministic": True},
    }
    if bench.demo:
        ways = {name: ways[name] for name in ("contiguous", "8-bit Adam")}
    for way, how in ways.items():
        one_setting(bench, setting, name := f"cached, {way}", **how)
        torch.use_deterministic_algorithms(False)
        found, cached = (bench.rates.get(f"{setting.name}: {which}") for which in (name, "cached"))
        if found and cached:
            bench.add(f"{setting.name}: {way}, rate / as it is", found / cached, "times")


def large_pictures(bench: Bench) -> None:
    """Twice the pixels each way, half the batch."""
    one_setting(bench, Setting(bench.sizes.base, 2 * bench.sizes.resolution, max(1, bench.sizes.batch // 2)))


def sdxl(bench: Bench) -> None:
    """The large model, at two resolutions."""
    one_setting(bench, Setting(bench.sizes.xl, 2 * bench.sizes.resolution, max(1, bench.sizes.batch // 8)))
    xl = Setting(bench.sizes.xl, 4 * bench.sizes.resolution, max(1, bench.sizes.batch // 16))
    one_setting(bench, xl, "cached, gradient checkpointing", gradient_checkpointing=True)
