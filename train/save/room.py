"""What a run will take of its samples and of the disk, said before its first step."""

import shutil
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...encode.base.console import amount, is_main_process, say, warn
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.weights import weight_files
from ..config import TrainConfig
from .averages import SNAPSHOTS
from .checkpoint import PROGRESS, Parts, checkpoints


def announce(
    config: TrainConfig, base: Checkpoint, unet: Any, state: Parts, total: int, per_step: int, samples: int
) -> None:
    """Say what the steps that are left make of the samples and of the disk; warn where there is no room for it.

    Args:
        unet: that is trained, and saved in the end.
        state: what a checkpoint holds, with the step that is reached.
        total: steps in all.
        per_step, samples: of the samples, how many a step sees, and how many there are.
    """
    steps = range(state[PROGRESS].step, total)
    if not steps or not is_main_process():
        return
    epochs = len(steps) * per_step / samples
    say(f"{len(steps):,} steps of {per_step:,} samples are {epochs:,.1f} epochs of {samples:,} samples")
    saving, folder = config.saving, config.saving.output_dir
    every, limit, there = saving.checkpointing_steps, saving.checkpoints_total_limit, len(checkpoints(folder))
    written = total // every - steps.start // every + (total % every > 0)  # one after the last step
    most = there + written if not limit else min(there + written, max(limit, there) + 1)  # one more while it is written
    size, pipeline = checkpoint_bytes(state), pipeline_bytes(config, base, unet)
    pipelines = 1 + (most + 1) * bool(config.watching.keep_best)  # each checkpoint may have a best one of its own
    needed = (most - there) * size + pipelines * pipeline + snapshot_bytes(config, unet)
    disk = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free  # the folder may be made later
    stay = f", of which the newest {limit:,} stay" if 0 < limit < there + written else ""
    told = f"{written:,} {'checkpoints' if written > 1 else 'checkpoint'} of {amount(size)} will be written{stay}"
    say(f"{told}: with the pipeline at most {amount(needed)} more in {folder}, {amount(free)} free")
    if needed > free:
        fewer = "" if limit == 1 else "--checkpoints_total_limit 1, "
        warn(f"{folder} has no room for that: give {fewer}a larger --checkpointing_steps, or another --output_dir")


def checkpoint_bytes(state: Parts) -> int:
    """Bytes of the tensors that a checkpoint holds, which are nearly all of it."""
    kept = [part.state_dict() for part in state.values() if part is not None]
    return sum(leaf.nbytes for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))


def pipeline_bytes(config: TrainConfig, base: Checkpoint, unet: Any) -> int:
    """Bytes of the pipeline: the UNet as it is saved, and the base's frozen parts as they are."""
    rounded = config.optimizer.weights == "bf16" and not config.optimizer.averages
    numbers = sum(weight.numel() for weight in unet.parameters())
    return (2 if rounded else 4) * numbers + sum(file.stat().st_size for file in frozen_files(base))


def frozen_files(base: Checkpoint) -> Iterator[Any]:
    """The weights of all that is not trained."""
    for folder in (base.vae_folder, *(base.folder / name for name in base.text_encoders)):
        yield from weight_files(folder, base.variant)


def snapshot_bytes(config: TrainConfig, unet: Any) -> int:
    """Bytes of the snapshots of averages, two in float16 each time."""
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    return 2 * 2 * trained * (SNAPSHOTS - 1) * config.optimizer.ema_power
