"""Tests of train/save: checkpoints are written beside the training, whole or not at all, and loaded again."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ip2p.encode.base.errors import SettingsError, TrainError
from ip2p.train.save import checkpoint
from ip2p.train.save.checkpoint import AVERAGE, MODEL, OPTIMIZER, SCALE, Checkpoints, HostCopies, checkpoints
from ip2p.train.save.resume import find, load


class Part:
    """Something with a state."""

    def __init__(self, state: Any):
        self.state = state

    def state_dict(self) -> Any:
        """What a checkpoint keeps."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """What a checkpoint gives back."""
        self.state = state


@pytest.fixture
def parts() -> dict[str, Part | None]:
    """Weights in channels_last, moments in a tree, and no average."""
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}}, "param_groups": [{"lr": 0.1}]}
    return {MODEL: Part({"weight": weight}), OPTIMIZER: Part(moments), AVERAGE: None}


class Gate:
    """Lets `checkpoint.write` wait until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.began, self.open = threading.Event(), threading.Event()
        original = checkpoint.write

        def write(folder: Path, state: Any) -> None:
            self.began.set()
            assert self.open.wait(60)
            original(folder, state)

        monkeypatch.setattr(checkpoint, "write", write)


def test_training_goes_on_while_a_checkpoint_is_written_and_what_it_holds_is_the_moment_of_its_step(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save` returns at once; what the weights become after it is not in the file; its name comes last."""
    gate, model = Gate(monkeypatch), parts[MODEL]
    assert model
    before = model.state["weight"].clone()
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)
        assert gate.began.wait(60)
        assert writer.busy
        assert checkpoints(tmp_path) == []
        model.state["weight"].zero_()
        gate.open.set()
        writer.wait()
        assert not writer.busy
    assert torch.equal(load_file(tmp_path / "checkpoint-1" / MODEL)["weight"], before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_the_next_checkpoint_and_the_end_wait_for_the_one_that_is_being_written(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one copy of the state and one writer; the seconds that training stood still are counted."""
    gate = Gate(monkeypatch)
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)
        assert writer.waited < 0.5
        threading.Timer(0.5, gate.open.set).start()
        writer.save(2, parts)
        assert (tmp_path / "checkpoint-1").is_dir()
        assert writer.waited > 0.4
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]


def test_a_second_ctrl_c_does_not_wait(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being written stays under its temporary name, and the next run removes it."""
    gate = Gate(monkeypatch)
    began = time.perf_counter()
    writer = Checkpoints(tmp_path, 3).__enter__()
    writer.save(1, parts)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert time.perf_counter() - began < 30
    assert checkpoints(tmp_path) == []
    gate.open.set()
    writer.wait()
    (tmp_path / "checkpoint-7.incomplete").mkdir()
    with Checkpoints(tmp_path, 3):
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_goes_wrong_in_the_thread_is_said_at_the_next_step(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with the last good checkpoint; the torn one is gone, and an error that nobody foresaw keeps its kind."""
    original = checkpoint.write

    def full(folder: Path, state: Any) -> None:
        original(folder, state)
        if "checkpoint-2" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "checkpoint-3" in folder.name:
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "write", full)
    with Checkpoints(tmp_path, 3) as writer:
        writer.check()
        for step in (1, 2):
            writer.save(step, parts)
        while writer.busy:
            time.sleep(0.01)
        with pytest.raises(TrainError, match=r"checkpoint-2 cannot be written .*; checkpoint-1 is the last"):
            writer.check()
        writer.check()
        writer.save(3, parts)
        with pytest.raises(ZeroDivisionError):
            writer.wait()
    assert [path.name for path in tmp_path.iterdir() if "3" not in path.name] == ["checkpoint-1"]


def test_an_error_of_the_training_is_not_hidden_by_one_of_a_checkpoint(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without one, the end of the run tells of a checkpoint that failed meanwhile."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    writer = Checkpoints(tmp_path, 3).__enter__()
    writer.save(1, parts)
    writer.__exit__(ValueError, ValueError("of the training"), None)  # and raises nothing in its place
    with pytest.raises(TrainError, match="there is none yet"), Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)


def test_without_memory_for_the_copies_training_waits_for_the_disk(
    tmp_path: Path, parts: dict[str, Part | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is the same, and there when `save` returns."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)
        assert not writer.busy
        assert [step for step, _ in checkpoints(tmp_path)] == [1]
    model = parts[MODEL]
    assert model
    assert torch.equal(load_file(tmp_path / "checkpoint-1" / MODEL)["weight"], model.state["weight"])


def test_one_process_writes_and_tidies_up(tmp_path: Path, parts: dict[str, Part | None]) -> None:
    """The others touch nothing: two that remove the same torn checkpoint would trip over each other."""
    (tmp_path / "checkpoint-7.incomplete").mkdir()
    with Checkpoints(tmp_path, 3, writes=False) as other:
        other.save(1, parts)
        other.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7.incomplete"]


def test_checkpoints_of_later_steps_are_not_this_runs_to_delete(tmp_path: Path, parts: dict[str, Part | None]) -> None:
    """However they came there: what is saved now is what stays."""
    for step in (500, 600, 700, 800):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with Checkpoints(tmp_path, 2) as writer:
        for step in (550, 560):
            writer.save(step, parts)
    assert [step for step, _ in checkpoints(tmp_path)] == [550, 560, 600, 700, 800]


def test_a_limit_that_nobody_tells_is_lived_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is refused, training waits for the disk."""

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    copies = HostCopies()
    monkeypatch.setattr(copies, "_take_memory", refuse)
    assert copies.take({"weight": torch.ones(3)}) is None


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit counts, without the pages of files that it holds; a container without one has what the machine has."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.setattr(checkpoint, "CONTAINER", tmp_path)
    assert checkpoint.available() == 2**40
    for name, content in {"max": "1000", "current": "900", "stat": "anon 500\nfile 300"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    assert checkpoint.available() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert checkpoint.available() == 2**40


@pytest.mark.parametrize(("limit", "left"), [(0, [1, 2, 10]), (1, [10]), (2, [2, 10])])
def test_the_newest_are_kept(tmp_path: Path, parts: dict[str, Part | None], limit: int, left: list[int]) -> None:
    """By their steps; 0 keeps all."""
    with Checkpoints(tmp_path, limit) as writer:
        for step in (1, 2, 10):
            writer.save(step, parts)
    assert [step for step, _ in checkpoints(tmp_path)] == left


def test_a_file_holds_no_more_than_its_own_tensors(tmp_path: Path, parts: dict[str, Part | None]) -> None:
    """All copies share one piece of memory; none of it but their own ends up in a file."""
    parts |= {SCALE: Part({"large": torch.zeros(2**18)})}
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)
    assert (tmp_path / "checkpoint-1" / OPTIMIZER).stat().st_size < 10_000
    assert (tmp_path / "checkpoint-1" / SCALE).stat().st_size > 2**20


def test_what_was_saved_is_loaded_again(tmp_path: Path, parts: dict[str, Part | None]) -> None:
    """Every part gets back what it gave; a scale that an older version did not write stays, all else is missed."""
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, parts)
    fresh: dict[str, Part | None] = {MODEL: Part(0), OPTIMIZER: Part(0), SCALE: Part(5)}
    load(tmp_path / "checkpoint-1", fresh)
    model, optimizer, scale = fresh.values()
    assert model and optimizer and scale  # noqa: PT018
    saved: Any = parts
    assert torch.equal(model.state["weight"], saved[MODEL].state["weight"])
    assert torch.equal(optimizer.state["state"][0]["exp_avg"], saved[OPTIMIZER].state["state"][0]["exp_avg"])
    assert optimizer.state["param_groups"] == [{"lr": 0.1}]
    assert scale.state == 5
    with pytest.raises(SettingsError, match=rf"{AVERAGE} is missing: .* without --use_ema: leave that out"):
        load(tmp_path / "checkpoint-1", {AVERAGE: Part(0)})


def test_copies_use_the_same_memory_again() -> None:
    """It is taken once for all checkpoints, of whatever kinds of numbers and shapes they are."""
    copies = HostCopies()
    state: dict[str, Any] = {
        "a": torch.randn(3, 5).T,
        "b": [torch.tensor(2), (torch.randn(7).half(), torch.zeros(0), None)],
        "c": torch.ones(2, dtype=torch.bool),
        "d": "text",
    }
    first = copies.take(state)
    addresses = [tensor.data_ptr() for tensor in tensors_of(first)]
    state["c"][0] = False
    second = copies.take(state)
    assert [tensor.data_ptr() for tensor in tensors_of(second)] == addresses
    assert torch.equal(second["a"], state["a"])
    assert second["a"].is_contiguous()
    assert second["c"].tolist() == [False, True]
    assert second["b"][0].item() == 2
    assert torch.equal(second["b"][1][0], state["b"][1][0])
    assert second["d"] == "text"
    assert not {tensor.data_ptr() for tensor in tensors_of(state)} & set(addresses)


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [state["a"], state["b"][0], state["b"][1][0], state["c"]]


def test_a_writer_of_one_process_is_no_business_of_the_others(tmp_path: Path) -> None:
    """A checkpoint that is looked for while another is being written is the last complete one."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-5.incomplete").mkdir()
    assert find(tmp_path, "latest") == tmp_path / "checkpoint-4"


def test_the_writer_of_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and both folders are flushed before and after the name changes, in this order."""
    log: list[str] = []
    sync: Callable[[Path], None] = checkpoint.sync
    rename = Path.rename

    def flush(path: Path) -> None:
        log.append(path.name)
        sync(path)

    def name(self: Path, target: Path) -> Path:
        log.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(checkpoint, "sync", flush)
    monkeypatch.setattr(Path, "rename", name)
    with Checkpoints(tmp_path, 3) as writer:
        writer.save(1, {MODEL: Part({"weight": torch.ones(1)})})
    assert log == [MODEL, "checkpoint-1.incomplete", "-> checkpoint-1", tmp_path.name]
