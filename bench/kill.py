"""Kills `ip2p-train` again and again, while it writes checkpoints and while it encodes, and looks at what is left.

On a cache: after the first checkpoint there must always be a complete one to resume from, and it must equal bit for bit
what an undisturbed run wrote at that step, waiting for each checkpoint. The model is tiny, its pictures have three
shapes, and each step ends in a checkpoint: so most kills fall into the writing of one.

On a dataset: runs are killed three times, at random moments of the encode and of the training, and each time the same
command is given again; in the end there must be the last checkpoint of an undisturbed run, bit for bit.

Counts of violations are printed, which must be 0.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that are forked must not share threads
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from common import Row, parser, report
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from ip2p.encode.__main__ import main as encode
from ip2p.encode.cache import format as cache
from ip2p.train.__main__ import main as train
from ip2p.train.save import checkpoint
from ip2p.train.save.checkpoint import checkpoints

STEPS = 10**6  # more than a run gets to
ROWS = 4  # of a shard, so that an encode has many
PARTS = ("encode", "training")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kills", type=int, default=100, help="of runs on a cache")
    flags.add_argument("--whole", type=int, default=50, help="kills of runs on a dataset")
    flags.add_argument("--seed", type=int, default=0, help="of the moments")
    args = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = of_training(Path(folder), args) if args.kills else []
        rows += of_both(Path(folder), args) if args.whole else []
    report("kill", args, rows)
    raise SystemExit(any(row.at_most is not None and not row.holds for row in rows))


def of_training(folder: Path, args: argparse.Namespace) -> list[Row]:
    found = list(killed(folder, args))
    return [
        Row("kills", len(found), ""),
        Row("kills that left a checkpoint half written", sum(torn for torn, _ in found), "", at_least=1),
        Row("kills that left nothing right to resume from", sum(wrong for _, wrong in found), "", at_most=0),
    ]


def of_both(folder: Path, args: argparse.Namespace) -> list[Row]:
    found = list(killed_in_either(folder, args))
    kills = [part for parts, _ in found for part in parts]
    return [
        *(Row(f"kills in the {part}, of runs on a dataset", kills.count(part), "", at_least=1) for part in PARTS),
        Row("runs on a dataset that ended otherwise", sum(wrong for _, wrong in found), "", at_most=0),
    ]


def killed(folder: Path, args: argparse.Namespace) -> Iterator[tuple[bool, bool]]:
    """For each kill, whether a checkpoint was left half written, and whether the last complete one is not right."""
    random.seed(args.seed)
    model, data = tiny.checkpoint(folder / "model"), tiny.dataset(folder / "data", tiny.pairs(10, sizes=tiny.SIDES))
    encoding = {"pretrained_model_name_or_path": model, "dataset_name": data, "cache": folder / "cache"}
    encode(tiny.arguments(encoding | {"resolution": 16, "bucket_step": 4, "dataloader_num_workers": 0}))
    command = {"pretrained_model_name_or_path": model, "cache": folder / "cache", "train_batch_size": 2, "seed": 0}
    command |= {"checkpointing_steps": 1, "use_ema": True, "report_to": "none", "resume_from_checkpoint": "auto"}
    output, straight = folder / "out", folder / "straight"
    for kill in range(args.kills):
        process = start(command | {"output_dir": output, "max_train_steps": STEPS})
        before = last(output)
        while last(output) == before:  # it is running, and has got further than the one before
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.6))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        torn = any(output.glob("*.incomplete"))
        # The undisturbed run has no memory for copies, so it waits for each checkpoint; it goes as far as is needed.
        reference = command | {"output_dir": straight, "max_train_steps": last(output), "checkpoints_total_limit": 2}
        if last(straight) < last(output):
            os.waitpid(start(reference, background=False), 0)
        wrong = not same(output / f"checkpoint-{last(output)}", straight / f"checkpoint-{last(output)}")
        print(f"kill {kill + 1}: step {last(output)}{', half written' * torn}{', WRONG' * wrong}", flush=True)
        yield torn, wrong


def killed_in_either(folder: Path, args: argparse.Namespace) -> Iterator[tuple[list[str], bool]]:
    """For each run on a dataset, the parts in which it was killed, and whether it ended otherwise than undisturbed."""
    random.seed(args.seed)
    cache.SHARD_ROWS = ROWS
    model, data = tiny.checkpoint(folder / "base"), tiny.dataset(folder / "pairs", tiny.pairs(40, sizes=tiny.SIDES))
    command = {"pretrained_model_name_or_path": model, "dataset_name": data, "resolution": 16, "bucket_step": 4}
    command |= {"dataloader_num_workers": 0, "encode_batch_size": 2, "random_flip": True, "max_train_steps": 60}
    command |= {"train_batch_size": 2, "seed": 0, "checkpointing_steps": 7, "use_ema": True, "report_to": "none"}

    def begin(run: Path) -> int:
        os.environ["XDG_CACHE_HOME"] = str(run)
        return start(command | {"output_dir": run / "out"})

    straight, began = folder / "undisturbed", time.time()
    os.waitpid(begin(straight), 0)
    encoded = trains(straight) / 1e9
    seconds = dict(zip(PARTS, (encoded - began, time.time() - encoded), strict=True))
    print(", ".join(f"{part} {long:.1f} s" for part, long in seconds.items()), flush=True)
    left, last_one = args.whole, "out/checkpoint-60"
    for number in itertools.count():
        run, parts = folder / f"run{number}", list[str]()
        for part in sorted(random.choices(PARTS, k=min(3, left))):
            before = trains(run)
            process = begin(run)
            begun = part == "encode" or lives(process, lambda: trains(run) != before)  # noqa: B023
            if not begun or not lives(process, after(random.uniform(0, seconds[part]))):
                seconds[part] *= 0.8  # it was faster
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            parts.append(PARTS[trains(run) != before])
        left -= len(parts)
        os.waitpid(begin(run), 0)
        wrong = not (run / last_one).is_dir() or not same(run / last_one, straight / last_one)
        print(f"killed in: {', '.join(parts) or 'neither'}{', WRONG' * wrong}; {left} to go", flush=True)
        yield parts, wrong
        if not left:
            return


def trains(run: Path) -> int:
    """When the training of a run began last, in nanoseconds; 0 before that."""
    settings = run / "out" / "train.yaml"
    return settings.stat().st_mtime_ns if settings.is_file() else 0


def lives(process: int, until: Callable[[], bool]) -> bool:
    """Whether a process is still there when something has come about."""
    while not until():
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    return True


def after(seconds: float) -> Callable[[], bool]:
    """Asks whether so much time has passed."""
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() >= moment


def start(flags: dict[str, Any], *, background: bool = True) -> int:
    """Train in a process of its own, which need not import anything again; returns its number."""
    if process := os.fork():
        return process
    try:
        tqdm.set_lock(threading.RLock())  # processes that are forked share one, and whoever is killed would keep it
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        if not background:
            checkpoint.SPARE = 2**60
        train(tiny.arguments(flags))
    finally:
        os._exit(0)


def last(output: Path) -> int:
    """Step of the last complete checkpoint, or 0."""
    return there[-1][0] if (there := checkpoints(output)) else 0


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits, file by file."""
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        equal(read(one / name), read(other / name)) for name in names
    )


def read(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def equal(one: Any, other: Any) -> bool:
    """Whether two trees are the same; a torn one cannot be read, and raises."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


if __name__ == "__main__":
    main()
