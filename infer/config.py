"""The flags of ip2p-infer."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from ..encode.base.errors import EditError
from .expand import expand

Config = TypeVar("Config", bound="Common")


@dataclasses.dataclass(frozen=True)
class Common:
    """What editing and scoring have in common."""

    split: str | None = None
    """Split of the dataset, such as "test" or "test[:64]"; default: the only one there is."""
    original_image_column: str | None = None
    """Column with the pictures; default: image, or the name used for training, such as input_image."""
    edit_prompt_column: str | None = None
    """Column with the prompts; default: prompt, or the name used for training, such as edit_prompt."""
    edited_image_column: str | None = None
    """Column with pictures to compare with, if there are any; default: target, or like edited_image."""
    seed: int = 0
    """The k-th picture of each input is drawn with seed + k, wherever the input stands."""
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


@dataclasses.dataclass(frozen=True)
class _Inputs:
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
    sheet: str | None = None
    """PNG file for a labeled contact sheet of originals, edits and targets (of the first 100 inputs)."""
    num_images: int = 1
    """Pictures to make of each input."""
    sweep: bool = False
    """Make each picture a labeled grid of edits over both guidance scales, as the paper shows them."""
    sweep_image_guidance_scale: tuple[float, ...] = (1.0, 1.3, 1.6, 1.9, 2.2)
    """Rows of --sweep, from the top."""
    sweep_guidance_scale: tuple[float, ...] = (3.0, 5.0, 7.5, 10.0)
    """Columns of --sweep."""
    ui: bool = False
    """Open a page in the browser instead (pip install 'ip2p[ui]'); --image, --table and --prompt are its examples."""
    compare: tuple[str, ...] = ()
    """Further models for --ui, to compare."""
    host: str = "127.0.0.1"
    """Address that --ui listens on: this machine alone, or 0.0.0.0 for whoever reaches it."""
    port: int = 7860
    """Port that --ui listens on; 0 for any free one."""


# Bases give their fields from the last to the first: `--help` says what to do before it says how.
@dataclasses.dataclass(frozen=True)
class InferConfig(Common, _Inputs):
    """Edit pictures by instruction with a trained InstructPix2Pix model.

    One picture and one prompt, many pictures and one prompt, or a table with a prompt for each picture.
    Outputs that exist with the same settings are kept, so repeating an interrupted command finishes the rest.
    A picture that cannot be read, or an empty prompt, is reported and skipped.
    `ip2p-infer evaluate` scores models over a dataset; `ip2p-infer evaluate --help` lists its flags.

    Exit status: 0 if any picture was edited or was there already, 1 if none could be, 2 for wrong flags or
    models. `--config run.yaml` stands for the flags that the file holds; later flags win.
    """


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    model: tuple[str, ...] = ()
    """Folder or folders that ip2p-train saved, or Hub ids of InstructPix2Pix pipelines (required)."""
    dataset: str = ""
    """Held-out pairs (required): a dataset (folder or Hub id), or a JSONL, CSV or Parquet file."""
    output: str = ""
    """Folder for edits, scores of each pair, results.json and curve.png (required)."""
    original_caption_column: str | None = None
    """Column with captions of the originals; default: original_prompt, or like it, if there is any."""
    edited_caption_column: str | None = None
    """Column with captions of the edited pictures; default: edited_prompt, or like it, if there is any."""
    curve: bool = False
    """Score at image guidance 1.0, 1.2 … 2.2 instead of one scale, and draw the paper's curve, all models in
    one plot: what keeps to the input picture against what follows the edit."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Folder or Hub id of the CLIP that sees pictures and captions. This one is MagicBrush's; the paper's
    curve was drawn with openai/clip-vit-large-patch14."""
    dino_model: str = "facebook/dino-vits16"
    """Folder or Hub id of the DINO that sees pictures."""
    published_clip_range: bool = False
    """Show CLIP pixels from -1 to 1 where it expects 0 to 1, as the paper's published metrics did; only to
    compare with those numbers."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Common, _Evaluation):
    """Score InstructPix2Pix models over held-out pairs.

    Each pair is edited as `ip2p-infer` does, and compared with the dataset's own edit: L1, L2, PSNR, CLIP-I,
    CLIP-T and DINO as in MagicBrush, CLIP image and text-image direction similarity as in the paper. What needs
    a column that the dataset lacks is left out. A pair that cannot be read is reported and skipped. Repeating an
    interrupted command finishes the rest.

    Exit status: 0 if any pair was scored, 1 if none could be, 2 for wrong flags or models.
    `--config run.yaml` stands for the flags that the file holds; later flags win.
    """

    num_inference_steps: int = 100
    """Denoising steps; these and both scales are the paper's."""
    guidance_scale: float = 7.5
    """How closely to follow the prompt, from 0 up."""
    batch_size: int = 4
    """Pairs edited and scored at once; changes the speed alone."""

    def editing(self, model: str, image_guidance_scale: float, folder: Path) -> InferConfig:
        """The run of `ip2p-infer` that makes one model's pictures at one scale."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Common)}
        common["image_guidance_scale"] = image_guidance_scale
        return InferConfig(model=model, table=self.dataset, output=str(folder), **common)


def parse(argv: Sequence[str]) -> InferConfig:
    """Read flags into a configuration; `--help` and malformed values leave through SystemExit.

    Raises:
        EditError: an unknown flag, naming the nearest one, or flags that make no sense together.
    """
    config = _parse(InferConfig, argv, "ip2p-infer")
    _check(config)
    return config


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """Read the flags behind `ip2p-infer evaluate`, as `parse` does."""
    config = _parse(EvaluateConfig, argv, "ip2p-infer evaluate")
    for name in ("model", "dataset", "output"):
        if not getattr(config, name):
            raise EditError(f"give --{name}; `ip2p-infer evaluate --help` says what it is")
    if config.batch_size < 1:
        raise EditError("--batch_size starts at 1")
    return config


def _parse(kind: type[Config], argv: Sequence[str], prog: str) -> Config:
    import tyro

    config, unknown = tyro.cli(
        kind,
        args=expand(argv),
        prog=prog,
        use_underscores=True,
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(kind)]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"`{prog} --help` lists all flags"
        raise EditError(f"unknown argument {unknown[0]}: {hint}")
    return config


def _check(config: InferConfig) -> None:
    if not config.model:
        raise EditError("give --model, a folder that ip2p-train saved or a Hub id")
    if config.ui:
        if config.output or config.sheet or config.sweep:
            raise EditError("--ui keeps its pictures on the page: leave out --output, --sheet and --sweep")
        return
    if config.compare:
        raise EditError("--compare is for --ui, or see `ip2p-infer evaluate --help`")
    if bool(config.image) == bool(config.table):
        raise EditError("give either --image or --table, which say what to edit")
    if config.image and not (config.prompt or "").strip():
        raise EditError('give --prompt, which says what to change, such as "make it snowy"')
    if not config.output:
        raise EditError("give --output, a folder, or NAME.png for a single picture")
    if config.sheet and not config.sheet.lower().endswith(".png"):
        raise EditError(f"--sheet {config.sheet}: expected a name that ends in .png")
    if config.sheet and config.sweep:
        raise EditError("--sheet shows single edits, and --sweep makes grids of them: give one of the two")
    if not (config.sweep_image_guidance_scale and config.sweep_guidance_scale):
        raise EditError("--sweep_image_guidance_scale and --sweep_guidance_scale want one number or more")
    if config.batch_size < 1 or config.num_images < 1:
        raise EditError("--batch_size and --num_images start at 1")
