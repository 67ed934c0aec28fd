"""What only a GPU can tell, in one process and a few minutes: first whether all is right, then how fast it is.

The sections come in the order of their value, each within a share of the time, and each figure is in OUT/gpu.jsonl as
soon as it is known. So a run that is cut off leaves what matters most. `--size demo` rehearses on a CPU.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from common import GPU, results_folder
from gpu_fast import base_model, by_regions, compiled, large_pictures, sdxl, variants
from gpu_frame import Bench
from gpu_machine import machine, profile
from gpu_right import attention, correctness
from gpu_runs import command, encoding, pictures


class Section(NamedTuple):
    """A part of the run, and the seconds that it needs on an H100 and in a rehearsal."""

    run: Callable[[Bench], None]
    seconds: int
    rehearsal: int


SECTIONS = {
    "machine": Section(machine, 10, 2),
    "correctness": Section(correctness, 80, 25),
    "xformers": Section(attention, 8, 1),
    "speed": Section(base_model, 60, 6),
    "profile": Section(profile, 12, 12),
    "variants": Section(variants, 35, 8),
    "sdxl": Section(sdxl, 45, 6),
    "encode": Section(encoding, 45, 8),
    "command": Section(command, 80, 25),
    "512": Section(large_pictures, 20, 4),
    "compiled": Section(compiled, 200, 30),
    "regions": Section(by_regions, 150, 12),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=results_folder, default=Path("gpu"), help="folder of the results (default: gpu)")
    flags.add_argument("--deadline", type=float, default=600, help="seconds for all of it (default: 600)")
    flags.add_argument("--size", choices=("gpu", "demo"), default="gpu", help="demo: tiny models, to rehearse on a CPU")
    flags.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    args = flags.parse_args()
    if args.size == "gpu" and not GPU:
        flags.error("PyTorch sees no GPU; --size demo rehearses on a CPU")
    faulthandler.dump_traceback_later(args.deadline + 30, exit=True)  # should nothing else end it
    names = [name for name in SECTIONS if name in args.only]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(args, Path(folder))
        with pictures(bench) if "encode" in names else contextlib.nullcontext():
            rest = list(run(bench, names))
    if rest:  # a kernel has spoiled the GPU for this process
        words = [f"--{name}={getattr(args, name)}" for name in ("out", "size")]
        os.execv(sys.executable, [sys.executable, *sys.argv[:1], *words, f"--deadline={bench.left}", "--only", *rest])


def run(bench: Bench, names: list[str]) -> Iterator[str]:
    """Run sections; gives those that need another process."""
    for name in names:
        section, bench.section = SECTIONS[name], name
        if not bench.usable():
            yield name
            continue
        seconds = section.rehearsal if bench.demo else section.seconds
        if seconds > bench.left:
            bench.note(f"{name}: skipped, it needs {seconds} s and {max(0, bench.left):.0f} are left")
            continue
        print(f"== {name}", flush=True)
        began = time.monotonic()
        with bench.limited(1.5 * seconds), bench.part(name):
            section.run(bench)
        bench.add(f"{name}, whole section", time.monotonic() - began, "s")


if __name__ == "__main__":
    main()
