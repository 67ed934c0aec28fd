"""Tests of training on two processes: as one process would, with other draws on each, and resumed on one and two."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import tiny
from test_train import flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # seven launches of one or two processes

SPY = """
import os, sys
import torch
from ip2p.train.objective import Draws, Objective
from ip2p.train.unet.update import Update

folder, same, arguments = sys.argv[1], sys.argv[2] == "same", sys.argv[3:]
rank, seen = int(os.environ.get("RANK", 0)), []
original_draw, original_update = Objective.draw, Update.__call__

def draw(self, batch, *position):
    drawn = original_draw(self, batch, *position)
    if same:  # noise that does not depend on how the batch is divided
        noise = torch.linspace(-1, 1, drawn.noise[0].numel()).reshape(drawn.noise[:1].shape).expand_as(drawn.noise)
        count = len(noise)
        drawn = Draws(noise, noise.flip(1), torch.full((count,), 300), torch.full((count,), 0.9))
    seen.append({"original": batch.original.clone(), "noise": drawn.noise.clone()})
    return drawn

def update(self, **rest):
    gradients = {n: p.grad.clone() for n, p in zip(self.weights.names, self.weights.parameters)}
    torch.save({"batches": list(seen), "gradients": gradients}, f"{folder}/rank{rank}-{len(seen):03d}.pt")
    return original_update(self, **rest)

Objective.draw, Update.__call__ = draw, update
from ip2p.train.__main__ import main
main(arguments)
"""


def launch(processes: int, folder: Path, same: bool, arguments: list[str]) -> list[list[dict]]:
    """Train on some processes; returns for each of them what the spy saw at each optimizer step."""
    folder.mkdir()
    (folder / "spy.py").write_text(SPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(folder / "spy.py"), str(folder), "same" if same else "own", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [sorted(folder.glob(f"rank{rank}-*.pt")) for rank in range(processes)]
    return [[torch.load(path) for path in paths] for paths in ranks]


@pytest.fixture(scope="module")
def twelve(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., None]) -> Path:
    """A cache of twelve pairs in one view."""
    folder = tmp_path_factory.mktemp("twelve")
    encode(sd, tiny.dataset(folder / "data", tiny.pairs(12)), folder / "cache")
    return folder / "cache"


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}], ids=["all", "lora"])
def test_two_processes_have_the_gradients_of_one_with_the_doubled_batch(
    sd: Path, twelve: Path, tmp_path: Path, adapters: dict[str, object]
) -> None:
    """Over the same samples and noise, the averaged gradients agree to 1e-6; both ranks see the same average."""
    changed = {"max_train_steps": 1, "use_ema": False} | adapters
    (one,) = launch(1, tmp_path / "one", True, flags(sd, twelve, tmp_path / "1", train_batch_size=4, **changed))
    two = launch(2, tmp_path / "two", True, flags(sd, twelve, tmp_path / "2", train_batch_size=2, **changed))
    assert len(one) == len(two[0]) == len(two[1]) == 1
    for name, gradient in one[0]["gradients"].items():
        for rank in two:
            torch.testing.assert_close(rank[0]["gradients"][name], gradient, rtol=1e-5, atol=1e-6)
    halves = torch.cat([rank[0]["batches"][0]["original"] for rank in two])
    assert torch.equal(halves, one[0]["batches"][0]["original"])


def test_two_processes_and_then_one_see_each_sample_of_the_epoch_once(sd: Path, twelve: Path, tmp_path: Path) -> None:
    """Ranks draw different noise; resuming on another number of processes loses and repeats nothing; logs come once."""
    changed = {"use_ema": False, "train_batch_size": 2, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    arguments = flags(sd, twelve, tmp_path / "out", **changed)
    resume = ["--resume_from_checkpoint", "latest"]
    two = launch(2, tmp_path / "two", False, [*arguments, "--max_train_steps", "1"])
    one = launch(1, tmp_path / "one", False, [*arguments, "--max_train_steps", "3", *resume])
    again = launch(2, tmp_path / "again", False, [*arguments, "--max_train_steps", "4", *resume])
    noise = [rank[0]["batches"][0]["noise"] for rank in two]
    assert not torch.equal(*noise)
    seen = [batch["original"] for run in (two, one, again) for rank in run for batch in rank[-1]["batches"]]
    rows = torch.cat(seen).flatten(1).numpy()
    assert len(rows) == 12
    assert len(np.unique(rows, axis=0)) == 12
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_two_processes_score_what_one_does(sd: Path, twelve: Path, tmp_path: Path) -> None:
    """Each edits its share of the pairs, and the main process keeps the best pipeline; here nothing is learnt."""
    scored = {"num_validation_samples": 4, "num_validation_images": 1, "score_samples": 3, "keep_best": "psnr"}
    changed = {"max_train_steps": 1, "learning_rate": 1e-12, "validation_steps": 1} | scored
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        launch(processes, tmp_path / f"run{processes}", False, flags(sd, twelve, output, **changed))
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found.append(next(line for line in lines if "validation_psnr" in line))
        best = json.loads((output / "best" / "best.json").read_text())
        assert best == {"step": 1, "score": "ema_validation_psnr", "value": found[-1]["ema_validation_psnr"]}
    one, two = ({name: value for name, value in line.items() if "seconds" not in name} for line in found)
    assert two == pytest.approx(one, rel=1e-4)


def test_one_process_then_two_then_one_go_through_each_shape(
    sd: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """All see the same shape at a time, and of each come permutations, whoever takes which part of them."""
    data = tiny.dataset(tmp_path / "data", tiny.pairs(24, sizes=tiny.SIDES))
    encode(sd, data, tmp_path / "cache", bucket_step=4)
    changed = {"use_ema": False, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    arguments = flags(sd, tmp_path / "cache", tmp_path / "out", **changed, resume_from_checkpoint="auto")
    streams: dict[tuple[int, ...], list[bytes]] = {}
    for number, (processes, size, last) in enumerate([(1, 4, 2), (2, 2, 8), (1, 3, 16)]):
        more = ["--max_train_steps", str(last), "--train_batch_size", str(size)]
        ranks = launch(processes, tmp_path / f"run{number}", False, [*arguments, *more])
        for parts in zip(*(rank[-1]["batches"] for rank in ranks), strict=True):
            (shape,) = {tuple(part["original"].shape[2:]) for part in parts}
            rows = torch.cat([part["original"] for part in parts])
            streams.setdefault(shape, []).extend(row.numpy().tobytes() for row in rows)
    state = torch.load(tmp_path / "out" / "checkpoint-16" / "custom_checkpoint_0.pkl")
    assert state["seen"] == [len(stream) for _, stream in sorted(streams.items())]
    assert len(streams) == 3
    for stream in streams.values():
        count = len(set(stream))
        assert len(stream) > count
        for start in range(0, len(stream), count):
            one = stream[start : start + count]
            assert len(set(one)) == len(one)


SLOW_DISK = """
import sys, time
from ip2p.train.save import checkpoint

def write(folder, state, original=checkpoint.write):
    original(folder, state)
    time.sleep(4)

checkpoint.write = write
from ip2p.train.__main__ import main
main(sys.argv[1:])
"""


def stopped(folder: Path, arguments: list[str], ready: Callable[[], bool], rank: int | None) -> str:
    """What two processes print that get a SIGTERM, by their launcher or one of them alone, once they are `ready`."""
    (folder / "slow.py").write_text(SLOW_DISK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}
    with (
        (folder / "said").open("w+b") as said,
        subprocess.Popen(
            [*command, str(folder / "slow.py"), *arguments], stdout=said, stderr=said, env=environment
        ) as run,
    ):
        while not ready():
            assert run.poll() is None, (folder / "said").read_text()
            time.sleep(0.05)
        if rank is None:
            run.send_signal(signal.SIGTERM)
        else:
            workers = [child for child in psutil.Process(run.pid).children() if "slow.py" in " ".join(child.cmdline())]
            ranks = {int(child.environ()["RANK"]): child for child in workers}
            ranks[rank].send_signal(signal.SIGTERM)
        assert run.wait(100) != 0
    return (folder / "said").read_text()


def test_a_signal_to_one_process_stops_all_at_the_same_step(sd: Path, twelve: Path, tmp_path: Path) -> None:
    """The main process writes a checkpoint, longer than the others need to end, and nobody ends it."""
    out = tmp_path / "out"
    arguments = flags(sd, twelve, out, max_train_steps=10**6, logging_steps=1)
    said = stopped(tmp_path, arguments, lambda: (out / "metrics.jsonl").is_file(), rank=1)
    assert "leave 100 s for a last checkpoint" in said
    (kept,) = out.glob("checkpoint-*")
    assert f"stopped at step {kept.name.removeprefix('checkpoint-')}: continue" in said
    assert said.count("stopped at step") == 1
    assert {path.name for path in kept.iterdir()} >= {"model.safetensors", "optimizer.bin"}


def test_a_signal_takes_no_more_time_than_one_checkpoint(sd: Path, twelve: Path, tmp_path: Path) -> None:
    """While one is being written, that one is what remains: a launcher does not wait for two."""
    out = tmp_path / "out"
    arguments = flags(sd, twelve, out, max_train_steps=10**6, checkpointing_steps=3)
    said = stopped(tmp_path, arguments, lambda: any(out.glob("checkpoint-*.incomplete")), rank=None)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "stopped at step" in said
