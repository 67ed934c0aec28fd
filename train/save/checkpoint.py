"""Checkpoints of a run, written beside the training."""

import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...encode.base.errors import TrainError, reason
from ...encode.base.files import sync
from .host import HostCopies

INCOMPLETE = ".incomplete"
# One part of a run's state each. The names are accelerate's, so that older checkpoints are read by the same lines.
MODEL, OPTIMIZER, SCALE = "model.safetensors", "optimizer.bin", "scaler.pt"
PROGRESS, SCHEDULE, AVERAGE = (f"custom_checkpoint_{number}.pkl" for number in range(3))
# What a checkpoint keeps, by the name of the file: all that has `state_dict` and `load_state_dict`; None is left out.
Parts = Mapping[str, Any]


class Checkpoints:
    """Writes checkpoints while the training goes on: copied to the host's memory at once, written by a thread.

    A checkpoint has its name only once all of it is on the disk. Where there is no room for the copies, training
    waits until it is written.

    Args:
        output_dir: of the run, to which nobody else writes.
        limit: how many are kept, the newest; 0 keeps all.
        writes: whether this is the process that writes; of the others nothing is ever asked.

    Attributes:
        waited: seconds that training stood still for checkpoints.
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
        if isinstance(error, KeyboardInterrupt):
            return  # stop at once; what is being written stays incomplete
        try:
            self.wait()
        except TrainError:
            if error is None:
                raise

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
        """Say what went wrong in the thread, if anything did.

        Raises:
            TrainError: a checkpoint could not be written; those that are there stay.
        """
        if failure := self._failure:
            self._failure = None
            raise failure

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        final = self.output_dir / f"checkpoint-{step}"
        temporary = final.with_name(final.name + INCOMPLETE)
        try:
            write(temporary, state)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(self.output_dir)
            # Those of later steps are of a run that was gone back on: not this one's to delete.
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
    """Complete checkpoints, oldest first, as (step, folder)."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), output_dir / match[0]) for match in found if match)
