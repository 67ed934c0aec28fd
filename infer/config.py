"""The flags of ip2p-infer, in groups."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..encode.base.arguments import also, stands_for
from ..encode.base.errors import SettingsError
from ..encode.base.flags import Count, Name, idle
from ..encode.config import Columns
from ..encode.judging import CLIP
from .editing import MODEL, OUTPUT, PRESETS, Editing, Loading, Preset


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What to edit."""

    image: tuple[str, ...] = ()
    """Picture or pictures: files, folders (the pictures directly inside) or glob patterns."""
    prompt: str | None = None
    """What to change, such as "make it snowy"; for all pictures, also of a table."""
    table: str | None = dataclasses.field(default=None, metadata=also("dataset_name train_data_dir dataset"))
    """Instead of --image: JSONL, CSV or Parquet file (its paths start there), or any dataset that ip2p-encode opens.
    Also --dataset_name or --train_data_dir, as there."""
    mask: str | None = None
    """Picture that is white, or transparent, where the others may change, and black where nothing does; of a table,
    --mask_column has one for each."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What becomes of it."""

    output: str = dataclasses.field(default="", metadata=OUTPUT)
    """Where edits go (required), also --output_dir: NAME.png for one input, else a folder; several of one are
    NAME_0.png, …"""
    num_images: Count = 1
    """Pictures to make of each input."""
    sheet: str | None = None
    """PNG file for a labeled contact sheet of originals, edits and targets (of the first 100 inputs)."""
    keep_blacked_out: bool = False
    """Write black pictures, too, that the model's safety checker made of edits. They are never scored."""
    sweep: bool = False
    """Make each picture a labeled grid of edits over both guidance scales, as the paper shows them."""
    sweep_image_guidance_scale: tuple[float, ...] = (1.0, 1.3, 1.6, 1.9, 2.2)
    """Rows of --sweep, from the top."""
    sweep_guidance_scale: tuple[float, ...] = (3.0, 5.0, 7.5, 10.0)
    """Columns of --sweep."""

    def __post_init__(self) -> None:
        if self.sheet and not self.sheet.lower().endswith(".png"):
            raise SettingsError(f"--sheet {self.sheet}: expected a name that ends in .png")
        if self.sheet and self.sweep:
            raise SettingsError("--sheet shows single edits, and --sweep makes grids of them: give one of the two")
        if not (self.sweep_image_guidance_scale and self.sweep_guidance_scale):
            raise SettingsError("--sweep_image_guidance_scale and --sweep_guidance_scale want one number or more")


@dataclasses.dataclass(frozen=True)
class Page:
    """A page in the browser, to try models out."""

    ui: bool = False
    """Open a page in the browser instead (pip install gradio); --image, --table and --prompt are its examples."""
    compare: tuple[str, ...] = ()
    """Further models for --ui, to compare."""
    host: str = "127.0.0.1"
    """Address that --ui listens on: this machine alone, or 0.0.0.0 for whoever reaches it."""
    port: int = 7860
    """Port that --ui listens on; 0 for any free one."""


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Edit pictures by instruction with a trained InstructPix2Pix model.

    One prompt for one or many pictures, or a table with a prompt for each. A picture that cannot be read, or an empty
    prompt, is reported and skipped. Outputs that exist with the same settings are kept, so repeating an interrupted
    command finishes the rest. `ip2p-infer evaluate` scores models over a dataset, `ip2p-infer export` writes one into a
    single file for other programs: each has its own `--help`.

    Exit status: 0 if any picture was edited or was there already, 1 if none could be, 2 for wrong flags or
    models. `--config run.yaml` stands for the flags that the file holds; later flags win.
    """

    model: str = dataclasses.field(metadata=MODEL)
    """Folder that ip2p-train saved, or Hub id of an InstructPix2Pix pipeline; also --pretrained_model_name_or_path."""
    inputs: Inputs = Inputs()
    outputs: Outputs = Outputs()
    editing: Editing = dataclasses.field(default_factory=Editing)
    columns: Columns = dataclasses.field(default_factory=Columns)
    loading: Loading = dataclasses.field(default_factory=Loading)
    page: Page = Page()
    preset: Preset = dataclasses.field(default="guide", metadata=stands_for(PRESETS))
    """Steps and both scales: diffusers' guide takes 20, 1.5 and 10; the paper 100, 1.5 and 7.5, as `ip2p-infer
    evaluate` does by default. Flags of their own win."""

    def __post_init__(self) -> None:
        if self.page.ui:
            if self.outputs.output or self.outputs.sheet or self.outputs.sweep:
                raise SettingsError("--ui keeps its pictures on the page: leave out --output, --sheet and --sweep")
            return
        if self.page.compare:
            raise SettingsError("--compare is for --ui, or see `ip2p-infer evaluate --help`")
        if bool(self.inputs.image) == bool(self.inputs.table):
            raise SettingsError("give either --image or --table, which say what to edit")
        if self.inputs.mask and self.columns.mask_column:
            raise SettingsError("give either --mask or --mask_column, which say where pictures may change")
        if self.inputs.image and not (self.inputs.prompt or "").strip():
            raise SettingsError('give --prompt, which says what to change, such as "make it snowy"')
        if not self.outputs.output:
            raise SettingsError("give --output, a folder, or NAME.png for a single picture")

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        outputs, scales = self.outputs, ("image_guidance_scale", "guidance_scale")
        if self.page.ui:
            one = "cannot act with --ui, which makes one picture at a time: leave it out"
            yield from (*idle(outputs, one, "num_images", "keep_blacked_out"), *idle(self.editing, one, "batch_size"))
            of_page = "cannot act with --ui, where masks are chosen on the page: leave it out"
            yield from (*idle(self.inputs, of_page, "mask"), *idle(self.columns, of_page, "mask_column"))
        else:
            yield from idle(self.page, "belongs to --ui: add that, or leave it out")
        if outputs.sweep:
            own = Editing(**PRESETS[self.preset])  # type: ignore[arg-type]  # whose scales nobody asked for
            for name in (name for name in scales if getattr(self.editing, name) != getattr(own, name)):
                yield from idle(self.editing, "cannot act with --sweep, whose scales are --sweep_…", name)
        else:
            wanted = "belongs to --sweep: add that, or leave it out"
            yield from idle(outputs, wanted, *(f"sweep_{name}" for name in scales))
        table, of_table = self.inputs.table, "says where a table holds what: it belongs to --table"
        yield from self.columns.idle(table) if table else idle(self.columns, of_table)
        editing = Editing() if outputs.sweep or self.page.ui else self.editing
        yield from (*self.loading.idle((self.model, *self.page.compare)), *editing.idle())


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What is measured, and where it goes."""

    output: str = dataclasses.field(metadata=OUTPUT)
    """Folder for edits, scores of each pair, results.json and curve.png; also --output_dir."""
    curve: bool = False
    """Score at image guidance 1.0, 1.2 … 2.2 instead of one scale, and draw the paper's curve, all models in
    one plot: what keeps to the input picture against what follows the edit."""
    original_caption_column: Name | None = None
    """Column with captions of the originals; default: original_prompt, or like it, if there is any."""
    edited_caption_column: Name | None = None
    """Column with captions of the edited pictures; default: edited_prompt, or like it, if there is any."""
    clip_model: str = CLIP
    """CLIP's folder or Hub id. This is MagicBrush's; the paper's curve is of openai/clip-vit-large-patch14."""
    dino_model: str = "facebook/dino-vits16"
    """DINO's folder or Hub id."""
    published_clip_range: bool = False
    """Show CLIP pixels from -1 to 1, not 0 to 1, as the paper's metrics did; only to compare with its numbers."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Score InstructPix2Pix models over held-out pairs.

    Each pair is edited as `ip2p-infer` does, and compared with the dataset's own edit: L1, L2, PSNR, CLIP-I,
    CLIP-T and DINO as in MagicBrush, CLIP image and text-image direction similarity as in the paper. What needs
    a column that the dataset lacks is left out. A pair that cannot be read is reported and skipped. Repeating an
    interrupted command finishes the rest. By default it takes the paper's steps and scales, `--preset paper`.

    Exit status: 0 if any pair was scored, 1 if none could be, 2 for wrong flags or models.
    `--config run.yaml` stands for the flags that the file holds; later flags win.
    """

    model: tuple[str, ...] = dataclasses.field(metadata=MODEL)
    """Folder or folders that ip2p-train saved, or Hub ids of InstructPix2Pix pipelines; also
    --pretrained_model_name_or_path."""
    dataset: str = dataclasses.field(metadata=also("dataset_name train_data_dir table"))
    """Held-out pairs: a JSONL, CSV or Parquet file, or any dataset that ip2p-encode opens; also --dataset_name or
    --train_data_dir."""
    scoring: Scoring
    editing: Editing = dataclasses.field(default_factory=lambda: Editing(**PRESETS["paper"]))  # type: ignore[arg-type]
    columns: Columns = dataclasses.field(default_factory=Columns)
    loading: Loading = dataclasses.field(default_factory=Loading)
    preset: Preset = dataclasses.field(default="paper", metadata=stands_for(PRESETS))
    """Steps and both scales: the paper takes 100, 1.5 and 7.5; diffusers' guide 20, 1.5 and 10, as `ip2p-infer` does by
    default. Flags of their own win."""

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        if self.scoring.curve:
            yield from idle(self.editing, "cannot act with --curve, whose scales are fixed", "image_guidance_scale")
        yield from (*self.columns.idle(self.dataset), *self.loading.idle(self.model), *self.editing.idle())

    def infer(self, model: str, image_guidance_scale: float, folder: Path) -> InferConfig:
        """The run of `ip2p-infer` that makes one model's pictures at one scale."""
        editing = dataclasses.replace(self.editing, image_guidance_scale=image_guidance_scale)
        inputs, outputs = Inputs(table=self.dataset), Outputs(str(folder))
        return InferConfig(model, inputs, outputs, editing, self.columns, self.loading)
