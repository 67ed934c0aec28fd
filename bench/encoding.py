"""The pipeline of `ip2p-encode` with clocks in it, its encoders alone, and its decoding alone."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from common import DEVICE, GPU, take_turns

from ip2p.encode import pipeline, run
from ip2p.encode.base.files import content_key
from ip2p.encode.cache.format import View
from ip2p.encode.config import EncodeConfig
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.data.pairs import Pairs
from ip2p.encode.geometry import Geometry
from ip2p.encode.models import encoders as models
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.models.encoders import Encoders

Encoded = TypeVar("Encoded")


class Clock:
    """Seconds that some calls took in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


class DeviceClock:
    """Seconds that the device worked on some calls in all: a GPU still does when they return, and has its own clock."""

    def __init__(self) -> None:
        self.host = Clock()
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not GPU:
            with self.host():
                yield
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self.events.append((began, ended))

    @property
    def seconds(self) -> float:
        if GPU:
            torch.cuda.synchronize()
        return self.host.seconds + sum(began.elapsed_time(ended) for began, ended in self.events) / 1000


class TimedEncoders(Encoders):
    """The encoders with a clock, which stands still between two batches."""

    clock = DeviceClock()

    def moments(self, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        with self.clock():
            return self._timed(super().moments(pixels))

    def embed(self, prompts: Sequence[str]) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        with self.clock():
            return self._timed(super().embed(prompts))

    def _timed(self, finish: Callable[[], Encoded]) -> Callable[[], Encoded]:
        def timed() -> Encoded:
            with self.clock():  # what is encoded again in float32
                return finish()

        return timed


class TimedPipeline(pipeline.Pipeline):
    """The whole way from missing units to committed ones with a clock."""

    clock = Clock()

    def run(self, work: Sequence[pipeline.Work], source: Pairs, done: pipeline.Done) -> None:
        with self.clock():
            super().run(work, source, done)


def measure(config: EncodeConfig, pairs: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Pairs/s by round of the pipeline and of the encoders alone, and the shares of the pipeline that they take."""
    dtype = models.DTYPES[config.run.mixed_precision]
    encoders = Encoders(Checkpoint(Path(config.model.pretrained_model_name_or_path)), DEVICE, dtype, dtype)
    size, side = config.run.encode_batch_size, config.pictures.resolution
    pixels = torch.randint(0, 256, (2 * size, 3, side, side), dtype=torch.uint8)
    prompts = ["make it snowy"] * (2 * size)
    shares: list[float] = []

    def alone() -> float:
        began = time.perf_counter()
        texts = (encoders.embed(prompts[: pairs - start]) for start in range(0, pairs, 2 * size))
        images = (encoders.moments(pixels[: 2 * (pairs - start)]) for start in range(0, pairs, size))
        for finish in pipeline.one_behind(chain(texts, images)):
            finish()
        return pairs / (time.perf_counter() - began)

    def whole() -> float:
        shutil.rmtree(config.cache, ignore_errors=True)
        TimedEncoders.clock, TimedPipeline.clock = DeviceClock(), Clock()
        with patch.object(models, "Encoders", TimedEncoders), patch.object(pipeline, "Pipeline", TimedPipeline):
            run.encode(config)
        shares.append(TimedEncoders.clock.seconds / TimedPipeline.clock.seconds)
        return pairs / TimedPipeline.clock.seconds

    encoders.moments(pixels)()  # allocates, and chooses kernels
    return take_turns(rounds, {"pipeline": whole, "alone": alone}), shares


def decode_rate(config: EncodeConfig, count: int) -> float:
    """Pairs/s that one process reads, checks, decodes and resizes."""
    source = open_pairs(config.dataset, config.model.cache_dir)
    geometry = Geometry(config.pictures.resolution, config.pictures.resizing, config.pictures.background)
    began = time.perf_counter()
    for position in range(count):
        files = source[position][:2]
        geometry.read(files, content_key(*(file or b"" for file in files)), [View(None, flip=False)])
    return count / (time.perf_counter() - began)
