"""The flags of ip2p-infer."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from .errors import EditError


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Edit pictures by instruction with a trained InstructPix2Pix model.

    One picture and one prompt, many pictures and one prompt, or a table with a prompt for each picture.
    Outputs that exist with the same settings are kept, so repeating an interrupted command finishes the rest.
    A picture that cannot be read, or an empty prompt, is reported and skipped.

    Exit status: 0 if any picture was edited or was there already, 1 if none could be, 2 for wrong flags or
    models. `--config run.yaml` stands for the flags that the file holds; later flags win.
    """

    model: str = ""
    """Folder that ip2p-train saved, or Hub id of an InstructPix2Pix pipeline (required)."""
    image: tuple[str, ...] = ()
    """Picture or pictures: files, folders (the pictures directly inside) or glob patterns."""
    prompt: str | None = None
    """What to change, such as "make it snowy"; for all pictures, also of a table."""
    output: str = ""
    """Where edits go (required): NAME.png for one input, else a folder; several of one are NAME_0.png, …"""
    table: str | None = None
    """Instead of --image: JSONL, CSV or Parquet file (its paths start there), or a dataset (folder or id)."""
    split: str | None = None
    """Split of the dataset, such as "test" or "test[:64]"; default: the only one there is."""
    original_image_column: str | None = None
    """Column with the pictures; default: image, or the name used for training, such as input_image."""
    edit_prompt_column: str | None = None
    """Column with the prompts; default: prompt, or the name used for training, such as edit_prompt."""
    edited_image_column: str | None = None
    """Column with pictures to compare with, if there are any; default: target, or like edited_image."""
    sheet: str | None = None
    """PNG file for a labeled contact sheet of originals, edits and targets (of the first 100 inputs)."""
    seed: int = 0
    """The k-th picture of each input is drawn with seed + k, wherever the input stands."""
    num_images: int = 1
    """Pictures to make of each input."""
    num_inference_steps: int = 20
    """Denoising steps. For these and both scales, 20, 1.5 and 10 are the training checks of diffusers' guide;
    the paper edits with 100, 1.5 and 7.5."""
    image_guidance_scale: float = 1.5
    """How closely to keep to the input picture, from 0 up; below 1 works too."""
    guidance_scale: float = 10.0
    """How closely to follow the prompt, from 0 up."""
    guidance_rescale: float = 0.0
    """0 to 1: pulls back the contrast that guidance adds; for models with zero terminal SNR, about 0.7."""
    negative_prompt: str | None = None
    """What to steer away from."""
    resolution: int | None = None
    """Long side in pixels while editing, a multiple of 8; default: what the model was trained for.
    The output has the size of the input."""
    scheduler: str | None = None
    """diffusers' class name of another scheduler, such as DDIM or EulerAncestralDiscrete."""
    batch_size: int = 4
    """Pictures edited at once; changes the speed alone."""
    device: str | None = None
    """cuda, mps, cpu …; default: the accelerator if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Default: float16 on CUDA, float32 elsewhere."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""


def parse(argv: Sequence[str]) -> InferConfig:
    """Read flags into a configuration; `--help` and malformed values leave through SystemExit.

    Raises:
        EditError: an unknown flag, naming the nearest one, or flags that make no sense together.
    """
    import tyro

    config, unknown = tyro.cli(
        InferConfig,
        args=_expand(argv),
        prog="ip2p-infer",
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(InferConfig)]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else "`ip2p-infer --help` lists all flags"
        raise EditError(f"unknown argument {unknown[0]}: {hint}")
    _check(config)
    return config


def _check(config: InferConfig) -> None:
    if not config.model:
        raise EditError("give --model, a folder that ip2p-train saved or a Hub id")
    if bool(config.image) == bool(config.table):
        raise EditError("give either --image or --table, which say what to edit")
    if config.image and not (config.prompt or "").strip():
        raise EditError('give --prompt, which says what to change, such as "make it snowy"')
    if not config.output:
        raise EditError("give --output, a folder, or NAME.png for a single picture")
    if config.sheet and not config.sheet.lower().endswith(".png"):
        raise EditError(f"--sheet {config.sheet}: expected a name that ends in .png")
    if config.batch_size < 1 or config.num_images < 1:
        raise EditError("--batch_size and --num_images start at 1")


def _expand(argv: Sequence[str]) -> list[str]:
    """Put in place of each `--config FILE` the flags that the file holds."""
    flags: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        flags += _flags_of(value if equals else next(rest, "")) if name == "--config" else [argument]
    return flags


def _flags_of(path: str) -> list[str]:
    try:
        # BaseLoader keeps every value as it is written: `no` stays text, and so does 1e-5.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EditError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise EditError(f"--config {path} holds no `flag: value` lines")
    flags: list[str] = []
    for name, value in values.items():
        if value not in ("", "null"):
            flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return flags
