"""Pairs per second of `ip2p-encode`, and the share of its time that the VAE and the text encoder take.

The command's own code runs in this process, from files to committed shards, with a clock around the encoders; imports,
loading and planning are not counted. `encoders alone` get the same number of pairs as tensors that are in memory.
"""

import io
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import datasets
import numpy as np
import torch
from common import DEVICE, DTYPES, GPU, Row, parser, ratio, report, take_turns
from PIL import Image
from shapes import SIZES, save
from tqdm import tqdm

from ip2p.encode import models, pipeline, run
from ip2p.encode.cache import content_key
from ip2p.encode.checkpoint import Checkpoint
from ip2p.encode.config import EncodeConfig
from ip2p.encode.images import Geometry, View
from ip2p.encode.models import Encoders
from ip2p.encode.sources import Source, open_source
from tiny import unet

Encoded = TypeVar("Encoded")
FEATURES = datasets.Features(
    input_image=datasets.Image(), edited_image=datasets.Image(), edit_prompt=datasets.Value("string")
)


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

    def run(self, work: Sequence[pipeline.Work], source: Source, bar: tqdm) -> None:
        with self.clock():
            super().run(work, source, bar)


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--size", choices=SIZES, default="small", help="sd15, sdxl: the real shapes, random weights")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=16, help="pairs in a batch (default: 16, as the command's)")
    flags.add_argument("--precision", choices=DTYPES, default="no", help="in which the encoders run")
    flags.add_argument("--pairs", type=int, default=8192 if GPU else 64, help="in the dataset")
    flags.add_argument("--pixels", type=int, default=512, help="side of the JPEG files (default: 512)")
    flags.add_argument("--workers", type=int, help="that decode; default: as many as the command picks")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SIZES[args.size], folder / "model", unet())
        write_pairs(folder, args.pairs, args.pixels)
        config = EncodeConfig(
            str(folder / "model"),
            folder / "cache",
            dataset_name=str(folder / "data"),
            cache_dir=folder / "downloads",
            resolution=args.resolution,
            mixed_precision=args.precision,
            encode_batch_size=args.batch_size,
            dataloader_num_workers=args.workers,
        )
        rates, share = measure(config, args.pairs, args.rounds)
        decoding = decode_rate(config, min(args.pairs, 64))
    alone = median(rates["alone"])
    rows = [
        Row("ip2p-encode", median(rates["pipeline"]), "pairs/s"),
        Row("the encoders alone", alone, "pairs/s"),
        Row("ip2p-encode / the encoders alone", ratio(rates, "pipeline", "alone"), "times"),
        Row("share of wall time in the encoders", share, "of 1", at_least=None if args.workers else 0.9),
        Row("decoding, one process", decoding, "pairs/s"),
        Row("processes that decode", run.workers(config), ""),
        Row("processes that the encoders need", math.ceil(alone / decoding), ""),
    ]
    report("encode", args, rows)


def measure(config: EncodeConfig, pairs: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Pairs/s by round of the pipeline and of the encoders alone, and the share of the pipeline that they take."""
    dtype = models.DTYPES[config.mixed_precision]
    encoders = Encoders(Checkpoint(Path(config.pretrained_model_name_or_path)), DEVICE, dtype, dtype)
    size, side = config.encode_batch_size, config.resolution
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
    return take_turns(rounds, {"pipeline": whole, "alone": alone}), median(shares)


def decode_rate(config: EncodeConfig, count: int) -> float:
    """Pairs/s that one process reads, checks, decodes and resizes."""
    source = open_source(config)
    geometry = Geometry(config.resolution, config.resize_mode, config.background)
    began = time.perf_counter()
    for position in range(count):
        files = source[position][:2]
        geometry.read(files, content_key(*(file or b"" for file in files)), [View(None, flip=False)])
    return count / (time.perf_counter() - began)


def write_pairs(folder: Path, count: int, side: int) -> None:
    """Write a Parquet file of `count` pairs of JPEG files about as detailed as photographs, no two alike."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "input_image": [_jpeg(random, side) for _ in range(count)],
        "edited_image": [_jpeg(random, side) for _ in range(count)],
        "edit_prompt": [f"turn the sky into day {number}" for number in range(count)],
    }
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(folder / "data" / "train.parquet")


def _jpeg(random: np.random.Generator, side: int) -> dict[str, bytes | None]:
    file, coarse = io.BytesIO(), random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return {"bytes": file.getvalue(), "path": None}


if __name__ == "__main__":
    main()
