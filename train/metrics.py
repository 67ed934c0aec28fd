"""What a run tells while it trains: a progress bar, metrics.jsonl, and accelerate's trackers."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..encode.errors import Ip2pError


class Metrics:
    """Collects losses on the device and reports their mean once in a while, so that no step waits for the GPU."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, *, every: int, total: int, done: int):
        self.accelerator, self.every, self.total = accelerator, every, total
        self.file = output_dir / "metrics.jsonl"
        self.bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not accelerator.is_main_process)
        self.losses: list[torch.Tensor] = []
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def step(self, step: int, loss: torch.Tensor, lr: float, samples: int, waited: float) -> None:
        """Take the loss of one optimizer step, a scalar on the device, and report if it is time.

        Args:
            samples: seen in this step by all processes.
            waited: seconds that this process has waited for data in all.

        Raises:
            Ip2pError: the loss is not finite.
        """
        self.losses.append(loss)
        self.samples += samples
        self.bar.update()
        if len(self.losses) == self.every or step == self.total:
            self._report(step, lr, waited)

    def _report(self, step: int, lr: float, waited: float) -> None:
        mean = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()  # type: ignore[union-attr]
        seconds = time.perf_counter() - self.since
        values = {
            "loss": mean,
            "lr": lr,
            "samples_per_second": self.samples / seconds,
            "waiting_for_data": (waited - self.waited) / seconds,
        }
        self.losses, self.samples, self.waited, self.since = [], 0, waited, time.perf_counter()
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)
        shown = {"loss": f"{mean:.4f}", "lr": f"{lr:.1e}", "samples/s": f"{values['samples_per_second']:.1f}"}
        self.bar.set_postfix(shown | {"waiting": f"{values['waiting_for_data']:.1%}"})
        if not torch.isfinite(torch.tensor(mean)):
            raise Ip2pError(
                f"the loss is {mean} since step {step - self.every}: resume from the last checkpoint with a smaller "
                "--learning_rate, or with --mixed_precision bf16 or no"
            )

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()
