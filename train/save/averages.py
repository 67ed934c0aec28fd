"""Averages of any length after the fact: snapshots of two of them, of which a third one is made (arXiv 2312.02696).

Section 3.2 and algorithm 3 there: the profile of an average says how much it counts the weights of each time. One that
was not tracked is the sum of those that were that comes nearest to it.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...encode.base.console import say
from ...encode.base.errors import SettingsError, TrainError, explained
from ...encode.base.files import whole
from ..unet.fit import fit
from ..unet.update import Update
from ..unet.weights import exponent

FOLDER, AVERAGES = "averages", "averages.bin"  # of snapshots; and of a checkpoint's part
SNAPSHOTS = 8  # in a run, with what is there at its end


class Profile(NamedTuple):
    """That of an average: it counts the weights at time s as s ** exponent(length), up to `time`."""

    time: float  # in updates
    length: float  # its standard deviation as a share of the time


class Averages:
    """The averages that an update tracks, and their snapshots in float16, in a folder beside the checkpoints.

    Checkpoints keep which snapshots are of their branch, by names that tell of the content: whoever goes on from one
    deletes all others.

    Args:
        update: of the run; without averages nothing here does anything.
        output_dir: of the run.
        writes: whether this is the process that writes.
    """

    def __init__(self, update: Update, output_dir: Path, *, writes: bool = True):
        self.tracked, self.names = update.powers, update.weights.names
        self.folder, self.writes = output_dir / FOLDER, writes
        self.snapshots: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.tracked)

    def state_dict(self) -> dict[str, Any]:
        """The averages in full precision, and the names of the snapshots."""
        return {"tracked": [average.state_dict() for average in self.tracked], "snapshots": self.snapshots.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises Misfit."""
        fit(state, {"tracked": [{} for _ in self.tracked], "snapshots": None})
        for average, kept in zip(self.tracked, state["tracked"], strict=True):
            average.load_state_dict(kept)
        self.snapshots = list(state["snapshots"])

    def begin(self, origin: Path | None, *, trains: bool) -> None:
        """Have the snapshots of the run that goes on from a checkpoint, and of a run that trains no others.

        Raises TrainError where the folder cannot be written.
        """
        there = origin.parent / FOLDER if origin else self.folder
        if not trains:
            self.folder = there
        elif self.tracked and self.writes:
            with explained(TrainError, f"{self.folder} cannot be written", OSError):
                for name in self.snapshots:
                    if not (self.folder / name).exists() and (there / name).exists():
                        with whole(self.folder / name) as unfinished:
                            shutil.copyfile(there / name, unfinished)
                left = sorted(file.name for file in self.folder.glob("*") if file.name not in self.snapshots)
                for name in left:
                    (self.folder / name).unlink()
                if left:
                    say(f"snapshots of averages that are not of this run are deleted: {', '.join(left)}")

    def snapshot(self, step: int, total: int) -> None:
        """Take one if it is its turn: of both averages; raises TrainError where it cannot be written."""
        if not self.tracked or step % math.ceil(total / SNAPSHOTS) or step == total or not self.tracked[0].updates:
            return
        means = {f"{average.length}/{name}": mean for average in self.tracked for name, mean in self.named(average)}
        first = torch.stack([mean[(0,) * mean.ndim] for mean in means.values()]).cpu().numpy()
        updates = self.tracked[0].updates
        name = f"{updates}-{hashlib.blake2b(first.tobytes(), digest_size=4).hexdigest()}.safetensors"
        if self.writes:
            file, hint = self.folder / name, ": make space and continue with --resume_from_checkpoint latest"
            half = {key: mean.to("cpu", torch.float16).contiguous() for key, mean in means.items()}
            failed = explained(TrainError, f"{file} cannot be written", OSError, SafetensorError, hint=hint)
            with failed, whole(file) as unfinished:
                save_file(half, unfinished, {"format": "pt", "updates": str(updates)})
        self.snapshots.append(name)

    def named(self, average: Any) -> zip:
        """The tensors of an average, each with the name of its weight."""
        return zip(self.names, average.tensors, strict=True)

    @torch.no_grad()
    def of_length(self, length: float) -> list[Tensor]:
        """The average of a length, of all snapshots and of what is tracked now: float32, on the CPU, in order of names.

        Raises SettingsError where nothing was averaged, TrainError where a snapshot cannot be read.
        """
        now = self.tracked[0].updates
        if not now:
            raise SettingsError(f"--ema_length {length}: there was no update of the averages yet (--ema_steps)")
        with ExitStack() as opened, explained(TrainError, f"snapshots in {self.folder} cannot be read"):
            files = [self.folder / name for name in self.snapshots if (self.folder / name).exists()]
            kept = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
            times = [int(file.metadata()["updates"]) for file in kept]
            sources = [(time, file) for time, file in zip(times, kept, strict=True) if time < now]
            lengths = [average.length for average in self.tracked]
            profiles = [Profile(time, each) for time in [*(time for time, _ in sources), now] for each in lengths]
            shares, error = solve(profiles, Profile(now, length))
            count = f"{len(sources)} snapshots and the end of the run"
            say(f"the average of length {length} is made of {count}: its profile is met to {error:.1%}")
            found = []
            for number, name in enumerate(self.names):
                parts = [file.get_tensor(f"{each}/{name}") for _, file in sources for each in lengths]
                parts += [average.tensors[number].cpu() for average in self.tracked]
                total = torch.zeros_like(parts[0], dtype=torch.float64)
                for share, part in zip(shares, parts, strict=True):
                    total.add_(part, alpha=share)
                found.append(total.float())
            return found


def solve(profiles: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The share of each profile in the sum that comes nearest to the wanted one, and how far that stays away.

    The shares add up to 1; the distance is that of the profiles in L2, relative to the wanted one.
    """
    products = np.array([[product(one, other) for other in profiles] for one in profiles])
    target, own = np.array([product(one, wanted) for one in profiles]), product(wanted, wanted)
    shares = np.linalg.lstsq(products, target, rcond=None)[0]
    shares /= shares.sum()
    apart = shares @ products @ shares - 2 * shares @ target + own
    return shares.tolist(), math.sqrt(max(apart, 0) / own)


def product(one: Profile, other: Profile) -> float:
    """The inner product of two profiles of integral 1 (equation 151 there)."""
    early, late = sorted((one, other))
    power, last = exponent(early.length), exponent(late.length)
    return (power + 1) * (last + 1) * (early.time / late.time) ** last / ((power + last + 1) * late.time)
