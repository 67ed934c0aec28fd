"""Kills of a run while it writes checkpoints: bench/kill.py, a few of its hundred."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # with those that CI alone has patience for

BENCH = Path(__file__).parents[1] / "bench"


def test_a_kill_leaves_a_checkpoint_that_an_undisturbed_run_would_have_written(tmp_path: Path) -> None:
    """At five random moments after the first one, bit for bit."""
    command = [sys.executable, str(BENCH / "kill.py"), "--kills", "5", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads((tmp_path / "kill.jsonl").read_text().splitlines()[-1])["rows"]
    assert rows["kills"]["value"] == 5
    assert rows["kills that left nothing right to resume from"]["value"] == 0
