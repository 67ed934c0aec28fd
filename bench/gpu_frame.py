"""What the sections of bench/gpu.py share: sizes, the clock, and how a result or a failure is told."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import GPU, Results, Row
from shapes import SIZES
from synthetic import build
from training import free

from ip2p.encode.cache.format import Cache


class Sizes(NamedTuple):
    """What is measured: the real models on a GPU, or tiny ones to rehearse on a CPU."""

    base: str = "sd15"
    xl: str = "sdxl"
    resolution: int = 256  # the small one; the larger one is twice that, and SDXL's four times
    batch: int = 64
    precisions: tuple[str, ...] = ("no", "bf16", "fp16")
    half: str = "bf16"  # in which most is measured
    steps: int = 10  # in a turn
    turns: int = 3
    run: int = 150  # steps of the whole command
    pairs: int = 2048  # to encode
    pixels: int = 512  # of their files
    copy: int = 2**30  # bytes, of the ceiling for memory
    product: int = 8192  # side of the matrices, of the ceiling for arithmetic


GPU_SIZES = Sizes()
DEMO = Sizes("tiny", "tinyxl", 64, 4, ("no", "bf16"), "no", 1, 1, 12, 8, 64, 2**24, 512)


class OutOfTime(BaseException):
    """A section's time is over. No Exception, so that nothing in between takes it for a failure of its own."""


class Bench:
    """One run of all sections.

    Args:
        args: the flags.
        folder: for caches, models and outputs.

    Attributes:
        rates: samples/s by name, for what is compared with it later.
        writers: processes that write pictures in the meantime.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.demo, self.folder = args.size == "demo", folder
        self.sizes = DEMO if self.demo else GPU_SIZES
        if self.demo:  # tiny models are slower with more
            torch.set_num_threads(1)
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that are started
        self.ends = time.monotonic() + args.deadline
        settings = argparse.Namespace(size=args.size, rounds=self.sizes.turns, results=args.out)
        self.results, self.section = Results("gpu", settings), ""
        self.rates: dict[str, float] = {}
        self.writers: list[subprocess.Popen[bytes]] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.monotonic()

    def add(
        self, what: str, value: float, unit: str, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Tell a figure. A rehearsal has no goals, but it has to be right."""
        if self.demo and unit in ("samples/s", "pairs/s"):
            at_least = None
        self.results.add(Row(what, float(value), unit, at_least, at_most), section=self.section)

    def note(self, text: str, **more: Any) -> None:
        """Tell what is no figure: what could not be done, and why."""
        print(f"-- {text}", flush=True)
        self.results.add(section=self.section, note=text, **more)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Something that may fail while the rest goes on; the GPU's memory is free after it."""
        self.free()
        try:
            yield
        except torch.OutOfMemoryError:
            self.note(f"{what}: out of memory")
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            self.note(f"{what} failed: {type(error).__name__}: {reason}", traceback=traceback.format_exc()[-4000:])
        self.free()

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """End what is going on after some seconds, and say so."""

        def ring(*_: object) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(1, min(seconds, self.left)))
        try:
            yield
        except OutOfTime:
            self.note(f"{self.section}: stopped after {seconds:.0f} s, what is missing had no time")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.free()

    def cache(self, size: str, resolution: int, samples: int) -> Cache:
        """A cache of random numbers for one of the models, built when it is asked for first."""
        folder = self.folder / f"cache-{size}-{resolution}-{samples}"
        if folder.is_dir():
            return Cache.open(folder)
        return build(folder, samples, SIZES[size].rows(resolution))

    def free(self) -> None:
        """Leave nothing of what was measured in memory."""
        with contextlib.suppress(RuntimeError):  # from a GPU that does not answer any more
            free()

    def usable(self) -> bool:
        """Whether the GPU still answers: after some errors it does not, until the process is gone."""
        try:
            if GPU:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def last_line(file: Path) -> dict[str, Any]:
    """The last line of a file of JSON lines."""
    return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
