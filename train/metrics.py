"""What a run tells while it trains: a progress bar, metrics.jsonl, and accelerate's trackers."""

import json
import resource
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..encode.errors import TrainError

PATIENCE = 5  # steps in a row that may be skipped


class Metrics:
    """Collects what steps yield on the device and reports it once in a while, so that no step waits for the GPU."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, *, every: int, total: int, done: int):
        self.accelerator, self.every, self.total = accelerator, every, total
        self.file = output_dir / "metrics.jsonl"
        self.bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not accelerator.is_main_process)
        self.losses: list[torch.Tensor] = []
        self.last_loss = float("nan")
        self.skipped = self.in_a_row = torch.zeros((), device=accelerator.device)
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def step(
        self, step: int, loss: torch.Tensor, skipped: torch.Tensor, lr: float, samples: int, waited: float
    ) -> None:
        """Take what one optimizer step yields, and report if it is time.

        Args:
            loss: scalar on the device.
            skipped: 1 on the device if the step changed nothing, because a gradient was not finite; else 0.
            samples: seen in this step by all processes.
            waited: seconds that this process has waited for data in all.

        Raises:
            TrainError: step after step is skipped.
        """
        self.losses.append(loss)
        self.skipped = self.skipped + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.samples += samples
        self.bar.update()
        if len(self.losses) == self.every or step == self.total:
            self._report(step, lr, waited)

    def _report(self, step: int, lr: float, waited: float) -> None:
        mean = torch.stack(self.losses).nanmean()
        values = self.accelerator.reduce(torch.stack([mean, self.skipped, self.in_a_row]), "mean")
        self.last_loss, skipped, in_a_row = values.tolist()  # type: ignore[union-attr]
        seconds = time.perf_counter() - self.since
        shown = {
            "loss": self.last_loss,
            "lr": lr,
            "samples_per_second": self.samples / seconds,
            "waiting_for_data": (waited - self.waited) / seconds,
            "skipped_steps": int(skipped),
            "memory_gib": peak_memory(self.accelerator.device) / 2**30,
        }
        self.losses, self.samples, self.waited, self.since = [], 0, waited, time.perf_counter()
        self.write(step, shown)
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.4f}, lr {lr:.1e}, {shown['samples_per_second']:.1f} samples/s, "
            f"waiting for data {shown['waiting_for_data']:.1%}, {shown['memory_gib']:.1f} GiB"
            + (f", {skipped:.0f} skipped" if skipped else "")
        )
        if in_a_row >= PATIENCE:
            raise TrainError(
                f"no finite gradient in the last {in_a_row:.0f} steps (loss {self.last_loss}): continue from the last "
                "checkpoint with a smaller --learning_rate, or with --mixed_precision bf16 or no"
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and to the trackers."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def pause(self) -> None:
        """Leave the time since the last report, which was not spent on training, out of the rate."""
        self.since = time.perf_counter()

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()


def peak_memory(device: torch.device) -> int:
    """The most bytes that the GPU has held for this process, or without one that the process has held itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
