"""Copies of a run's state in the memory of the host, which outlive the step that they are of."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

ALIGNMENT = 64  # bytes
SPARE = 2**30  # bytes that stay free for everybody else
CONTAINER = Path("/sys/fs/cgroup")  # where Linux tells a container its limits


class HostCopies:
    """Memory that is taken once and used for one state after the other; pinned where a GPU copies into it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used, self._pinned = 0, False

    def take(self, state: Any) -> Any:
        """A copy of a tree of dictionaries, lists, tuples and tensors, done when this returns.

        Each tensor of the copy is contiguous, on the CPU, and its memory is overwritten by the next copy.

        Returns:
            None if there is too little memory for it.
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
        """Ask for memory, into which a GPU writes at full speed if the system lets it be pinned.

        PyTorch's own pinned memory is rounded up to a power of two, which for gigabytes is too much.
        """
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
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
