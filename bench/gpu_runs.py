"""The sections of bench/gpu.py that run the whole commands: a training with checkpoints, and an encode."""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import runs
from accelerate.state import AcceleratorState
from arithmetic import gradient_bytes
from common import DEVICE, GPU
from encoding import decode_rate, measure
from gpu_frame import Bench
from shapes import SIZES, make_unet, save

from ip2p.encode.base.flags import build
from ip2p.encode.config import EncodeConfig
from ip2p.encode.planning.plan import workers


class Written(NamedTuple):
    """What was seen of a run."""

    reports: list[float]  # when each was there
    checkpoints: list[float]  # seconds from the first file of each to its name


def model(bench: Bench) -> Path:
    """A checkpoint with random weights, saved when it is asked for first."""
    folder, shape = bench.folder / "model", SIZES[bench.sizes.base]
    if not folder.is_dir():
        with DEVICE:
            unet = make_unet(shape, in_channels=4)
        save(shape, folder, unet.cpu())
    return folder


def command(bench: Bench) -> None:
    """`ip2p-train` as a process of its own, with averaging and checkpoints, and the GPU to itself."""
    sizes, every = bench.sizes, bench.sizes.run // 3
    needed = 11 * gradient_bytes(SIZES[sizes.base])  # two checkpoints of four times the weights, and two models
    if (free := shutil.disk_usage(bench.folder).free) < needed:
        return bench.note(f"ip2p-train: needs {needed / 2**30:.0f} GiB of disk, {free / 2**30:.0f} are free")
    model(bench)
    data = runs.cache(bench.folder, sizes.base, sizes.resolution, 8 * sizes.batch)
    args = argparse.Namespace(batch_size=sizes.batch, precision="no" if bench.demo else "fp16")
    flags = {"max_train_steps": sizes.run, "checkpointing_steps": every, "checkpoints_total_limit": 1}
    bench.free()
    began = time.monotonic()
    process = runs.start(args, bench.folder, data, **flags, use_ema=True, logging_steps=max(1, every // 5))
    try:
        written = watch(process, bench.folder / "out")
    finally:
        process.kill()
        process.wait()
    bench.add("ip2p-train: whole command", time.monotonic() - began, "s")
    if process.returncode:
        raise runs.fail(bench.folder)
    tell(bench, bench.folder / "out", began, written)


def watch(process: runs.Process, out: Path) -> Written:
    """Wait for a run, and see when its reports and checkpoints appear."""
    reports, begun, seconds = list[float](), dict[str, float](), list[float]()
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        now = time.monotonic()
        lines = metrics.read_text(encoding="utf-8").count("\n") if metrics.is_file() else 0
        reports += [now] * (lines - len(reports))
        for folder in out.glob("checkpoint-*.incomplete"):
            begun.setdefault(folder.name, now)
        for name in [name for name in begun if (out / name.removesuffix(".incomplete")).is_dir()]:
            seconds.append(now - begun.pop(name))
        time.sleep(0.02)
    return Written(reports, seconds)


def tell(bench: Bench, out: Path, began: float, written: Written) -> None:
    """What a run says of itself, and what was seen of it."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    every, batch, later = lines[0]["step"], bench.sizes.batch, lines[1:]
    rate = median(line["samples_per_second"] for line in later)
    first = written.reports[0] - began - every * batch / rate
    steps = lines[len(written.reports) - 1]["step"] - every
    bench.add("ip2p-train: command to first step", first, "s")
    bench.add("ip2p-train", rate, "samples/s")
    if (took := written.reports[-1] - written.reports[0]) > 0:
        bench.add("ip2p-train, with its checkpoints", steps * batch / took, "samples/s")
    bench.add("ip2p-train: waiting for data", mean(line["waiting_for_data"] for line in later), "of 1")
    bench.add("ip2p-train: waiting for checkpoints", sum(line["checkpoint_seconds"] for line in later), "s")
    if written.checkpoints:
        bench.add("ip2p-train: a checkpoint", median(written.checkpoints), "s")
    bench.add("ip2p-train: skipped steps", lines[-1]["skipped_steps"], "")
    bench.add("ip2p-train: peak memory", lines[-1]["memory_gib"], "GiB")


@contextlib.contextmanager
def pictures(bench: Bench) -> Iterator[None]:
    """Write the pairs that will be encoded in processes beside the other sections."""
    processes = 1 if bench.demo else next(n for n in (8, 4, 2, 1) if n == 1 or 2 * n <= (os.cpu_count() or 1))
    count, script = bench.sizes.pairs // processes, Path(__file__).with_name("pictures.py")
    writers = [
        subprocess.Popen([sys.executable, script, bench.folder / "data", *map(str, (first, count, bench.sizes.pixels))])
        for first in range(0, count * processes, count)
    ]
    bench.writers = writers
    try:
        yield
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def encoding(bench: Bench) -> None:
    """`ip2p-encode` from JPEG files to committed shards, against its encoders alone."""
    if any(writer.wait() for writer in bench.writers):
        return bench.note("ip2p-encode: the pictures could not be written")
    config = build(
        EncodeConfig,
        {
            "pretrained_model_name_or_path": str(model(bench)),
            "cache": bench.folder / "encoded",
            "dataset_name": str(bench.folder / "data"),
            "cache_dir": bench.folder / "downloads",
            "resolution": bench.sizes.resolution,
            "mixed_precision": "no" if bench.demo else "fp16",
        },
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its settings for a whole process
    rates, shares = measure(config, bench.sizes.pairs, rounds=1)
    decoding = decode_rate(config, min(bench.sizes.pairs, 64))
    whole, alone = median(rates["pipeline"]), median(rates["alone"])
    bench.add("ip2p-encode", whole, "pairs/s")
    bench.add("ip2p-encode, pictures", 2 * whole, "pictures/s")
    bench.add("the encoders alone", alone, "pairs/s")
    bench.add("ip2p-encode / the encoders alone", whole / alone, "times")
    bench.add("share of wall time in the encoders", median(shares), "of 1", at_least=0.9 if GPU else None)
    bench.add("decoding, one process", decoding, "pairs/s")
    bench.add("processes that decode", workers(config), "")
    bench.add("processes that the encoders need", math.ceil(alone / decoding), "")
