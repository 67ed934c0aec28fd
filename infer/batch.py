"""Edits pictures batch by batch, and keeps those that are there already."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..encode.base.errors import EditError
from .config import InferConfig
from .jobs import Job
from .outputs import is_there, model_stamp, save, settings_of
from .pictures import open_picture

if TYPE_CHECKING:
    from PIL import Image

    from .edit import Editor


def edit_all(
    config: InferConfig, work: Sequence[tuple[Job, list[Path]]], load: Callable[[], "Editor"]
) -> tuple[int, int, set[str]]:
    """Edit and save batch by batch; an input that cannot be edited is reported.

    Args:
        work: inputs, each with the files of its pictures.
        load: gives the editor, asked for once there is anything to edit.

    Returns:
        How many inputs were edited, how many were there already, and the stems of those that failed.
    """
    editor: Editor | None = None
    stamp = model_stamp(config.model)
    edited = kept = 0
    failed: set[str] = set()
    with tqdm(total=len(work), unit="picture", desc="editing") as bar:
        for start in range(0, len(work), config.batch_size):
            batch: list[tuple[Image.Image, str, list[tuple[Path, str]]]] = []
            for job, paths in work[start : start + config.batch_size]:
                try:
                    if not job.prompt.strip():
                        raise EditError("the prompt is empty")
                    content = job.image()
                    files = list(zip(paths, settings_of(config, stamp, content, job.prompt), strict=True))
                    if all(itertools.starmap(is_there, files)):
                        kept += 1
                    else:
                        batch.append((open_picture(content), job.prompt, files))
                except EditError as error:
                    failed.add(job.stem)
                    tqdm.write(f"skipped {job.label}: {error}", file=sys.stderr)
            if batch:
                editor = editor or load()
                images, prompts, _ = zip(*batch, strict=True)
                pictures = iter((sweep if config.sweep else edit)(editor, config, images, prompts))
                for path, settings in (file for _, _, files in batch for file in files):
                    save(next(pictures), path, settings)
                edited += len(batch)
            bar.update(min(config.batch_size, len(work) - start))
    return edited, kept, failed


def load_editor(config: InferConfig) -> "Editor":
    """Load the model that `config` names."""
    from .edit import Editor

    editor = Editor(
        config.model,
        device=config.device,
        dtype=config.dtype,
        variant=config.variant,
        revision=config.revision,
        scheduler=config.scheduler,
    )
    editor.pipeline.set_progress_bar_config(desc="denoising", position=1, leave=False)
    return editor


def edit(
    editor: "Editor", config: InferConfig, images: Sequence["Image.Image"], prompts: Sequence[str]
) -> list["Image.Image"]:
    """Edit pictures with the settings of `config`."""
    return editor.edit(
        images,
        prompts,
        seed=config.seed,
        num_images=config.num_images,
        num_inference_steps=config.num_inference_steps,
        image_guidance_scale=config.image_guidance_scale,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        resolution=config.resolution,
        batch_size=config.batch_size,
    )


def sweep(
    editor: "Editor", config: InferConfig, images: Sequence["Image.Image"], prompts: Sequence[str]
) -> list["Image.Image"]:
    """As `edit`, with a labeled grid of edits over both scales in the place of each picture."""
    from .sheet import grid

    rows, columns = config.sweep_image_guidance_scale, config.sweep_guidance_scale
    cells = [
        edit(editor, dataclasses.replace(config, image_guidance_scale=row, guidance_scale=column), images, prompts)
        for row, column in tqdm(list(itertools.product(rows, columns)), desc="sweep", position=2, leave=False)
    ]
    labels = [f"image guidance {row:g}" for row in rows], [f"text guidance {column:g}" for column in columns]
    each = config.num_images
    return [
        grid(images[index // each], prompts[index // each], pictures, *labels)
        for index, pictures in enumerate(zip(*cells, strict=True))
    ]
