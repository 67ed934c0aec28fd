"""Tests with a writer of another make: it knows docs/cache-format.md, and nothing of ip2p."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ip2p.encode.base.errors import CacheError
from ip2p.encode.cache.writer import exclusive, share

# A record lock of the whole file, by `fcntl` with F_SETLK: what the page says, without waiting.
WRITER = """
import fcntl, struct, sys

lock = open(sys.argv[1], "a+")
kinds = {"exclusive": fcntl.F_WRLCK, "shared": fcntl.F_RDLCK, "none": fcntl.F_UNLCK}
for line in sys.stdin:
    start, length, process = 0, 0, 0
    try:
        fcntl.fcntl(lock, fcntl.F_SETLK, struct.pack("hhqqi4x", kinds[line.strip()], 0, start, length, process))
        print("held", flush=True)
    except OSError:
        print("refused", flush=True)
"""


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Lets another program ask for the lock of a cache: exclusive, shared or none; gives its answer."""
    (tmp_path / ".lock").touch()
    command = [sys.executable, "-c", WRITER, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        stdin, stdout = writer.stdin, writer.stdout
        assert stdin
        assert stdout

        def answer(kind: str) -> str:
            print(kind, file=stdin, flush=True)
            return stdout.readline().strip()

        yield answer
        stdin.close()


def test_an_encode_keeps_out_of_what_another_program_writes(ask: Callable[[str], str], tmp_path: Path) -> None:
    """While it plans, all; while it writes units, those that want to plan."""
    for kind, shared in (("exclusive", False), ("exclusive", True), ("shared", False)):
        assert ask(kind) == "held"
        with pytest.raises(CacheError, match="is being written by another"), exclusive(tmp_path, shared=shared):
            pass
    with exclusive(tmp_path, shared=True):
        pass
    assert ask("none") == "held"
    with exclusive(tmp_path):
        pass


def test_another_program_is_kept_out_while_an_encode_writes(ask: Callable[[str], str], tmp_path: Path) -> None:
    """By the plan altogether; by the units from planning alone; by nothing once that encode is over."""
    with contextlib.ExitStack() as encode:
        lock = encode.enter_context(exclusive(tmp_path))
        assert [ask("exclusive"), ask("shared")] == ["refused", "refused"]
        share(lock)
        assert [ask("exclusive"), ask("shared")] == ["refused", "held"]
        assert ask("none") == "held"
    assert ask("exclusive") == "held"
