"""What is shown of a run that is done: a contact sheet, steps and scales, how near the edits came to their targets."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from ..encode.base.console import say
from ..encode.base.errors import Ip2pError
from ..encode.data.pictures import open_picture
from ..encode.data.sheet import contact_sheet
from .config import InferConfig
from .jobs import Job

Work: TypeAlias = Sequence[tuple[Job, list[Path]]]  # inputs, each with the files of its edits
SHEET_ROWS = 100


def described(config: InferConfig) -> str:
    """Steps and scales, which the results are reported with."""
    if not config.outputs.sweep:
        return config.editing.described
    return f"{config.editing.num_inference_steps} steps, a grid over both scales"


def save_sheet(config: InferConfig, done: Work, sheet: Path) -> None:
    """Draw the first `SHEET_ROWS` of the pictures that are there, whichever run made them, and their targets."""
    edits = [f"edited, seed {config.editing.seed + k}" for k in range(config.outputs.num_images)]
    targets = ["target"] if any(job.target for job, _ in done) else []
    rows = (
        (job.prompt, [open_picture(job.image()), *map(open_picture, paths), *(target_of(job) for _ in targets)])
        for job, paths in done[:SHEET_ROWS]
    )
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, ["original", *edits, *targets]).save(sheet)
    say(f"contact sheet of {min(len(done), SHEET_ROWS)} of {len(done)} inputs: {sheet}")


def print_psnr(done: Work) -> None:
    """Say how near the edits came to their targets, beside how near the originals were; nothing without targets."""
    if not any(job.target for job, _ in done):
        return
    from .score.metrics import psnr  # here, since torch takes seconds to import

    scores = [
        (psnr(open_picture(job.image()), target), statistics.fmean(psnr(open_picture(path), target) for path in paths))
        for job, paths in done
        if (target := target_of(job)) is not None
    ]
    if scores:
        original, edited = map(statistics.fmean, zip(*scores, strict=True))
        say(f"PSNR to the target, {len(scores)} pairs: edited {edited:.2f} dB, original {original:.2f} dB")


def target_of(job: Job) -> Image.Image | None:
    """The picture that the edit should have become, where there is one that can be read."""
    try:
        return open_picture(job.target()) if job.target else None
    except Ip2pError:
        return None
