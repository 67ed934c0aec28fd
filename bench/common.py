"""What all benchmarks share: rounds in which the cases take turns, a table, and a line in `bench/results/`."""

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Dense products of half precision with sums in float32, TFLOP/s, from the data sheets; the first name that fits.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "RTX 4090": 165}


class Row(NamedTuple):
    """One figure, and the bar that it has to reach or must not pass."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bar(self) -> str:
        bars = {">=": self.at_least, "<=": self.at_most}
        return ", ".join(f"{sign} {number(bar)}" for sign, bar in bars.items() if bar is not None)

    @property
    def holds(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """The flags of every benchmark; the one for rounds where something is measured."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        flags.add_argument("--rounds", type=int, default=rounds, help=f"medians are taken over these (here: {rounds})")
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the results; another one for a trial")
    return flags


def peak() -> float | None:
    """TFLOP/s that this GPU reaches at best in half precision; None for one that is not listed, and without one."""
    name = torch.cuda.get_device_name() if GPU else ""
    return next((float(tera) for part, tera in PEAKS.items() if part in name), None)


def take_turns(rounds: int, cases: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure all cases once in each round, so that what else runs on the machine disturbs all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            values[name].append(case())
    return values


def ratio(values: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of one case divided by another."""
    return median(a / b for a, b in zip(values[above], values[below], strict=True))


def report(name: str, args: argparse.Namespace, rows: list[Row]) -> None:
    """Print a table, and append it to `bench/results/NAME.jsonl` with date, machine, commit and versions."""
    lines = [("", "measured", "", "bar", "holds")]
    for row in rows:
        holds = "" if row.holds is None else "yes" if row.holds else "NO"
        lines.append((row.what, number(row.value), row.unit, row.bar, holds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for what, value, *rest in lines:
        cells = [what.ljust(widths[0]), value.rjust(widths[1])]
        print("  ".join(cells + [cell.ljust(width) for cell, width in zip(rest, widths[2:], strict=True)]).rstrip())
    found = {row.what: row._asdict() | {"holds": row.holds} for row in rows}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del settings["results"]
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("ip2p", "torch", "diffusers", "zarr", "numpy")},
        "settings": settings,
        "rows": found,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, what else was running, and the GPU if there is one."""
    info = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    names = {key.strip(): value.strip() for key, value in info.items()}
    return {
        "cpu": names.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """The commit that was measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
