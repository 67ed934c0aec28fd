"""What all benchmarks share: rounds in which the cases take turns, and lines in `bench/results/` while they go on."""

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = ("ip2p", "torch", "triton", "diffusers", "transformers", "accelerate", "zarr", "numpy")


class Row(NamedTuple):
    """One figure, and the bar that it has to reach or must not pass; the lowest and the highest of those it is of."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(
        cls,
        what: str,
        values: Iterable[float],
        unit: str,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> "Row":
        """The median of what was measured in several rounds, with its spread."""
        values = list(values)
        return cls(what, median(values), unit, at_least, at_most, min(values), max(values))

    @property
    def spread(self) -> str:
        """From the lowest to the highest; empty where there is one alone."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"

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
    kept = {"type": results_folder, "default": str(RESULTS)}  # text, so that argparse looks at it, too
    flags.add_argument("--results", help="folder of the results; another one for a trial", **kept)
    return flags


def results_folder(name: str) -> Path:
    """A folder of results; those in `bench/results` are of a commit, so nothing may differ from it when they begin."""
    folder = Path(name)
    if folder.resolve() == RESULTS.resolve() and (commit() or "-dirty").endswith("-dirty"):
        raise argparse.ArgumentTypeError("the tree differs from its commit: commit first, or name another folder")
    return folder


def take_turns(rounds: int, cases: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure all cases once in each round, so that what else runs on the machine disturbs all of them alike."""
    return list(rounds_of(rounds, cases))[-1]


def rounds_of(rounds: int, cases: Mapping[str, Callable[[], float]]) -> Iterator[dict[str, list[float]]]:
    """The same, giving what is known after each round."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            values[name].append(case())
        yield values


def ratios(values: Mapping[str, list[float]], above: str, below: str) -> list[float]:
    """One case divided by another, for each round."""
    return [a / b for a, b in zip(values[above], values[below], strict=True)]


class Results:
    """The lines of one run in `bench/results/NAME.jsonl`, each with date, machine, commit and versions.

    A line is in the file when `add` returns, whole, so a run that is killed leaves what it had found. Of a figure that
    is given several times, the last one counts.

    Args:
        name: of the file.
        args: the flags; `results` names the folder, the others are kept as settings.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.file = args.results / f"{name}.jsonl"
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        del settings["results"]
        self.same = {"commit": commit(), "versions": versions(), "settings": settings}
        self.machine = machine()

    def add(self, *rows: Row, **more: Any) -> None:
        """Print figures and append a line that holds them, and whatever else belongs to it."""
        for row in rows:
            holds = {None: "", True: "holds", False: "DOES NOT HOLD"}[row.holds]
            cells = [f"{row.what:<48} {number(row.value):>9} {row.unit:<12}", f"{row.spread:<16}" * bool(row.spread)]
            cells += [f"{row.bar:<8}" * bool(row.bar), holds]
            print(" ".join(cells).rstrip(), flush=True)
        found = {row.what: row._asdict() | {"holds": row.holds} for row in rows}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {"date": now, "machine": self.machine, **self.same, **more, "rows": found}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab", buffering=0) as file:  # a line is one write: all of it is there, or nothing
            file.write(json.dumps(line).encode() + b"\n")


def report(name: str, args: argparse.Namespace, rows: list[Row]) -> None:
    """Print figures that are all known at once, and append them as one line."""
    Results(name, args).add(*rows)


@functools.cache
def load() -> float:
    """What was running when this process began: mean number of processes in the minute before."""
    return round(os.getloadavg()[0], 1)


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
        "load": load(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def commit() -> str | None:
    """The commit that this process measures, marked if files differ from it; None where that cannot be told.

    Results do not count, nor do the pages that show them: one benchmark after the other writes there.
    """
    differing = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"]
    commands = ["git", "rev-parse", "--short", "HEAD"], [*differing, ":(top,exclude)docs"]
    try:
        told = [subprocess.run(c, cwd=RESULTS.parent, capture_output=True, text=True, check=True) for c in commands]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    head, changes = (run.stdout.strip() for run in told)
    return head + "-dirty" * bool(changes)


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
