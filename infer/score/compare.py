"""Compares edits with their originals and targets: on a contact sheet, and by PSNR."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...encode.base.console import say
from ...encode.base.errors import Ip2pError
from ...encode.data.pictures import open_picture
from ...encode.data.sheet import contact_sheet
from ..config import InferConfig
from ..jobs import Job

SHEET_ROWS = 100
Done = Sequence[tuple[Job, list[Path]]]  # inputs, each with the files of its edits


def save_sheet(config: InferConfig, done: Done) -> None:
    """Draw the first `SHEET_ROWS` of the pictures that are there, whichever run made them."""
    edits = [f"edited, seed {config.editing.seed + k}" for k in range(config.outputs.num_images)]
    targets = ["target"] if any(job.target for job, _ in done) else []
    rows = (
        (job.prompt, [open_picture(job.image()), *map(open_picture, paths), *(target_of(job) for _ in targets)])
        for job, paths in done[:SHEET_ROWS]
    )
    sheet = Path(str(config.outputs.sheet))
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, ["original", *edits, *targets]).save(sheet)
    say(f"contact sheet of {min(len(done), SHEET_ROWS)} of {len(done)} inputs: {sheet}")


def print_psnr(done: Done) -> None:
    """Say how near the edits came to their targets, beside how near the originals were; nothing without targets."""
    if not any(job.target for job, _ in done):
        return
    from .metrics import psnr  # only now: torch takes seconds to import

    before: list[float] = []
    after: list[float] = []
    for job, paths in done:
        if (target := target_of(job)) is not None:
            before.append(psnr(open_picture(job.image()), target))
            after += [psnr(open_picture(path), target) for path in paths]
    if before:
        edited, original = statistics.fmean(after), statistics.fmean(before)
        say(f"PSNR to the target, {len(before)} pairs: edited {edited:.2f} dB, original {original:.2f} dB")


def target_of(job: Job) -> Image.Image | None:
    """The picture that the edit should have become, where there is one that can be read."""
    try:
        return open_picture(job.target()) if job.target else None
    except Ip2pError:
        return None
