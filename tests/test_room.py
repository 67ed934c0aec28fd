"""Tests of train/save/room.py: before its first step a run says how many epochs it is and what it writes."""

import re
from collections import namedtuple
from pathlib import Path

import pytest

from ip2p.train.__main__ import main
from ip2p.train.save import room
from test_train import flags

MIB = 2**20
SAID = r"([\d,]+) checkpoints? of ([\d.,]+) MiB will be written(.*): .* at most ([\d.,]+) MiB more in .*, .* free"


def said(text: str) -> tuple[int, float, str, float]:
    """Checkpoints, MiB of one, which stay, and MiB in all, from what a command printed."""
    found = re.search(SAID, text)
    assert found, text
    return int(found[1]), float(found[2]), found[3], float(found[4])


def mib(folder: Path) -> float:
    """What all files below a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB


def test_a_run_says_its_epochs_and_its_checkpoints_with_their_size(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are those that the files then have; with the averages of --ema_power they are larger, and announced so."""
    out = tmp_path / "out"
    run = {"checkpointing_steps": 2, "checkpoints_total_limit": 1, "ema_power": True, "gradient_accumulation_steps": 2}
    main(flags(sd, cache, out, **run, max_train_steps=5))
    text = capsys.readouterr().out
    assert "5 steps of 4 samples are 2.0 epochs of 10 samples" in text
    count, each, stay, most = said(text)
    assert (count, stay) == (3, ", of which the newest 1 stay")  # of steps 2, 4 and 5
    assert 0 < mib(out / "checkpoint-5") - each < 0.5  # what pickle adds, half a KiB for each tensor
    assert mib(out) < most + 0.5
    assert most >= 2 * each + 0.9 * (mib(out) - mib(out / "checkpoint-5"))  # two while the last one is written
    main(flags(sd, cache, out, **run, max_train_steps=9, resume_from_checkpoint="latest"))
    text = capsys.readouterr().out
    assert "4 steps of 4 samples are 1.6 epochs" in text
    assert said(text)[:3] == (3, each, ", of which the newest 1 stay")  # of steps 6, 8 and 9
    assert said(text)[3] == pytest.approx(most - each, abs=0.2)  # one of the two is there
    main(
        flags(
            sd, cache, tmp_path / "made", max_train_steps=9, ema_power=True, resume_from_checkpoint=out / "checkpoint-9"
        )
    )
    assert "epochs of" not in capsys.readouterr().out  # nothing is trained


def test_a_run_for_which_the_disk_has_no_room_is_warned_before_its_first_step(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checkpoints count where all are kept, and the flags that keep fewer are named; the run goes on."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(MIB, MIB - 1, 1))
    out = tmp_path / "out"
    main(flags(sd, cache, out, checkpointing_steps=1, checkpoints_total_limit=0, max_train_steps=3))
    printed = capsys.readouterr()
    count, each, stay, most = said(printed.out)
    assert (count, stay) == (3, "")
    assert 3 * each < most
    assert f"{out} has no room for that: give --checkpoints_total_limit 1, a larger" in printed.err
    assert (out / "checkpoint-3").is_dir()
