"""Tests of bench/gpu.py, rehearsed on the CPU: what it finds is in its file at once, whatever happens after that."""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # they run much of bench/gpu.py

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
frame, shapes, training = map(importlib.import_module, ("gpu_frame", "shapes", "training"))


def start(out: Path, deadline: int, *only: str) -> subprocess.Popen[bytes]:
    """The script as a process."""
    words = ["--size", "demo", "--out", str(out), "--deadline", str(deadline), "--only", *only]
    return subprocess.Popen([sys.executable, ROOT / "bench" / "gpu.py", *words], stdout=subprocess.DEVNULL)


def lines(out: Path) -> list[dict[str, Any]]:
    """What was found, of which the last line may be torn."""
    *whole, last = (out / "gpu.jsonl").read_text().split("\n")
    return [json.loads(line) for line in whole] + ([json.loads(last)] if last.endswith("}") else [])


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """The frame of the sections."""
    args = argparse.Namespace(size="demo", deadline=60.0, out=tmp_path)
    found = frame.Bench(args, tmp_path)
    found.section = "trial"
    return found


def test_sections_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """With little time the small sections run, and the others are told of, in a file that says where it comes from."""
    assert start(tmp_path, 20, "machine", "speed", "compiled", "command").wait(timeout=120) == 0
    found = lines(tmp_path)
    assert {"date", "machine", "versions", "settings", "section", "rows"} <= found[0].keys()
    rows = {name: row for line in found for name, row in line["rows"].items()}
    assert rows["memory, read and written"]["value"] > 0
    assert rows["tiny, 64 px, batch 4: cached"]["unit"] == "samples/s"
    notes = [line["note"] for line in found if "note" in line]
    assert [note.split(":")[0] for note in notes if "skipped" in note] == ["command", "compiled"]


def test_a_run_that_is_killed_leaves_what_it_had_found(tmp_path: Path) -> None:
    """Killed in its first section but one, all that was printed until then can be read."""
    process = start(tmp_path, 100, "machine", "correctness")
    try:
        began = time.monotonic()
        while not (tmp_path / "gpu.jsonl").is_file() or "correctness" not in (tmp_path / "gpu.jsonl").read_text():
            assert process.poll() is None
            assert time.monotonic() < began + 120
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    names = [name for line in lines(tmp_path) for name in line["rows"]]
    assert "machine, whole section" in names
    assert "correctness, whole section" not in names


def test_what_fails_is_told_and_the_rest_goes_on(bench: Any, tmp_path: Path) -> None:
    """An error and a lack of memory end their part alone, and are lines with a reason."""
    for error in (RuntimeError("no such kernel\nand more"), torch.OutOfMemoryError("CUDA out of memory")):
        with bench.part("trying"):
            raise error
    bench.add("after it", 1, "s")
    first, second, third = lines(tmp_path)
    assert first["note"] == "trying failed: RuntimeError: no such kernel"
    assert "raise error" in first["traceback"]
    assert second["note"] == "trying: out of memory"
    assert third["rows"]["after it"]["value"] == 1


def test_a_section_that_takes_too_long_is_stopped(bench: Any, tmp_path: Path) -> None:
    """Its time is over in the middle of it, even where it takes every failure for its own."""
    with bench.limited(1), bench.part("endless"):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)
    assert "stopped after 1 s" in lines(tmp_path)[-1]["note"]


def test_regions_compute_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All residual blocks and transformers are compiled, and the prediction stays."""
    torch.manual_seed(0)
    unet = shapes.make_unet(shapes.TINY).requires_grad_(False)
    inputs = torch.randn(1, 8, 8, 8), torch.tensor([7]), torch.randn(1, 77, 16)
    before = unet(*inputs).sample
    assert training.compile_regions(unet, backend="eager") == 38
    assert torch.equal(unet(*inputs).sample, before)
    torch.compiler.reset()
