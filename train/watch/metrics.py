"""What a run tells while it trains: a progress bar, metrics.jsonl, and accelerate's trackers."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...encode.base.console import bar
from ...encode.base.errors import TrainError, explained
from ...encode.base.system import most_memory
from ...encode.cache.reader import Reader
from ..config import TrainConfig
from ..data.batches import Batches
from ..save.checkpoint import Checkpoints
from ..save.resume import METRICS
from ..unet.weights import Precision

PATIENCE = 5  # steps in a row that may be skipped
# Dense products of half precision with sums in float32, TFLOP/s, from the data sheets; the first name that fits.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "RTX 4090": 165}


class Metrics:
    """Collects what steps yield on the device and reports it once in a while, so that no step waits for the GPU.

    Args:
        waits: what training may have to wait for, batches and checkpoints; they count the seconds so far.
        steps: from those that are done already to those in all.
        share: of the GPU's peak that one sample in a second is, or None where that is not known.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        waits: tuple[Batches, Checkpoints],
        steps: range,
        share: float | None,
    ):
        self.accelerator, self.waits, self.total, self.share = accelerator, waits, steps.stop, share
        self.every, self.per_step = config.watching.logging_steps, config.steps.samples(accelerator.num_processes)
        self.file = config.saving.output_dir / METRICS
        self.bar = bar(None, "train", "step", total=steps.stop, initial=steps.start, leave=True)
        self.losses, self.norms = list[Tensor](), list[Tensor]()
        self.skipped = self.in_a_row = torch.zeros((), device=accelerator.device)
        self.waited = [wait.waited for wait in waits]
        self.since = time.perf_counter()

    def step(self, step: int, loss: Tensor, norm: Tensor, skipped: Tensor, lr: float) -> None:
        """Take what optimizer step number `step` yields, and report if it is time.

        Raises TrainError where step after step is skipped.

        Args:
            loss: of this process's samples; it, the gradients' `norm` and `skipped` are scalars on the device.
            skipped: 1 if the step changed nothing, because a gradient was not finite; else 0.
            lr: learning rate of the next step.
        """
        self.losses.append(loss)
        self.norms.append(norm)
        self.skipped = self.skipped + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.bar.update()
        if len(self.losses) == self.every or step == self.total:
            self._report(step, lr)

    def _report(self, step: int, lr: float) -> None:
        norms = torch.stack(self.norms)
        means = [torch.stack(self.losses).nanmean(), norms.where(norms.isfinite(), torch.nan).nanmean()]
        values = self.accelerator.reduce(torch.stack([*means, self.skipped, self.in_a_row]), "mean")
        loss, norm, skipped, in_a_row = values.tolist()  # type: ignore[union-attr]
        seconds, steps = time.perf_counter() - self.since, len(self.losses)
        waited = [wait.waited for wait in self.waits]
        data, checkpoints = (now - before for now, before in zip(waited, self.waited, strict=True))
        rate = steps * self.per_step / seconds
        shown = {
            "loss": loss,
            "lr": lr,
            "samples_per_second": rate,
            "waiting_for_data": data / seconds,
            "checkpoint_seconds": checkpoints,
            "skipped_steps": int(skipped),
            "memory_gib": peak_memory(self.accelerator.device) / 2**30,
            "seconds_left": (self.total - step) * seconds / steps,
        }
        if math.isfinite(norm):  # otherwise all steps were skipped, and JSON knows no such number
            shown["gradient_norm"] = norm
        if self.share:
            shown["share_of_peak"] = self.share * rate / self.accelerator.num_processes
        self.losses, self.norms, self.waited, self.since = [], [], waited, time.perf_counter()
        self.write(step, shown)
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, gradient {norm:.2g}, lr {lr:.1e}, {rate:.1f} samples/s, "
            f"waiting for data {shown['waiting_for_data']:.1%}, {shown['memory_gib']:.1f} GiB"
            + (f", {shown['share_of_peak']:.0%} of peak" if self.share else "")
            + (f", {skipped:.0f} skipped" if skipped else "")
        )
        if in_a_row >= PATIENCE:
            raise TrainError(
                f"no finite gradient in the last {in_a_row:.0f} steps (loss {loss}): continue from the last "
                "checkpoint with a smaller --learning_rate, or with --mixed_precision bf16 or no"
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step, if there are any, to metrics.jsonl and to the trackers; TrainError: it cannot."""
        if not values:
            return
        if self.accelerator.is_main_process:
            hint = ": make space and continue with --resume_from_checkpoint latest"
            cannot = explained(TrainError, f"{self.file} cannot be written", OSError, hint=hint)
            with cannot, self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave time that is not spent on training out of the rate."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def peak_memory(device: torch.device) -> int:
    """The most bytes that the GPU has held for this process, or without one that the process has held itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return most_memory()


def peak(device: torch.device) -> float | None:
    """TFLOP/s that a GPU reaches at best in half precision; None for one that is not listed, and without one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((float(tera) for part, tera in PEAKS.items() if part in name), None)


def training_flops(config: Any, latents: tuple[int, ...], text: tuple[int, ...], pooled: int | None) -> float:
    """TFLOP of one sample, forward and backward, which are counted and not computed.

    Args:
        config: of a UNet.
        latents: (8, h, w), of noisy latent and image together.
        text: (77, d).
        pooled: width of the pooled text of SDXL.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        sample, tokens = torch.empty(1, *latents), torch.empty(1, *text)
        timesteps, added = torch.empty(1, dtype=torch.long), dict[str, Tensor]()
        if pooled:
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(sample, timesteps, tokens, added_cond_kwargs=added)  # type: ignore[operator]
    return 3 * counter.get_total_flops() / 1e12


def share_of_peak(unet: Any, reader: Reader, precision: Precision, device: torch.device) -> float | None:
    """The share of the GPU's peak that one sample of a UNet in a second is, if the peak is known.

    Frozen weights have no gradients, and those are a third of the arithmetic; that of adapters is not counted.
    """
    tera = peak(device) if precision.name != "no" else None
    if tera is None:
        return None
    shapes = {name: array.row_shape for name, array in reader.arrays.items()}
    channels, *sides = reader.largest
    needed = 2 / 3 if any(not weight.requires_grad for weight in unet.parameters()) else 1
    flops = training_flops(unet.config, (2 * channels, *sides), shapes["text"], *shapes.get("pooled", (None,)))
    return needed * flops / tera
