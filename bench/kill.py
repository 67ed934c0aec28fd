"""Kills `ip2p-train` again and again while it writes checkpoints, and looks at what is left each time.

After the first checkpoint there must always be a complete one to resume from, and it must equal bit for bit what an
undisturbed run wrote at that step, waiting for each checkpoint. The model is tiny, its pictures have three shapes, and
each step ends in a checkpoint: so most kills fall into the writing of one. A count of violations is printed, which must
be 0.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that are forked must not share threads
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from common import Row, parser, report
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from ip2p.encode.__main__ import main as encode
from ip2p.train.__main__ import main as train
from ip2p.train.save import checkpoint
from ip2p.train.save.checkpoint import checkpoints

STEPS = 10**6  # more than a run gets to


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--seed", type=int, default=0, help="of the moments")
    args = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = list(killed(Path(folder), args))
    rows = [
        Row("kills", len(found), ""),
        Row("kills that left a checkpoint half written", sum(torn for torn, _ in found), "", at_least=1),
        Row("kills that left nothing right to resume from", sum(wrong for _, wrong in found), "", at_most=0),
    ]
    report("kill", args, rows)
    raise SystemExit(any(wrong for _, wrong in found))


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


def start(flags: dict[str, Any], *, background: bool = True) -> int:
    """Train in a process of its own, which need not import anything again; returns its number."""
    if process := os.fork():
        return process
    try:
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
