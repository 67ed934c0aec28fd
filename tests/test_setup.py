"""Tests of train/machine.py and agree.py: what flags and machine say before anything is loaded."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

import tiny
from configs import train_config
from ip2p.encode.base.errors import ModelError, SettingsError, TrainError
from ip2p.encode.base.flags import changed
from ip2p.encode.cache.format import Cache
from ip2p.train import agree, machine
from ip2p.train.__main__ import main
from ip2p.train.agree import agreed
from ip2p.train.config import TrainConfig, Watching
from ip2p.train.machine import advise, alone, make_accelerator
from ip2p.train.save.resume import find
from ip2p.train.setup import with_model
from ip2p.train.unet.weights import Precision, choose_precision
from ip2p.train.watch.metrics import Metrics
from test_train import flags


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration with some flags."""

    def make(**changed: Any) -> TrainConfig:
        return train_config(cache=tmp_path / "cache", output_dir=tmp_path / "out", report_to="none", **changed)

    return make


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Put back what is set for a whole process."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    kept = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = kept
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("changed", "cuda", "expected"),
    [
        ({"mixed_precision": "bf16"}, True, Precision("bf16", copies=True)),
        ({"mixed_precision": "fp16"}, True, Precision("fp16", copies=True)),
        ({"mixed_precision": "bf16"}, False, Precision("bf16", copies=False)),
        ({"mixed_precision": "no"}, True, Precision("no", copies=False)),
        ({}, True, Precision("no", copies=False)),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, True, Precision("bf16", copies=False)),
        ({"mixed_precision": "bf16", "use_8bit_adam": True}, True, Precision("bf16", copies=False)),
    ],
)
def test_copies_take_the_place_of_autocast_where_they_lose_nothing(
    config: Callable[..., TrainConfig], changed: dict[str, Any], cuda: bool, expected: Precision
) -> None:
    """On a GPU in mixed precision; but not where gradients are summed, or go to an optimizer of float32 alone."""
    assert choose_precision(config(**changed), cuda=cuda) == expected
    assert expected.half == (expected.dtype if expected.copies else None)


def test_the_launchers_precision_counts_where_no_flag_is_given(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in accelerate; one that is not known here is answered."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision(config(), cuda=False).name == "bf16"
    assert choose_precision(config(mixed_precision="no"), cuda=False).name == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SettingsError, match="fp8: expected no, fp16 or bf16"):
        choose_precision(config(), cuda=True)


def test_a_gpu_without_bfloat16_is_told_of(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would emulate it, slowly and without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    with pytest.raises(SettingsError, match="this GPU computes in no such format, take fp16"):
        make_accelerator(config(mixed_precision="bf16"))


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_on_a_gpu_takes_tf32_unless_it_is_told_not_to(config: Callable[..., TrainConfig], tf32: bool) -> None:
    """Products and convolutions alike; and kernels are tried out, since all batches have one shape."""
    make_accelerator(config(allow_tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark


def test_deterministic_asks_all_libraries_for_it(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch, cuBLAS by the variable that it reads, and cuDNN, which must not pick another kernel each time."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_accelerator(config(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_shard_the_weights_are_refused_in_a_line(
    sd: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    """At the start, and not by a traceback after everything was loaded, or for want of the engine."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")  # as `accelerate launch` tells it
    with pytest.raises(SystemExit) as stopped:
        main(flags(sd, cache, tmp_path / "out"))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"set up for {engine}" in line
    assert "use one process per GPU" in line
    assert not (tmp_path / "out").exists()


def test_float16_is_refused_where_there_is_no_gpu(config: Callable[..., TrainConfig]) -> None:
    """accelerate would train in float32 without a word."""
    with pytest.raises(SettingsError, match="fp16 trains on a GPU, and PyTorch finds none: take bf16 or no"):
        make_accelerator(config(mixed_precision="fp16"))


def test_processes_wait_a_day_for_one_that_works_alone(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL gives up after ten minutes by default; and gradients lie in the buckets that are sent."""
    given: dict[str, Any] = {}

    class Spy(Accelerator):
        def __init__(self, **options: Any):
            given.update(options)
            super().__init__(**options)

    monkeypatch.setattr(machine, "Accelerator", Spy)
    make_accelerator(config())
    group, buckets = given["kwargs_handlers"][-2:]
    assert group.timeout >= timedelta(days=1)
    assert buckets.gradient_as_bucket_view


def test_autocast_keeps_no_copies_of_the_weights(config: Callable[..., TrainConfig]) -> None:
    """Each weight is used once a step: a copy kept until the end of it takes half as much memory, for nothing."""
    accelerator, _ = make_accelerator(config(mixed_precision="bf16"))
    seen: list[tuple[bool, bool]] = []

    class Probe(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            return super().forward(input)

    accelerator.prepare(Probe(2, 2))(torch.zeros(1, 2))
    assert seen == [(True, False)]


def test_users_are_told_what_the_machine_would_do_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision on a GPU, and how long a signal leaves where several processes are started."""
    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert "--mixed_precision bf16" in "".join(advise(gpu, Precision("no", copies=False)))
    assert not list(advise(gpu, Precision("bf16", copies=True)))
    assert not list(advise(cpu, Precision("no", copies=False)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (line,) = advise(cpu, Precision("no", copies=False))
    assert "leave 30 s for a last checkpoint" in line
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in line
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    assert "leave 120 s" in "".join(advise(cpu, Precision("no", copies=False)))


@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_a_tracker_that_is_not_installed_stops_the_run(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, report_to: str
) -> None:
    """accelerate would warn and train untracked."""
    monkeypatch.setattr(machine, "get_available_trackers", list)
    with pytest.raises(SettingsError, match=f"--report_to {report_to}: no such tracker is installed"):
        make_accelerator(dataclasses.replace(config(), watching=Watching(report_to=report_to)))


@pytest.mark.parametrize(
    ("taken", "what", "answer"),
    [
        ("out", "file", "--output_dir {out} cannot be written: {out} is no folder"),
        ("", "file", "--output_dir {out} cannot be written: {run} is no folder"),
        ("out/logs", "file", "--logging_dir {out}/logs cannot be written: {out}/logs is no folder"),
        ("out/checkpoint-7", "file", "{out}/checkpoint-7 is a file where a folder goes: move it away, or name another"),
        ("out/unet", "file", "{out}/unet is a file where a folder goes: move it away, or name another --output_dir"),
        ("out/metrics.jsonl", "folder", "{out}/metrics.jsonl is a folder where a file goes: move it away, or name"),
        (
            "out/.lock",
            "folder",
            "{out}/.lock is a folder where a file goes: move it away, or name another --output_dir",
        ),
        ("out", "read-only", "--output_dir {out} cannot be written: Read-only file system"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    taken: str,
    what: str,
    answer: str,
) -> None:
    """A file where a folder goes, a folder where a file goes, a disk that is read-only: one line, nothing is opened."""
    place = tmp_path / "run" / taken
    place.parent.mkdir(parents=True, exist_ok=True)
    if what == "file":
        place.touch()
    else:
        place.mkdir()
    if what == "read-only":

        def refuse(**_: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("ip2p.train.run.open_caches", None)
    for folder in ("model", "cache"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cache" / "manifest.json").touch()
    with pytest.raises(SystemExit, match="2"):
        main(flags(tmp_path / "model", tmp_path / "cache", tmp_path / "run" / "out", report_to="tensorboard"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ip2p-train: {answer.format(out=tmp_path / 'run' / 'out', run=tmp_path / 'run')}")


def test_what_cannot_be_written_any_more_is_a_line(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up under the metrics or the pipeline ends the run; its checkpoints are gone on with."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def step(self: Metrics, *rest: Any, original: Callable[..., None] = Metrics.step) -> None:
        self.file = tmp_path  # which is no file
        original(self, *rest)

    for place, change, answer in (
        (Metrics, ("step", step), "cannot be written: [Errno 21] Is a directory"),
        (
            DiffusionPipeline,
            ("save_pretrained", full),
            f"no pipeline can be written to {tmp_path}/out: [Errno 28] No space",
        ),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, *change)
            with pytest.raises(SystemExit, match="2"):
                main(flags(sd, cache, tmp_path / "out", max_train_steps=2, resume_from_checkpoint="auto"))
        line = capsys.readouterr().err.splitlines()[-1]
        assert answer in line
        assert "--resume_from_checkpoint latest" in line


HOLD = """
import sys
from pathlib import Path
from ip2p.train.machine import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_never_share_an_output_folder(tmp_path: Path) -> None:
    """The second one is told which process has it; when that is gone, the folder is free again."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdin  # noqa: PT018
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(TrainError, match=rf"in use by another ip2p-train \(process {other.pid} on "):
            alone(tmp_path).__enter__()
        other.kill()
    with alone(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_a_disk_without_locks_is_told_of_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some cluster file systems have none; other errors are errors, those of the run inside too."""
    code = errno.ENOLCK

    def lockf(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match="of the run"), alone(tmp_path):
        raise OSError(errno.ENOLCK, "of the run")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    with alone(tmp_path):
        assert "lies on a disk without locks" in capsys.readouterr().out
    code = errno.EIO
    with pytest.raises(TrainError, match=f"--output_dir {tmp_path} cannot be written: Input/output"):
        alone(tmp_path).__enter__()


def test_the_folder_is_locked_while_a_run_trains(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the caches are opened to the end."""
    entered: list[str] = []

    @contextlib.contextmanager
    def spy(folder: Path) -> Iterator[None]:
        entered.append(str(folder))
        yield
        assert (folder / "model_index.json").is_file()
        entered.append("left")

    monkeypatch.setattr("ip2p.train.run.alone", spy)
    main(flags(sd, cache, tmp_path, max_train_steps=1))
    assert entered == [str(tmp_path), "left"]


def test_the_main_process_alone_looks_for_the_checkpoint(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take its word, its complaint included: on a shared disk they may see another newest one."""
    sent: list[Any] = []

    def broadcast(found: list[Any]) -> None:
        if sent:
            found[:] = sent
        sent[:] = found

    monkeypatch.setattr(agree, "broadcast_object_list", broadcast)
    given = config(resume_from_checkpoint="latest")
    look = partial(find, given.saving.output_dir, "latest")
    for steps, expected in (((), SettingsError), ((3, 7), given.saving.output_dir / "checkpoint-7")):
        sent.clear()
        for step in steps:
            (given.saving.output_dir / f"checkpoint-{step}").mkdir(parents=True)
        for main_process in (True, False):
            monkeypatch.setattr(agree.PartialState, "is_main_process", property(lambda _, main=main_process: main))
            if not main_process:
                unseen = given.saving.output_dir / "checkpoint-9"  # by the main one
                unseen.mkdir(parents=True, exist_ok=True)
            if isinstance(expected, Path):
                assert agreed(look) == expected
            else:
                with pytest.raises(expected, match="holds no checkpoint"):
                    agreed(look)
        (given.saving.output_dir / "checkpoint-9").rmdir()


def test_the_model_is_that_of_the_cache_where_none_is_named(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, trained and recorded; one that is gone is a line that names the flag."""
    main(tiny.arguments({"cache": cache, "output_dir": tmp_path / "out", "max_train_steps": 1, "report_to": "none"}))
    assert f"the model is that of the cache: {sd}\n" in capsys.readouterr().out
    recorded = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert recorded["pretrained_model_name_or_path"] == str(sd)
    opened, config = Cache.open(cache), train_config(cache=cache, output_dir=tmp_path, pretrained_model_name_or_path="")
    opened.manifest["model"] |= {"name": "owner/model", "revision": "old", "variant": "fp16"}
    model = with_model(config, opened).model
    assert (model.pretrained_model_name_or_path, model.revision, model.variant) == ("owner/model", "old", "fp16")
    assert with_model(changed(config, revision="new"), opened).model.revision == "new"
    named = changed(config, pretrained_model_name_or_path="other")
    assert with_model(named, opened) == named
    opened.manifest["model"]["name"] = f"{tmp_path}/gone"
    answer = rf"^{cache} was encoded with {tmp_path}/gone, .* is not there: .* \(name the model with --"
    with pytest.raises(ModelError, match=answer):
        with_model(config, opened)
