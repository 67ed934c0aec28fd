"""Ctrl-C and SIGTERM as a wish to stop after the step at hand, with a checkpoint."""

import signal
from collections import deque
from types import FrameType

import torch
from accelerate import Accelerator

from ...encode.base.console import warn

BEHIND = 2  # steps that the answer of several processes comes later, so that none of them waits for its device


class Interrupt:
    """While it is entered, the first signal is noted and the second one acts as it always does."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self._asked: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[signal.Signals(number)])
        warn("stopping after this step, with a checkpoint; once more stops at once")

    def agreed(self) -> int:
        """The signal to stop for after this step, or 0; the same answer on all processes."""
        if self.accelerator.num_processes == 1:
            return self.received
        self._asked.append(self._ask())
        if len(self._asked) <= BEHIND:
            return 0
        answer, there = self._asked.popleft()
        if there:
            there.synchronize()
        return int(answer)

    def _ask(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Begin to find out whether any process received a signal: the answer, and the event that it is there."""
        answer = torch.full((), self.received, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
        if not answer.is_cuda:
            return answer, None
        host, there = torch.empty((), dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        host.copy_(answer, non_blocking=True)
        there.record()
        return host, there
