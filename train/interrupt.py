"""Ctrl-C and SIGTERM as a wish to stop after the step at hand, with a checkpoint."""

import signal
import sys
from types import FrameType

import torch
from accelerate import Accelerator


class Interrupt:
    """While it is entered, the first signal is noted and the second one acts as it always does."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator, every: int):
        self.accelerator, self.every = accelerator, every
        self.received = 0

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[signal.Signals(number)])
        if self.accelerator.is_main_process:
            print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)

    def agreed(self, step: int) -> int:
        """The signal to stop for at this step, or 0; the same answer on all processes.

        Several processes ask each other every few steps only, since that waits for the device.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self.every:
            return 0
        received = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())  # type: ignore[union-attr]
