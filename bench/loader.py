"""How fast samples come out of a cache: warm, cold, against `np.memmap`, in several shapes, and what that costs the
main thread."""

import argparse
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import Row, parser, ratios, report, take_turns
from shapes import SIZES
from synthetic import build, forget

from ip2p.encode.base.flags import build as flags_into
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.encode.geometry import Shape, shapes
from ip2p.train.config import TrainConfig
from ip2p.train.data.batches import Batches
from ip2p.train.data.order import make_order

SLOW = 3  # batches that zarr-python reads in a round
SHAPES = {"sd256": SIZES["sd15"].rows(256), "sd512": SIZES["sd15"].rows(512), "sdxl1024": SIZES["sdxl"].rows(1024)}


class WithoutPrefetch(Reader):
    """The same reader, which leaves reading ahead to the operating system."""

    def will_need(self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        pass


def main() -> None:
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--size", choices=SHAPES, default="sd256", help="shapes of the samples (default: sd256)")
    flags.add_argument("--samples", type=int, default=12_000, help="in the cache (default: 12000)")
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--folder", type=Path, help="where the cache lies for the time being: the disk to measure")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = build(Path(folder), args.samples, SHAPES[args.size])
        cold = take_turns(
            args.rounds,
            {
                "prefetch": lambda: cold_rate(cache, Reader, args.batch_size, args.samples // args.batch_size // 2),
                # One batch: the second would find much of a small cache in memory, read along with the first.
                "none": lambda: cold_rate(cache, WithoutPrefetch, args.batch_size, 1),
            },
        )
        cases = warm_cases(cache, args.batch_size, args.samples // args.batch_size)
        # By itself, so that what it leaves in the processor's caches is no matter of the others'.
        alone = {"zarr": cases.pop("zarr")}
        warm = take_turns(args.rounds, cases) | take_turns(args.rounds, alone)
        shaped = take_turns(3 * args.rounds, shaped_cases(cache, Path(folder), args))
        paged = take_turns(args.rounds, paged_cases(cache, args))
        beside = take_turns(args.rounds, {rate: lambda rate=rate: main_thread(cache, rate) for rate in ("640", "8000")})
    bars = args.size == "sd256"  # what the budgets are given for
    rows = [
        Row.of("warm, batches from the thread", warm["batches"], "samples/s", 25_000 if bars else None),
        Row.of("warm, against np.memmap", ratios(warm, "batches", "memmap"), "times"),  # as fast as memory
        Row.of("warm, Reader.take alone", warm["take"], "samples/s"),
        Row.of("warm, take against np.memmap", ratios(warm, "take", "memmap"), "times", 0.85 if bars else None),
        Row.of("warm, np.memmap", warm["memmap"], "samples/s"),
        Row.of("warm, zarr-python", warm["zarr"], "samples/s"),  # why we read by memory map
        Row.of("warm, take against zarr-python", ratios(warm, "take", "zarr"), "times"),
        Row.of("cold, batches from the thread", cold["prefetch"], "samples/s", 5_000 if bars else None),
        Row.of("cold, against no prefetch", ratios(cold, "prefetch", "none"), "times", 20 if bars else None),
        Row.of("cold, no prefetch", cold["none"], "samples/s"),
        *(
            Row.of(f"warm, of {count} shapes, against one", ratios(shaped, count, "1"), "times", 0.9 if bars else None)
            for count in ("7", "27")
        ),
        *(
            Row.of(f"warm, pages of {page} KiB against 4", ratios(paged, page, "4"), "times", 0.9 if bars else None)
            for page in ("16", "64")
        ),
        *(Row.of(f"main thread beside {rate} samples/s", beside[rate], "of its rate") for rate in beside),
    ]
    report("loader", args, rows)


def batches(cache: Cache, reader: Reader, batch_size: int = 64) -> Batches:
    """What training draws from."""
    samples = Samples.of(cache, None)
    return Batches(reader, samples, drawn(cache, samples, batch_size), torch.device("cpu"), batch_size=batch_size)


def shaped_cases(squares: Cache, folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Batches from the thread, of a cache of squares and of caches of several shapes: each returns samples/s."""
    rows, caches = SHAPES[args.size], {"1": squares}
    channels, side, _ = rows["images"]["original"]
    flat = dict(rows) | {"images": {"original": (channels, side**2), "edited": (2 * channels, side**2)}}
    every = [Shape(shape.height // 8, shape.width // 8) for shape in shapes(8 * side, 8)]
    for count in (7, 27):
        latents = [every[n] for n in np.linspace(0, len(every) - 1, count).astype(int)]
        caches[str(count)] = build(folder / f"shapes-{count}", args.samples, flat, latents=latents)
        # As the squares were: what is read ahead lies in memory in larger pieces than what was written.
        forget(caches[str(count)])
    cases = {
        count: partial(rate, batches(cache, Reader(cache), args.batch_size), args.samples, args.batch_size)
        for count, cache in caches.items()
    }
    for case in cases.values():
        case()  # brings all pages into memory
    return cases


def paged_cases(cache: Cache, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Batches from the thread as it maps shards where pages have 4, 16 or 64 KiB: each returns samples/s."""

    def case(page: int) -> Callable[[], float]:
        with patch.object(mmap, "PAGESIZE", page):
            loader = batches(cache, Reader(cache), args.batch_size)

        def measured() -> float:
            with patch.object(mmap, "PAGESIZE", page):
                return rate(loader, args.samples, args.batch_size)

        measured()  # brings all pages into memory
        return measured

    return {f"{page}": case(page * 2**10) for page in (4, 16, 64)}


def rate(loader: Batches, samples: int, batch_size: int) -> float:
    """Samples/s of the next batches, of about as many samples."""
    began = time.perf_counter()
    for _ in range(samples // batch_size):
        next(loader)
    return samples // batch_size * batch_size / (time.perf_counter() - began)


def drawn(cache: Cache, samples: Samples, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which samples a training run takes, batch by batch."""
    flags = {"pretrained_model_name_or_path": "", "cache": (cache.folder,), "output_dir": cache.folder}
    order = make_order(flags_into(TrainConfig, flags), samples, seed=0)
    return order.batches([0] * len(order.orders), batch_size)


def cold_rate(cache: Cache, kind: type[Reader], batch_size: int, count: int) -> float:
    """Samples/s of the first `count` batches after the cache has left memory."""
    forget(cache)
    reader = kind(cache)
    began = time.perf_counter()
    loader = batches(cache, reader, batch_size)
    for _ in range(count):
        next(loader)
    seconds = time.perf_counter() - began
    loader.close()
    return count * batch_size / seconds


def warm_cases(cache: Cache, batch_size: int, count: int) -> dict[str, Callable[[], float]]:
    """Four ways to get `count` batches of the same rows, each returns samples/s; zarr-python gets but a few of them."""
    reader, samples = Reader(cache), Samples.of(cache, None)
    chosen = [numbers for numbers, _ in islice(drawn(cache, samples, batch_size), count)]
    rows = [(samples.rows[numbers], np.zeros(batch_size, np.int64), samples.text_rows[numbers]) for numbers in chosen]
    out = {name: np.empty((batch_size, *array.row_shape), np.float16) for name, array in reader.arrays.items()}
    plain = {name: copy(cache, name) for name in out}
    loader = batches(cache, reader, batch_size)
    opened = cache.arrays("images") | cache.arrays("text")

    def zarr() -> None:
        for images, _, texts in rows[:SLOW]:
            for name, array in opened.items():
                found = array.oindex[texts] if name in ("text", "pooled") else array.oindex[images, 0]
                np.copyto(out[name], np.asarray(found))

    def memmap() -> None:
        for images, _, texts in rows:
            for name, array in plain.items():
                np.take(array, texts if name in ("text", "pooled") else images, axis=0, out=out[name], mode="clip")

    def take() -> None:
        for place in rows:
            reader.take(out, *place)

    def thread() -> None:
        for _ in range(count):
            next(loader)

    def rate(case: Callable[[], None]) -> float:
        began = time.perf_counter()
        case()
        return (min(count, SLOW) if case is zarr else count) * batch_size / (time.perf_counter() - began)

    cases = {"memmap": memmap, "take": take, "batches": thread, "zarr": zarr}
    for case in cases.values():
        case()  # brings all pages into memory
    return {name: lambda case=case: rate(case) for name, case in cases.items()}


def copy(cache: Cache, name: str) -> np.ndarray:
    """An array of the cache in one plain file, mapped: the way that is hard to beat."""
    text = name in ("text", "pooled")
    np.save(cache.folder / f"{name}.npy", np.asarray(cache.arrays("text" if text else "images")[name][:]))
    mapped = np.load(cache.folder / f"{name}.npy", mmap_mode="r")
    return mapped if text else mapped[:, 0]


def main_thread(cache: Cache, samples_per_second: str, windows: int = 10, seconds: float = 0.2) -> float:
    """Share of its rate of small operations that this thread keeps while it takes batches; short windows take turns."""
    loader, numbers, done = batches(cache, Reader(cache)), torch.zeros(16), [0, 0]
    for window in range(2 * windows):
        began = due = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            if window % 2 and now >= due:
                next(loader)
                due += 64 / int(samples_per_second)
            for _ in range(20):
                numbers.add_(1)
            done[window % 2] += 20
    loader.close()
    return done[1] / done[0]


if __name__ == "__main__":
    main()
