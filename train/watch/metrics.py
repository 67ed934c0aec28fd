"""What a run tells while it trains: a progress bar, metrics.jsonl, and accelerate's trackers."""

import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from ...encode.base.console import bar
from ...encode.base.errors import TrainError
from ..config import TrainConfig
from ..data.batches import Batches
from ..save.checkpoint import Checkpoints

PATIENCE = 5  # steps in a row that may be skipped


class Metrics:
    """Collects what steps yield on the device and reports it once in a while, so that no step waits for the GPU.

    Args:
        waits: what training may have to wait for, batches and checkpoints; they count the seconds so far.
        total: steps of the run.
        done: of them.
        per_step: samples that all processes see in a step.
        share: of the GPU's peak that one sample in a second is, or None where that is not known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        waits: tuple[Batches, Checkpoints],
        total: int,
        done: int,
        *,
        per_step: int,
        share: float | None = None,
    ):
        self.accelerator, self.every, self.total, self.per_step = (
            accelerator,
            config.watching.logging_steps,
            total,
            per_step,
        )
        self.waits, self.share = waits, share
        self.file = config.saving.output_dir / "metrics.jsonl"
        self.bar = bar(None, "train", "step", total=total, initial=done, leave=True)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = self.in_a_row = torch.zeros((), device=accelerator.device)
        self.waited = [wait.waited for wait in self.waits]
        self.since = time.perf_counter()

    def step(self, step: int, loss: Tensor, norm: Tensor, skipped: Tensor, lr: float) -> None:
        """Take what one optimizer step yields, and report if it is time.

        Args:
            step: its number.
            loss: scalar on the device, of this process's samples.
            norm: of the gradients, scalar on the device.
            skipped: 1 on the device if the step changed nothing, because a gradient was not finite; else 0.
            lr: learning rate of the next step.

        Raises:
            TrainError: step after step is skipped.
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
        """Write numbers of a step, if there are any, to metrics.jsonl and to the trackers."""
        if not values:
            return
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
