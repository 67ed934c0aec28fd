"""How long `ip2p-train` takes from the command to the end of its first step, and what a large cache costs in memory.

The cache has as many samples as the largest public dataset of edits. Its shards are one file under many names, so the
disk plays no part in it: what is measured is reading the table of samples and the records, and mapping the shards.
"""

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import runs
from common import DTYPES, Row, parser, report, take_turns
from diffusers import UNet2DConditionModel
from shapes import SIZES


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--samples", type=int, default=300_000, help="in the cache (default: 300000)")
    flags.add_argument("--size", choices=SIZES, default="small")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=4)
    flags.add_argument("--precision", choices=DTYPES, default="no")
    flags.add_argument("--folder", type=Path, help="where the cache lies for the time being")
    args = flags.parse_args()
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = runs.model(folder, args.size)
        caches = {
            which: runs.cache(folder, args.size, args.resolution, samples)
            for which, samples in (("large", args.samples), ("small", 8 * args.batch_size))
        }

        def first_step(which: str) -> float:
            took, peak = until_first_step(functools.partial(runs.start, args, folder, caches[which]), folder)
            memory.setdefault(which, []).append(peak)
            return took

        cases: dict[str, Callable[[], float]] = {which: functools.partial(first_step, which) for which in caches}
        seconds = take_turns(args.rounds, cases | {"model": lambda: load(model)})
    beyond = {which: [a - b for a, b in zip(seconds[which], seconds["model"], strict=True)] for which in caches}
    grown = [large - small for large, small in zip(memory["large"], memory["small"], strict=True)]
    rows = [
        Row.of("command to first step", seconds["large"], "s"),
        Row.of("loading the UNet", seconds["model"], "s"),
        Row.of("command to first step, beyond that", beyond["large"], "s", at_most=15),
        Row.of(f"the same with {8 * args.batch_size} samples", beyond["small"], "s"),
        Row.of("peak memory", memory["large"], "GiB"),
        Row.of("peak memory, more than with few samples", grown, "GiB", at_most=1),
    ]
    report("start", args, rows)


def load(model: Path) -> float:
    """Seconds to load the UNet."""
    began = time.perf_counter()
    UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    return time.perf_counter() - began


def until_first_step(start: Callable[..., runs.Process], folder: Path) -> tuple[float, float]:
    """Seconds from the command to the end of the first step, and the peak memory until then in GiB.

    Memory is what the process has in use, with the pages of the cache that it has touched. It is ended then.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    began, peak = time.perf_counter(), 0
    metrics = folder / "out" / "metrics.jsonl"  # begins with what the first step yields
    process = start(logging_steps=1, max_train_steps=1000)
    try:
        while not metrics.is_file():
            if process.poll() is not None:
                raise runs.fail(folder)
            peak = runs.peak_memory(process) or peak
            time.sleep(0.01)
        return time.perf_counter() - began, (runs.peak_memory(process) or peak) / 2**30
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
