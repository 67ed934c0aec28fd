"""Kills of a run while it writes checkpoints, or encodes: bench/kill.py, a few of its hundred and fifty."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # with those that CI alone has patience for

BENCH = Path(__file__).parents[1] / "bench"


def measured(folder: Path, *flags: str) -> dict[str, float]:
    """The figures that the bench finds, by name."""
    command = [sys.executable, str(BENCH / "kill.py"), *flags, "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((folder / "kill.jsonl").read_text().splitlines()[-1])["rows"]
    return {name: row["value"] for name, row in rows.items()}


def test_a_kill_leaves_a_checkpoint_that_an_undisturbed_run_would_have_written(tmp_path: Path) -> None:
    """At five random moments after the first one, bit for bit."""
    found = measured(tmp_path, "--kills", "5", "--whole", "0")
    assert found["kills"] == 5
    assert found["kills that left nothing right to resume from"] == 0


def test_one_command_killed_in_either_part_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """At three random moments of its encode and its training, with the same weights and moments bit for bit."""
    found = measured(tmp_path, "--kills", "0", "--whole", "3")
    assert sum(value for name, value in found.items() if name.endswith("of runs on a dataset")) == 3
    assert found["runs on a dataset that ended otherwise"] == 0
