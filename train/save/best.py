"""The best pipeline of a run: whole or not at all, and gone back to with the checkpoint that a run goes on from."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...encode.base.console import say
from ...encode.base.errors import TrainError, explained
from ...encode.base.files import sync
from ..config import TrainConfig

BEST, RECORD = "best", "best.json"
UNFINISHED, FORMER = f"{BEST}.incomplete", f"{BEST}.former"
LOWEST = ("loss", "l1", "l2")  # are the better the lower they are, all others the higher


def keep(
    config: TrainConfig,
    step: int,
    values: Mapping[str, float],
    wait: Callable[[], None],
    save: Callable[[Path], None],
) -> None:
    """Keep the pipeline of now in OUTPUT_DIR/best if its score of --keep_best is better than that of the one there.

    Beside it lies best.json: `step`, `score`, which is its name in metrics.jsonl, and `value`. A pipeline that was kept
    by another score has no say. Raises TrainError where it cannot be written.

    Args:
        values: what the validation of this step has found.
        wait: until no checkpoint is being written, which takes along the pipeline that is there.
        save: writes the pipeline into a folder.
    """
    wanted = config.watching.keep_best
    score = f"{'ema_' if config.optimizer.use_ema else ''}validation_{wanted}"
    if not wanted or not math.isfinite(value := values.get(score, math.nan)):
        return
    folder = config.saving.output_dir / BEST
    before, sign = read(folder), 1 if wanted in LOWEST else -1
    if before.get("score") == score and sign * before["value"] <= sign * value:
        return
    wait()
    unfinished = folder.with_name(UNFINISHED)
    hint = ": make space and continue with --resume_from_checkpoint latest"
    with explained(TrainError, f"{folder} cannot be written", OSError, hint=hint):
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        record = {"step": step, "score": score, "value": value}
        (unfinished / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        put(unfinished, folder)
    say(f"the best pipeline so far is that of step {step:,}, with {score} {value:.4f}: it is in {folder}")


def read(folder: Path) -> dict[str, Any]:
    """The best.json of a pipeline; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {}


def take_along(output_dir: Path, folder: Path) -> None:
    """Let a folder that is being written hold the best pipeline of another one, if that has one; as links."""
    if (output_dir / BEST).is_dir():
        shutil.copytree(output_dir / BEST, folder / BEST, copy_function=_link)


def go_back(output_dir: Path, origin: Path | None) -> None:
    """Let an output folder hold the best pipeline of the checkpoint that it goes on from; none without either.

    After a kill at any moment the same does the rest.
    """
    folder, unfinished = output_dir / BEST, output_dir / UNFINISHED
    for torn in (unfinished, output_dir / FORMER):
        shutil.rmtree(torn, ignore_errors=True)
    if origin and (origin / BEST).is_dir():
        shutil.copytree(origin / BEST, unfinished, copy_function=_link)
        put(unfinished, folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def put(unfinished: Path, folder: Path) -> None:
    """Give a folder, once all of it is on the disk, the name of one that may be there, which goes."""
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    former = folder.with_name(FORMER)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    unfinished.rename(folder)
    sync(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _link(source: str, place: str) -> None:
    """A second name of a file, which nobody changes; a copy on disks that know no such thing."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)
