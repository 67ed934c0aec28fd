"""Edits all that `ip2p-infer` was asked for, batch by batch, keeps what is there already, and reports."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from ..encode.base.console import bar, is_quiet, say, warn
from ..encode.base.errors import EditError, Ip2pError
from ..encode.base.files import check_file
from ..encode.base.flags import changed
from ..encode.config import Dataset
from ..encode.data.pairs import no_instruction
from ..encode.data.pictures import open_mask, open_picture
from ..encode.data.places import check_place
from ..encode.data.sheet import grid
from .config import InferConfig
from .jobs import Job, find_jobs
from .kind import check_model
from .outputs import model_stamp, output_paths, output_place, save, settings_in, settings_of
from .summary import Work, described, print_psnr, save_sheet

if TYPE_CHECKING:
    from .edit import Editor

Images: TypeAlias = Sequence[Image.Image]
Masks: TypeAlias = Sequence["np.ndarray | None"]  # as of `open_mask`


def edit(config: InferConfig) -> int:
    """Edit everything that `config` names, and report; the exit status is 1 if there is no edited picture."""
    output_place(config.outputs.output)  # before datasets are opened
    if config.outputs.sheet:
        check_file(Path(config.outputs.sheet), "--sheet")
    if config.loading.lora:
        check_model(config.model, config.loading.revision, config.loading.lora, config.loading.cache_dir)
    if config.inputs.table:
        check_place(Dataset(dataset_name=config.inputs.table), Path(config.outputs.output), "--output")
    jobs = find_jobs(config)
    work = list(zip(jobs, output_paths(config, jobs), strict=True))
    with bar(None, "editing", "picture", total=len(work)) as shown:
        (done,), kept = edit_all([(config, work)], functools.cache(functools.partial(load_editor, config)), shown)
    if config.outputs.sheet and done:
        save_sheet(config, done, Path(config.outputs.sheet))
    if not config.outputs.sweep:
        print_psnr(done)
    counts = {"edited": len(done) - kept, "already there": kept, "skipped": len(work) - len(done)}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    say(f"{told} -> {config.outputs.output} ({described(config)})")
    return 0 if done else 1


def edit_all(
    runs: Sequence[tuple[InferConfig, Work]], load: Callable[[], "Editor"], shown: Any
) -> tuple[list[Work], int]:
    """Edit and save batch by batch, each at all settings in turn, so that it is encoded once; report what cannot be.

    Args:
        runs: settings of one model, and the same inputs with the files of their edits.
        load: gives the editor, the same each time; called where there is anything to edit.
        shown: a bar, which counts edits.

    Returns:
        For each run the part of its work whose pictures are there, and how many inputs of all had them before. Where a
        safety checker blacked one out, its input is not among them. What failed in one run is not tried in the next.
    """
    (config, _), *_ = runs
    stamp, size = model_stamp(config.model), config.editing.batch_size
    done: list[list[tuple[Job, list[Path]]]] = [[] for _ in runs]
    kept, cut = 0, dict[str, None]()
    for start in range(0, max(len(work) for _, work in runs), size):
        bad = set[str]()
        for there, (config, work) in zip(done, runs, strict=True):
            batch = work[start : start + size]
            made, before, unread = edit_batch(config, stamp, [pair for pair in batch if pair[0].stem not in bad], load)
            there += made
            bad |= {job.stem for job, _ in batch} - {job.stem for job, _ in made}
            kept, cut = kept + before, cut | dict.fromkeys(unread)
            shown.update(len(batch))
    if cut:
        warn(f"{len(cut):,} prompts are longer than the model reads; not read of {next(iter(cut))[:200]}")
    return list(done), kept


def edit_batch(
    config: InferConfig, stamp: str | None, work: Work, load: Callable[[], "Editor"]
) -> tuple[Work, int, list[str]]:
    """Edit and save at once; also returns the ends of prompts that the model does not read. `stamp` is its files'."""
    done, kept, lost = [], 0, set[str]()
    batch: list[tuple[Image.Image, np.ndarray | None, Job, list[tuple[Path, str]]]] = []
    for job, paths in work:
        with skipping(job):
            if why := no_instruction(job.prompt):
                raise EditError(f"the prompt {why}")
            content, mask = job.image(), job.mask() if job.mask else None
            settings = settings_of(config, stamp, content, job.prompt, mask)
            if [settings_in(path) for path in paths] == settings:
                kept += 1
            else:
                shares = None if mask is None else open_mask(mask)
                batch.append((open_picture(content), shares, job, list(zip(paths, settings, strict=True))))
            done.append((job, paths))
    cut: list[str] = []
    if batch:
        images, masks, inputs, files = zip(*batch, strict=True)
        make = sweep if config.outputs.sweep else edit_with
        pictures = iter(make(load(), config, images, [job.prompt for job in inputs], masks))
        for job, places in zip(inputs, files, strict=True):
            cut += [f"{job.label}: {unread}" for unread in [load().unread(job.prompt)] if unread]
            lost.add(job.stem)
            with skipping(job):
                save_all(config, list(itertools.islice(pictures, len(places))), places)
                lost.remove(job.stem)
    return [(job, paths) for job, paths in done if job.stem not in lost], kept, cut


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
    editor.known = {}  # a command asks for the same pictures at several scales
    shown = {"desc": "denoising", "position": 1, "leave": False, "delay": 5}  # seconds
    editor.pipeline.set_progress_bar_config(**shown, disable=is_quiet())
    return editor


def edit_with(
    editor: "Editor", config: InferConfig, images: Images, prompts: Sequence[str], masks: Masks
) -> list[Image.Image]:
    """Edit pictures with the settings of `config`."""
    return editor.edit(images, prompts, masks=list(masks), num_images=config.outputs.num_images, **vars(config.editing))


def sweep(
    editor: "Editor", config: InferConfig, images: Images, prompts: Sequence[str], masks: Masks
) -> list[Image.Image]:
    """As `edit_with`, with a labeled grid of edits over both scales in the place of each picture."""
    rows, columns = config.outputs.sweep_image_guidance_scale, config.outputs.sweep_guidance_scale
    cells = [
        edit_with(editor, changed(config, image_guidance_scale=row, guidance_scale=column), images, prompts, masks)
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
