"""Edits all that `ip2p-infer` was asked for, batch by batch, keeps what is there already, and reports."""

import contextlib
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw

from ..encode.base.console import bar, say, warn
from ..encode.base.errors import EditError, Ip2pError
from ..encode.base.files import check_file
from ..encode.base.flags import changed
from ..encode.config import Dataset
from ..encode.data.pairs import no_instruction
from ..encode.data.pictures import open_picture
from ..encode.data.places import check_place
from ..encode.data.sheet import contact_sheet, grid
from .config import InferConfig
from .jobs import Job, find_jobs
from .outputs import model_stamp, output_paths, output_place, save, settings_in, settings_of

if TYPE_CHECKING:
    from .edit import Editor

SHEET_ROWS = 100
Images: TypeAlias = Sequence[Image.Image]
Work: TypeAlias = Sequence[tuple[Job, list[Path]]]  # inputs, each with the files of its edits


def edit(config: InferConfig) -> int:
    """Edit everything that `config` names, and report; the exit status is 1 if there is no edited picture."""
    output_place(config.outputs.output)  # before datasets are opened
    if config.outputs.sheet:
        check_file(Path(config.outputs.sheet), "--sheet")
    if config.loading.lora:
        from .models import check_model  # torch takes seconds to import

        check_model(config.model, config.loading.revision, config.loading.lora)
    if config.inputs.table:
        check_place(Dataset(dataset_name=config.inputs.table), Path(config.outputs.output), "--output")
    jobs = find_jobs(config)
    work = list(zip(jobs, output_paths(config, jobs), strict=True))
    done, kept = edit_all(config, work, functools.cache(functools.partial(load_editor, config)))
    if config.outputs.sheet and done:
        save_sheet(config, done, Path(config.outputs.sheet))
    if not config.outputs.sweep:
        print_psnr(done)
    counts = {"edited": len(done) - kept, "already there": kept, "skipped": len(work) - len(done)}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{told} -> {config.outputs.output} ({described(config)})")
    return 0 if done else 1


def described(config: InferConfig) -> str:
    """Steps and scales, as the results are reported with."""
    if not config.outputs.sweep:
        return config.editing.described
    return f"{config.editing.num_inference_steps} steps, a grid over both scales"


def edit_all(config: InferConfig, work: Work, load: Callable[[], "Editor"]) -> tuple[Work, int]:
    """Edit and save batch by batch; an input that cannot be edited is reported.

    Args:
        load: gives the editor, the same each time; called where there is anything to edit.

    Returns:
        The part of `work` whose pictures are there, and how many inputs of it had them before. Where a safety checker
        blacked one out, its input is not among them.
    """
    stamp, size = model_stamp(config.model), config.editing.batch_size
    done, kept, lost = [], 0, set[str]()
    cut: list[str] = []
    make = sweep if config.outputs.sweep else edit_with
    with bar(None, "editing", "picture", total=len(work)) as shown:
        for start in range(0, len(work), size):
            batch: list[tuple[Image.Image, Job, list[tuple[Path, str]]]] = []
            for job, paths in work[start : start + size]:
                with skipping(job):
                    if why := no_instruction(job.prompt):
                        raise EditError(f"the prompt {why}")
                    content = job.image()
                    settings = settings_of(config, stamp, content, job.prompt)
                    if [settings_in(path) for path in paths] == settings:
                        kept += 1
                    else:
                        batch.append((open_picture(content), job, list(zip(paths, settings, strict=True))))
                    done.append((job, paths))
            if batch:
                images, inputs, files = zip(*batch, strict=True)
                pictures = iter(make(load(), config, images, [job.prompt for job in inputs]))
                for job, places in zip(inputs, files, strict=True):
                    cut += [f"{job.label}: {unread}" for unread in [load().unread(job.prompt)] if unread]
                    lost.add(job.stem)
                    with skipping(job):
                        save_all(config, list(itertools.islice(pictures, len(places))), places)
                        lost.remove(job.stem)
            shown.update(min(size, len(work) - start))
    if cut:
        warn(f"{len(cut):,} prompts are longer than the model reads; not read of {cut[0][:200]}")
    return [(job, paths) for job, paths in done if job.stem not in lost], kept


def save_all(config: InferConfig, pictures: Images, places: Sequence[tuple[Path, str]]) -> None:
    """Write the pictures of one input, each with its file and settings.

    Raises:
        EditError: the safety checker blacked some out; the others are written, and these if that is asked for.
    """
    black = []
    for number, (picture, (path, settings)) in enumerate(zip(pictures, places, strict=True)):
        if blacked_out(picture):
            black.append(f"{config.editing.seed + number}")
            settings = json.dumps(json.loads(settings) | {"blacked_out": True})  # so that it is not taken for an edit
        if not blacked_out(picture) or config.outputs.keep_blacked_out:
            save(picture, path, settings)
    if black:
        seeds = f"{len(black)} of {len(pictures)} pictures, seed {', '.join(black)}"
        raise EditError(f"the model's safety checker blacked out {seeds}: another --seed or prompt may do")


def blacked_out(picture: Image.Image) -> bool:
    """Whether a picture is a black one in the place of an edit that the model's safety checker did not like."""
    return "blacked_out" in picture.info


@contextlib.contextmanager
def skipping(job: Job) -> Iterator[None]:
    """Report an input that cannot be used, and go on with the next."""
    try:
        yield
    except Ip2pError as error:
        warn(f"skipped {job.label}: {error}")


def load_editor(config: InferConfig) -> "Editor":
    """Load the model that `config` names."""
    from .edit import Editor  # here, since torch takes seconds to import

    editor = Editor(config.model, **vars(config.loading))
    editor.pipeline.set_progress_bar_config(desc="denoising", position=1, leave=False, delay=5)  # seconds
    return editor


def edit_with(editor: "Editor", config: InferConfig, images: Images, prompts: Sequence[str]) -> list[Image.Image]:
    """Edit pictures with the settings of `config`."""
    return editor.edit(images, prompts, num_images=config.outputs.num_images, **vars(config.editing))


def sweep(editor: "Editor", config: InferConfig, images: Images, prompts: Sequence[str]) -> list[Image.Image]:
    """As `edit_with`, with a labeled grid of edits over both scales in the place of each picture."""
    rows, columns = config.outputs.sweep_image_guidance_scale, config.outputs.sweep_guidance_scale
    cells = [
        edit_with(editor, changed(config, image_guidance_scale=row, guidance_scale=column), images, prompts)
        for row, column in bar(list(itertools.product(rows, columns)), "sweep", "scale", position=2)
    ]
    black = [picture for picture in itertools.chain(*cells) if blacked_out(picture)]
    for picture in black:
        ImageDraw.Draw(picture).text((4, 4), "blacked out", "white")
    if black:
        warn(f"the model's safety checker blacked out {len(black)} of {sum(map(len, cells))} edits of this sweep")
    labels = [f"image guidance {row:g}" for row in rows], [f"text guidance {column:g}" for column in columns]
    pairs = [pair for pair in zip(images, prompts, strict=True) for _ in range(config.outputs.num_images)]
    return [grid(*pair, edits, *labels) for pair, edits in zip(pairs, zip(*cells, strict=True), strict=True)]


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
