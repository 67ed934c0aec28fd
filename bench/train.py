"""Samples per second of `ip2p-train` itself, whole processes, against the bare step of the UNet.

The command runs twice in each round, to two numbers of steps. What they differ in is training alone: imports, loading,
the checkpoint at the end and the export take part in both. The two take turns with the bare step of `step.py`, and
with a run that edits and scores held-out pairs.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from baselines import bare
from common import GPU, Results, Row, parser, ratios, rounds_of
from shapes import SIZES
from step import model_flags
from training import Training, free, rate, tune


def main() -> None:
    flags = parser(__doc__, rounds=3)
    model_flags(flags)
    flags.add_argument("--first", type=int, default=100 if GPU else 2, help="steps of the shorter run")
    flags.add_argument("--more", type=int, default=400 if GPU else 14, help="by how many the other is longer")
    args = flags.parse_args()
    if args.attention == "plain" or args.compile not in (None, "default"):
        flags.error("ip2p-train has neither unfused attention nor other modes of --compile")
    results = Results("train", args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.model(folder, args.size)
        data = runs.cache(folder, args.size, args.resolution, 64 * args.batch_size)
        cases = {
            "scores": lambda: scored(args, folder, data),
            "command": lambda: difference(args, folder, data),
            "bare": lambda: bare_rate(args, folder),
        }
        for rates in rounds_of(args.rounds, cases):
            results.add(*rows(rates, folder))


def rows(rates: dict[str, list[float]], folder: Path) -> Iterator[Row]:
    waiting = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])["waiting_for_data"]
    yield Row.of("ip2p-train", rates["command"], "samples/s")
    yield Row.of("the bare step", rates["bare"], "samples/s")
    yield Row.of("ip2p-train / bare", ratios(rates, "command", "bare"), "times", at_least=0.95)
    yield Row("share of its time that it waits for data", waiting, "of 1", at_most=0.01)
    edits = ratios(rates, "command", "scores")
    yield Row.of("a scored edit while it trains, as training", edits, "samples")


def bare_rate(args: argparse.Namespace, folder: Path) -> float:
    """Samples/s of the UNet's own step; nothing of it is left on the GPU, which the command shall have to itself."""
    training = Training(SIZES[args.size], folder / "bare", args.precision)
    loss = bare(training.unet, SIZES[args.size], batch_size=args.batch_size, resolution=args.resolution)
    tune(training.unet, args)
    rate(training.step, loss, 2, args.batch_size)
    found = rate(training.step, loss, args.more, args.batch_size)
    del training, loss
    free()
    return found


def difference(args: argparse.Namespace, folder: Path, data: Path) -> float:
    """Samples/s between two numbers of steps."""
    short, long = (seconds(args, folder, data, steps) for steps in (args.first, args.first + args.more))
    return args.more * args.batch_size / (long - short)


def scored(args: argparse.Namespace, folder: Path, data: Path) -> float:
    """Edits that a validation makes and scores in a second."""
    edits = 4
    seconds(args, folder, data, args.first, num_validation_samples=edits, score_samples=edits)
    lines = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return edits / next(line["scoring_seconds"] for line in lines if "scoring_seconds" in line)


def seconds(args: argparse.Namespace, folder: Path, data: Path, steps: int, **more: int) -> float:
    """Seconds that a whole run takes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.perf_counter()
    options: dict[str, object] = {
        "compile": bool(args.compile),
        "enable_xformers_memory_efficient_attention": args.attention == "xformers",
        **more,
    }
    if runs.start(args, folder, data, max_train_steps=steps, **options).wait():
        raise runs.fail(folder)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
