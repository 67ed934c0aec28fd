"""Checkpoints of a run: copied to the memory of the host, and written from there beside the training."""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ...encode.base.errors import TrainError, reason
from ...encode.base.files import sync
from .best import take_along

INCOMPLETE, ABANDONED = ".incomplete", "abandoned-checkpoint-"
# One part of a run's state each. The names are accelerate's, so that older checkpoints are read by the same lines.
MODEL, OPTIMIZER, SCALE = "model.safetensors", "optimizer.bin", "scaler.pt"
PROGRESS, AVERAGE = "custom_checkpoint_0.pkl", "custom_checkpoint_2.pkl"
# What a checkpoint keeps, by the name of the file: all that has `state_dict` and `load_state_dict`; None is left out.
Parts = Mapping[str, Any]
ALIGNMENT = 64  # bytes, of a copy in memory
SPARE = 2**30  # bytes of memory that stay free for everybody else
CONTAINER = Path("/sys/fs/cgroup")  # where Linux tells a container its limits


class Checkpoints:
    """Writes checkpoints while the training goes on: copied to the host's memory at once, written by a thread.

    A checkpoint has its name only once all of it is on the disk. Where there is no room for the copies, training
    waits until it is written; `waited` counts these seconds, and those of the copying.

    Args:
        output_dir: of the run, to which nobody else writes.
        limit: how many are kept, the newest; 0 keeps all.
        writes: whether this is the process that writes; of the others nothing is ever asked.
    """

    def __init__(self, output_dir: Path, limit: int, *, writes: bool = True):
        self.output_dir, self.limit, self.writes, self.waited = output_dir, limit, writes, 0.0
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        if self.writes:
            for torn in self.output_dir.glob(f"checkpoint-*{INCOMPLETE}"):  # of a process that was killed
                shutil.rmtree(torn)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):  # which stops at once: what is being written stays incomplete
            with contextlib.suppress(TrainError) if error else contextlib.nullcontext():
                self.wait()

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, parts: Parts) -> None:
        """Begin to write a checkpoint, once the one before is written; raises as `check` does."""
        if not self.writes:
            return
        began = time.perf_counter()
        self.wait()
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        copied = self._copies.take(state)
        self._thread = threading.Thread(target=self._write, args=(step, copied or state), daemon=True)
        self._thread.start()
        if copied is None:
            self.wait()
        self.waited += time.perf_counter() - began

    def wait(self) -> None:
        """Wait until nothing is being written; raises as `check` does."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread: TrainError where a checkpoint could not be written; others stay."""
        if failure := self._failure:
            self._failure = None
            raise failure

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        final = self.output_dir / f"checkpoint-{step}"
        temporary = final.with_name(final.name + INCOMPLETE)
        try:
            write(temporary, state)
            take_along(self.output_dir, temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(self.output_dir)
            # Whatever has a later step is not this run's to delete.
            older = [old for number, old in checkpoints(self.output_dir) if number <= step]
            for old in older[: -self.limit if self.limit else 0]:
                shutil.rmtree(old, ignore_errors=True)  # what is good is safe by now, and that is what counts
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk becomes in the libraries
            shutil.rmtree(temporary, ignore_errors=True)
            there = checkpoints(self.output_dir)
            last = f"{there[-1][1].name} is the last" if there else "there is none yet"
            self._failure = TrainError(
                f"{final.name} cannot be written ({reason(error)}): make space in {self.output_dir} and "
                f"continue with --resume_from_checkpoint latest; {last}"
            )
        except Exception as error:  # a bug, which is raised where the training sees it
            self._failure = error


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint, all on the disk when this returns."""
    folder.mkdir()
    for name, content in state.items():
        if name == MODEL:
            weights = {key: weight.cpu().contiguous() for key, weight in content.items()}
            save_file(weights, folder / name, metadata={"format": "pt"})
        else:
            torch.save(content, folder / name)
    for path in [*folder.iterdir(), folder]:
        sync(path)


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of the branch that is trained, oldest first, as (step, folder)."""
    folders = (path for path in output_dir.glob("checkpoint-*") if path.is_dir())
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folders)
    return sorted((int(match[1]), output_dir / match[0]) for match in found if match)


def abandon(folder: Path) -> Path:
    """Rename a checkpoint to `abandoned-checkpoint-N`; if that is there, with a number. Gives its folder."""
    path, number = folder.with_name(f"abandoned-{folder.name}"), 1
    while path.exists():
        number += 1
        path = folder.with_name(f"abandoned-{folder.name}-{number}")
    folder.rename(path)
    sync(path.parent)
    return path


def take_up(folder: Path, step: int) -> None:
    """Give a checkpoint that was abandoned its name back, where nothing else has that by now."""
    folder.rename(folder.with_name(f"checkpoint-{step}"))
    sync(folder.parent)


class HostCopies:
    """Memory of the host, taken once and used for one state after the other; pinned where a GPU copies into it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used, self._pinned = 0, False

    def take(self, state: Any) -> Any:
        """A copy of a tree of dictionaries, lists, tuples and tensors, done when this returns; None without memory.

        Each tensor of the copy is contiguous, on the CPU, and its memory is overwritten by the next copy.
        """
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        needed = sum(map(room, tensors))
        if needed > len(self._memory):
            if needed + SPARE > available() + len(self._memory):
                return None
            try:
                self._take_memory(needed, pinned=any(tensor.is_cuda for tensor in tensors))
            except MemoryError:  # of a limit that nobody tells
                return None
        self._used = 0
        copy = tree_map_only(Tensor, self._copy, state)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copy

    def _take_memory(self, size: int, *, pinned: bool) -> None:
        """Ask for memory, pinned if the system lets it be; PyTorch's own pinned one is rounded up to a power of two."""
        cuda: Any = torch.cuda.cudart() if pinned else None
        if self._pinned:
            cuda.cudaHostUnregister(self._memory.ctypes.data)
        self._memory, self._pinned = np.empty(0, np.uint8), False  # the old one goes before the new one comes
        self._memory = np.empty(size, np.uint8)
        self._pinned = bool(cuda) and int(cuda.cudaHostRegister(self._memory.ctypes.data, size, 0)) == 0
        if pinned and not self._pinned:
            with contextlib.suppress(RuntimeError):  # CUDA tells the next call of an error that nobody asked for
                torch.zeros(1, device="cuda")

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        # A tensor over a part of the memory owns no more than that part, so no file gets more than its own tensors.
        part = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += room(tensor)
        return part.reshape(tensor.shape).copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def available() -> int:
    """Bytes that this process can still have: of the machine, and of the container that it may be in."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such container, or one without a limit
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kinds["file"]))  # pages of files make room
    return free


def room(tensor: Tensor) -> int:
    """Bytes that a tensor gets."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
