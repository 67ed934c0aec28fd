"""Samples per second of `ip2p-train` itself, whole processes, against the bare step of the UNet.

The command runs twice in each round, to two numbers of steps. What they differ in is training alone: imports, loading,
the checkpoint at the end and the export take part in both. The two take turns with the bare step of `step.py`.
"""

import argparse
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import runs
from baselines import bare
from common import GPU, Row, parser, ratio, report, take_turns
from shapes import SIZES
from step import model_flags, rate, trainable, trainer, tune


def main() -> None:
    flags = parser(__doc__, rounds=3)
    model_flags(flags)
    flags.add_argument("--first", type=int, default=100 if GPU else 2, help="steps of the shorter run")
    flags.add_argument("--more", type=int, default=400 if GPU else 14, help="by how many the other is longer")
    args = flags.parse_args()
    if args.attention == "plain" or args.compile not in (None, "default"):
        flags.error("ip2p-train has neither unfused attention nor other modes of --compile")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.model(folder, args.size)
        data = runs.cache(folder, args.size, args.resolution, 64 * args.batch_size)
        unet = trainable(args)
        loss = bare(unet, SIZES[args.size], batch_size=args.batch_size, resolution=args.resolution)
        tune(unet, args)
        train = trainer(unet, args.precision)
        rate(train, loss, 2, args.batch_size)
        cases = {
            "command": lambda: difference(args, folder, data),
            "bare": functools.partial(rate, train, loss, args.more, args.batch_size),
        }
        rates = take_turns(args.rounds, cases)
        waiting = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])["waiting_for_data"]
    rows = [
        Row("ip2p-train", median(rates["command"]), "samples/s"),
        Row("the bare step", median(rates["bare"]), "samples/s"),
        Row("ip2p-train / bare", ratio(rates, "command", "bare"), "times", at_least=0.95),
        Row("share of its time that it waits for data", waiting, "of 1", at_most=0.01),
    ]
    report("train", args, rows)


def difference(args: argparse.Namespace, folder: Path, data: Path) -> float:
    """Samples/s between two numbers of steps."""
    short, long = (seconds(args, folder, data, steps) for steps in (args.first, args.first + args.more))
    return args.more * args.batch_size / (long - short)


def seconds(args: argparse.Namespace, folder: Path, data: Path, steps: int) -> float:
    """Seconds that a whole run takes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.perf_counter()
    options = {
        "compile": bool(args.compile),
        "enable_xformers_memory_efficient_attention": args.attention == "xformers",
    }
    if runs.start(args, folder, data, max_train_steps=steps, **options).wait():
        raise runs.fail(folder)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
