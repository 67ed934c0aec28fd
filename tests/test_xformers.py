"""Tests of xformers: what train/__main__.py loads for it, and what train/unet/load.py says where it cannot run."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from diffusers.models import attention_processor

import tiny
from configs import train_config
from ip2p.encode.base.errors import user_errors
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.train.__main__ import LIBRARY, preload
from ip2p.train.unet.load import load_unet

FLAG = "--enable_xformers_memory_efficient_attention"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("No operator found with inputs:\n     query: ..."), "No operator found with inputs"),
        (
            RuntimeError("CUDA error: no kernel image is available\nCUDA ..."),
            "CUDA error: no kernel image is available",
        ),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_an_xformers_that_cannot_run_is_answered_in_a_line(
    error: Exception, reason: str, sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the wheel of PyPI beside a PyTorch for another CUDA: its first product, a trial of diffusers', fails."""

    def fail(*_: object) -> NoReturn:
        raise error

    config = train_config(sd, enable_xformers_memory_efficient_attention=True)
    ops = SimpleNamespace(memory_efficient_attention=fail)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.zeros(1, 2, 40))  # on a GPU, if there were one
    with pytest.raises(SystemExit) as stopped, user_errors("ip2p-train"):
        load_unet(config, Checkpoint(sd))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"ip2p-train: {FLAG}: {reason}; pip install xformers nvidia-cuda-runtime-cu12, or leave the flag out: "
        "PyTorch's own attention is fused, too\n"
    )


@pytest.mark.parametrize("known", [True, False])
def test_the_runtime_of_cuda_12_is_taken_from_its_wheel_where_it_is_not_known(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch or the system has loaded stays; otherwise the file of nvidia-cuda-runtime-cu12 is."""
    library = tmp_path / "site-packages" / "nvidia" / "cuda_runtime" / "lib" / LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), str(tmp_path / "site-packages"), *sys.path])
    loaded: list[str] = []

    def load(name: str) -> None:
        if name == LIBRARY and not known:
            raise OSError(f"{LIBRARY}: cannot open shared object file")
        loaded.append(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    preload()
    assert loaded == [LIBRARY if known else str(library)]


def test_no_runtime_anywhere_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, or without the extra, it is xformers that says what is missing."""
    monkeypatch.setattr(sys, "path", [])
    preload()


def test_the_command_loads_it_before_diffusers_is_imported(tmp_path: Path) -> None:
    """diffusers imports xformers, and what that has not found then it does not look for again."""
    code = (
        "import sys\n"
        "from ip2p.train import __main__ as command\n"
        "command.preload = lambda: sys.exit(f'diffusers is there: {\"diffusers\" in sys.modules}')\n"
        "command.main(sys.argv[1:])"
    )
    (tmp_path / "manifest.json").touch()
    flags = tiny.arguments({"pretrained_model_name_or_path": "m", "cache": tmp_path, "output_dir": tmp_path / "out"})
    done = subprocess.run([sys.executable, "-c", code, *flags, FLAG], capture_output=True, text=True, check=False)
    assert done.stderr == "diffusers is there: False\n"
