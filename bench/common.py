"""What all benchmarks share: rounds in which the cases take turns, a table, and a line in `bench/results/`."""

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


class Row(NamedTuple):
    """One figure, and the bar that it has to reach or must not pass."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


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


def report(name: str, settings: Mapping[str, Any], rows: list[Row]) -> None:
    """Print a table, and append it to `bench/results/NAME.jsonl` with date, machine, commit and versions."""
    lines = [("", "measured", "", "bar", "holds")]
    for row in rows:
        bars = {">=": row.at_least, "<=": row.at_most}
        bar = ", ".join(f"{sign} {_number(bar)}" for sign, bar in bars.items() if bar is not None)
        holds = "" if row.holds is None else "yes" if row.holds else "NO"
        lines.append((row.what, _number(row.value), row.unit, bar, holds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for what, value, *rest in lines:
        cells = [what.ljust(widths[0]), value.rjust(widths[1])]
        print("  ".join(cells + [cell.ljust(width) for cell, width in zip(rest, widths[2:], strict=True)]).rstrip())
    found = {row.what: row._asdict() | {"holds": row.holds} for row in rows}
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("ip2p", "torch", "diffusers", "zarr", "numpy")},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "rows": found,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
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


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
