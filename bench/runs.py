"""`ip2p-train` as a process of its own, on a synthetic cache."""

import argparse
import subprocess
import sys
from pathlib import Path

from shapes import SIZES, make_unet, save
from synthetic import build

from tiny import arguments

Process = subprocess.Popen[bytes]


def model(folder: Path, size: str) -> Path:
    """A checkpoint of this size to start from."""
    return save(SIZES[size], folder / "model", make_unet(SIZES[size], in_channels=4))


def cache(folder: Path, size: str, resolution: int, samples: int) -> Path:
    """A cache that the checkpoint can be trained from."""
    return build(folder / f"cache-{samples}", samples, SIZES[size].rows(resolution), folder / "model").folder


def start(args: argparse.Namespace, folder: Path, data: Path, **flags: object) -> Process:
    """Start the command, its output thrown away; it trains into FOLDER/out, from `data`."""
    settings = {
        "pretrained_model_name_or_path": folder / "model",
        "cache": data,
        "output_dir": folder / "out",
        "train_batch_size": args.batch_size,
        "mixed_precision": args.precision,
        "report_to": "none",
        "seed": 0,
    }
    command = [sys.executable, "-m", "ip2p.train", *arguments(settings | flags)]
    with (folder / "stderr").open("wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def peak_memory(process: Process) -> int:
    """The most bytes that a process has had in memory; 0 once it has ended."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def fail(folder: Path) -> RuntimeError:
    """What a run that ended too early said."""
    return RuntimeError((folder / "stderr").read_text(errors="replace")[-2000:])
