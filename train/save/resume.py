"""A run that goes on: from which checkpoint, and what comes back from it."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...encode.base.errors import CacheMismatch, SettingsError, reason
from ...encode.cache.format import differences
from ..config import TrainConfig
from .checkpoint import AVERAGE, INCOMPLETE, MODEL, PROGRESS, SCALE, Parts, checkpoints


@dataclasses.dataclass
class Progress:
    """How far a run has come; saved in every checkpoint."""

    cache: dict[str, Any]  # identity of the cache that the run trains on
    seed: int
    step: int = 0  # optimizer steps
    samples: int = 0  # seen by all processes: the position in the endless sequence

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, unless it was on another cache."""
        if lines := differences(state, vars(self), ["cache"], ("in the checkpoint", "in --cache")):
            raise CacheMismatch("the checkpoint was trained on another cache: give that one\n" + "\n".join(lines))
        vars(self).update(state)


def resume(config: TrainConfig, accelerator: Accelerator, parts: Parts) -> None:
    """Go on from the checkpoint that the flags ask for, if they do.

    Raises SettingsError if there is none or it is of another run, CacheMismatch if it is of another cache.
    """
    if folder := agreed_checkpoint(config, accelerator):
        load(folder, parts)
        seed = parts[PROGRESS].seed
        if config.steps.seed not in (None, seed):
            raise SettingsError(f"--seed {config.steps.seed}: {folder} was trained with seed {seed}, leave it out")


def agreed_checkpoint(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """What the main process finds, its error included: others may see a shared disk later than it."""
    found: list[Any] = [None]
    try:
        if accelerator.is_main_process:
            found = [find(config.saving.output_dir, config.saving.resume_from_checkpoint)]
    except SettingsError as error:
        found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], SettingsError):
        raise found[0]
    return found[0]


def find(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: by path or name, the newest for `latest` and `auto`, or None to start anew.

    Raises SettingsError: there is no such checkpoint; or there are some, and nobody said what shall become of them.
    """
    there = checkpoints(output_dir)
    if wanted in ("latest", "auto") and there:
        return there[-1][1]
    if wanted == "latest":
        raise SettingsError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint")
    if wanted and wanted != "auto":
        for path in (Path(wanted), output_dir / wanted):
            if path.is_dir() and not path.name.endswith(INCOMPLETE):
                return path
        names = ", ".join(path.name for _, path in there) or "none"
        raise SettingsError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {output_dir} holds {names}")
    if there:
        raise SettingsError(
            f"{output_dir} holds {there[-1][1].name} already: continue with --resume_from_checkpoint latest, "
            "or name another --output_dir"
        )
    return None


def load(folder: Path, parts: Parts) -> None:
    """Load a checkpoint into the parts of a run; raises as `resume` does."""
    try:
        for name, part in parts.items():
            file = folder / name
            if part is None or (name == SCALE and not file.is_file()):  # trained in another precision so far
                continue
            if name == AVERAGE and not file.is_file():
                raise SettingsError(f"{folder} holds no average: it was trained without --use_ema, leave that out")
            read = load_file if name == MODEL else partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
            part.load_state_dict(read(file))
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise SettingsError(f"{folder} cannot be resumed from: {reason(error)}") from None
