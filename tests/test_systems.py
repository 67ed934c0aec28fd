"""Other systems than Linux, acted out: macOS encodes, trains and edits; Windows edits, and says so of the rest."""

import contextlib
import importlib
import json
import mmap
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import tiny
from configs import train_config
from ip2p.encode.base import system
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.cache import mapped
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.models.checkpoint import layout
from ip2p.infer.jobs import _stem
from ip2p.train.data.batches import Slot
from ip2p.train.machine import check_machine
from ip2p.train.unet.optimizers import Scaled
from test_architecture import MODULES, arrows, imports

# The libraries are imported first: they look at the system as they are, and are not what is tried here.
ACT = """
import builtins, diffusers, datasets, errno, fcntl, importlib, mmap, multiprocessing, os, resource, sys, torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
{act}
for command, *arguments in {runs}:
    main = importlib.import_module("ip2p." + command + ".__main__").main
    try:
        assert not main(arguments)
    except SystemExit as stopped:
        print("stopped by", stopped.code)
"""
MACOS = """
del os.sched_getaffinity
for name in ("MAP_POPULATE", "MAP_NORESERVE", "MAP_STACK", "MAP_DENYWRITE", "MAP_EXECUTABLE"):
    if hasattr(mmap, name): delattr(mmap, name)
mmap.PAGESIZE = 16384
multiprocessing.set_start_method("spawn")
used = resource.getrusage
resource.getrusage = lambda who: type("Usage", (), dict(ru_maxrss=used(who).ru_maxrss * 1024))
sys.platform = "darwin"
"""
# No module of ours gets what Windows lacks; folders cannot be opened there, nor files synced that are but read.
WINDOWS = """
given, opened, synced, modes = builtins.__import__, os.open, os.fsync, {}
def bring(name, globals=None, *rest):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("ip2p"):
        raise ModuleNotFoundError(name)
    return given(name, globals, *rest)
def open_file(path, flags, *rest, **options):
    if os.path.isdir(path): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    found = opened(path, flags, *rest, **options)
    modes[found] = flags
    return found
def sync(descriptor):
    if not modes.get(descriptor, os.O_RDWR) & os.O_RDWR: raise OSError(errno.EBADF, "Bad file descriptor")
    synced(descriptor)
builtins.__import__, os.open, os.fsync = bring, open_file, sync
del os.sched_getaffinity, os.statvfs, os.getuid
sys.platform = "win32"
"""


def act(system: str, *runs: Sequence[str]) -> str:
    """What commands, each with its arguments, print in a process that takes its system for another one."""
    program = ACT.format(act=system, runs=[*map(list, runs)])
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_cores_are_counted_where_nobody_can_be_bound_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `sched_getaffinity`; where there is one, it knows better."""
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert system.cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.cores() == 12


def test_memory_is_counted_in_each_systems_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on macOS, KiB elsewhere."""
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2**20))
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.most_memory() == 2**30
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.most_memory() == 2**20


def test_no_flag_of_linux_is_given_to_other_systems(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAP_NORESERVE has another number on macOS, where it means nothing: arrays are mapped without it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert importlib.import_module("ip2p.encode.base.system").NORESERVE == 0x4000  # that of this process
    again = runpy.run_path(str(Path(system.__file__ or "")), run_name="ip2p.encode.base.again")
    assert again["NORESERVE"] == 0
    monkeypatch.setattr(mapped, "_NOTHING", mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    there = Cache.open(cache).arrays("images")["original"][:3, 0]
    assert np.array_equal(_taken(cache)["original"], there)


def _taken(cache: Path) -> dict[str, np.ndarray]:
    reader = Reader(Cache.open(cache))
    found = {name: np.empty((3, *array.row_shape), np.float16) for name, array in reader.arrays.items()}
    reader.take(found, np.arange(3), np.zeros(3, np.int64), np.arange(3))
    return found


@pytest.mark.slow
def test_macos_encodes_trains_and_edits(sd: Path, data: Path, tmp_path: Path) -> None:
    """With processes that are spawned, pages of another size, fewer constants, no affinity, and memory in bytes."""
    tiny.picture(0).save(tmp_path / "photo.png")
    model, cache = f"--pretrained_model_name_or_path {sd}", f"--cache {tmp_path / 'cache'}"
    steps = "--max_train_steps 2 --train_batch_size 2 --logging_steps 1 --report_to none"
    said = act(
        MACOS,
        f"encode {model} {cache} --dataset_name {data} --resolution 16 --dataloader_num_workers 1".split(),
        f"train {model} {cache} --output_dir {tmp_path / 'out'} {steps}".split(),
        [
            *f"infer --model {tmp_path / 'out'} --image {tmp_path / 'photo.png'} --num_inference_steps 2".split(),
            "--prompt",
            "make it red",
            "--output",
            str(tmp_path / "edits"),
        ],
    )
    assert "holds all 10 samples" in said
    assert "1 edited" in said
    assert "stopped" not in said
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    memory = max(json.loads(line)["memory_gib"] for line in lines if "memory_gib" in line)
    assert 0.1 < memory < psutil.virtual_memory().total / 2**30


@pytest.mark.slow
def test_windows_edits(model: str, photos: Path, tmp_path: Path) -> None:
    """A folder of pictures, and again: what is there is known; and encoding is refused by the same process."""
    edit = ["infer", "--model", model, "--image", str(photos), "--prompt", "make it red", "--num_inference_steps", "2"]
    edit += ["--output", str(tmp_path / "edits")]
    encode = "encode --pretrained_model_name_or_path model --dataset_name data --resolution 16 --cache cache".split()
    said = act(WINDOWS, edit, edit, encode)
    assert "3 edited" in said
    assert "3 already there" in said
    assert "ip2p-encode: caches are locked and mapped" in said
    assert said.count("stopped by 2") == 1


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("encode", "--pretrained_model_name_or_path model --dataset_name data --resolution 16 --cache cache"),
        ("train", "--pretrained_model_name_or_path model --cache {cache} --output_dir out --max_train_steps 1"),
        ("train", "--pretrained_model_name_or_path model --dataset_name data --resolution 16 --max_train_steps 1"),
        ("encode.keeper", "verify {cache}"),
    ],
)
def test_windows_is_told_in_a_line_what_it_cannot_do(
    command: str,
    arguments: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever encodes, trains or looks after a cache; `--help` is there all the same."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ip2p" and ".base" not in name]:
        monkeypatch.delitem(sys.modules, name)  # so that all are imported anew
    monkeypatch.delitem(sys.modules, system.__name__)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.chdir(tmp_path)
    main: Callable[[list[str]], Any] = importlib.import_module(f"ip2p.{command}.__main__").main
    with pytest.raises(SystemExit) as stopped:
        main(arguments.format(cache=cache).split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "caches are locked and mapped as Linux and macOS do it" in line
    assert "ip2p-infer edits pictures here" in line
    with contextlib.suppress(SystemExit):
        main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_editing_reaches_for_no_lock_and_no_cache() -> None:
    """What `ip2p.infer` imports, over however many modules, needs no module that Windows lacks."""
    graph, found, left = arrows(MODULES), set[str](), {name for name in MODULES if name.startswith("infer.")}
    while left:
        found |= left
        left = set().union(*(graph[module] for module in left)) - found
    assert "encode.base.files" in found
    assert "encode.base.system" not in found
    names = {name.split(".")[0] for module in found for name in imports(MODULES[module].read_text(), module)}
    assert names & {"fcntl", "resource", "pwd", "grp", "termios"} == set()


def test_names_that_windows_refuses_are_changed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of an output with a colon would be a stream of another file."""
    assert _stem(Path("a:b?.png")) == "a:b?"
    monkeypatch.setattr(sys, "platform", "win32")
    assert _stem(Path("a:b?.png")) == "a_b_"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_apples_gpu_trains_in_float32(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' scripts do there: half precision is refused in a line, unless the CPU is asked for."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = train_config(output_dir=tmp_path, report_to="none", mixed_precision=precision)
    with pytest.raises(
        SettingsError, match=f"--mixed_precision {precision}: on Apple's GPU training computes in float32"
    ):
        check_machine(config)
    config = train_config(output_dir=tmp_path, report_to="none", weights="bf16")
    with pytest.raises(SettingsError, match="--weights bf16: on Apple's GPU"):
        check_machine(config)
    check_machine(train_config(output_dir=tmp_path, report_to="none"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_machine(train_config(output_dir=tmp_path, report_to="none", weights="bf16"))


def test_batches_arrive_on_whatever_device_there_is(cache: Path) -> None:
    """Not on a GPU of CUDA alone."""
    slot = Slot(Reader(Cache.open(cache)), 2, torch.device("meta"))
    slot.fill(np.arange(2), np.zeros(2, int), np.arange(2), np.zeros((2, 6), np.float32), (8, 8), ([0], [0]))
    assert {part.device.type for part in slot.hand_over() if part is not None} == {"meta"}


def test_pictures_lie_by_channels_first_on_apples_gpu() -> None:
    """There PyTorch has been wrong about channels last; elsewhere they are faster."""
    assert layout(torch.device("mps")) == torch.contiguous_format
    assert {layout(torch.device(kind)) for kind in ("cpu", "cuda")} == {torch.channels_last}


def test_adamw_heeds_what_apples_kernel_leaves_unread() -> None:
    """The same weights as by PyTorch's fused AdamW, clipped; and what shall stay stays."""
    torch.manual_seed(0)
    start, gradients = torch.randn(20, 3), torch.randn(3, 20, 3)
    found = []
    for kind in (Scaled, lambda weights, **options: torch.optim.AdamW(weights, fused=True, **options)):
        weight = torch.nn.Parameter(start.clone())
        optimizer: Any = kind([weight], lr=1e-2, weight_decay=0.1)
        for gradient, divisor, skipped in zip(gradients, (1.0, 7.0, 2.0), (0.0, 0.0, 1.0), strict=True):
            weight.grad = gradient.clone()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(divisor), torch.tensor(skipped)
            optimizer.step()
        found.append(weight.detach())
        assert optimizer.state[weight]["step"] == 2
    assert torch.allclose(*found, rtol=1e-6)
    assert not torch.equal(found[0], start)
