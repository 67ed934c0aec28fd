"""Edits pictures batch by batch, and keeps those that are there already."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..encode.base.console import bar, warn
from ..encode.base.errors import EditError, Ip2pError
from ..encode.data.pictures import open_picture
from ..encode.data.sheet import grid
from .config import InferConfig
from .jobs import Job
from .outputs import model_stamp, save, settings_in, settings_of

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
    make = sweep if config.outputs.sweep else edit_with
    with bar(None, "editing", "picture", total=len(work)) as shown:
        for start in range(0, len(work), config.editing.batch_size):
            batch: list[tuple[Image.Image, str, list[tuple[Path, str]]]] = []
            for job, paths in work[start : start + config.editing.batch_size]:
                try:
                    if not job.prompt.strip():
                        raise EditError("the prompt is empty")
                    content = job.image()
                    settings = settings_of(config, stamp, content, job.prompt)
                    if [settings_in(path) for path in paths] == settings:
                        kept += 1
                    else:
                        files = list(zip(paths, settings, strict=True))
                        batch.append((open_picture(content), job.prompt, files))
                except Ip2pError as error:
                    failed.add(job.stem)
                    warn(f"skipped {job.label}: {error}")
            if batch:
                editor = editor or load()
                images, prompts, files = zip(*batch, strict=True)
                pictures = make(editor, config, images, prompts)
                for picture, (path, settings) in zip(pictures, itertools.chain(*files), strict=True):
                    save(picture, path, settings)
                edited += len(batch)
            shown.update(min(config.editing.batch_size, len(work) - start))
    return edited, kept, failed


def load_editor(config: InferConfig) -> "Editor":
    """Load the model that `config` names."""
    from .edit import Editor

    editor = Editor(config.model, **vars(config.loading))
    editor.pipeline.set_progress_bar_config(desc="denoising", position=1, leave=False)
    return editor


def edit_with(
    editor: "Editor", config: InferConfig, images: Sequence["Image.Image"], prompts: Sequence[str], **changes: Any
) -> list["Image.Image"]:
    """Edit pictures with the settings of `config`, and some of them changed."""
    return editor.edit(images, prompts, num_images=config.outputs.num_images, **vars(config.editing) | changes)


def sweep(
    editor: "Editor", config: InferConfig, images: Sequence["Image.Image"], prompts: Sequence[str]
) -> list["Image.Image"]:
    """As `edit_with`, with a labeled grid of edits over both scales in the place of each picture."""
    rows, columns = config.outputs.sweep_image_guidance_scale, config.outputs.sweep_guidance_scale
    cells = [
        edit_with(editor, config, images, prompts, image_guidance_scale=row, guidance_scale=column)
        for row, column in bar(list(itertools.product(rows, columns)), "sweep", "scale", position=2)
    ]
    labels = [f"image guidance {row:g}" for row in rows], [f"text guidance {column:g}" for column in columns]
    each = config.outputs.num_images
    return [
        grid(images[index // each], prompts[index // each], pictures, *labels)
        for index, pictures in enumerate(zip(*cells, strict=True))
    ]
