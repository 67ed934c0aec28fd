"""The flags of `ip2p-encode`, in groups. Training reads the same `Model`."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import ImageColor

from .base.errors import SettingsError
from .base.flags import Count, Name, Whole, idle
from .base.keywords import configured
from .base.refused import REFUSED
from .judging import PairScores

NO_FLIP = r"\b(left|right)(most|wards?|side|hand(ed)?)?\b|clockwise"
"""Instructions that are wrong in a mirror."""
AUTO = "auto"  # as a column: which one is found


@dataclasses.dataclass(frozen=True)
class Model:
    """The Stable Diffusion model that encodes and is trained."""

    pretrained_model_name_or_path: str
    """Stable Diffusion 1.x, 2.x or SDXL: a Hub id, a folder in diffusers' layout, or a .safetensors file in the
    original layout. Training takes the one that made the cache, and widens its UNet to 8 input channels."""
    revision: str | None = None
    """Revision of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE: a Hub id, a folder or a .safetensors file. Training takes by default what the cache records. The
    weights decide whether a training run fits the cache, not the name."""
    single_file_config: str | None = None
    """For a single file: folder or Hub id of a model of its kind, with its shapes, noise schedule and tokenizer.
    Default: the one on the Hub that diffusers takes it for; in training, what the cache records."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads."""

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        place = self.pretrained_model_name_or_path
        if os.path.exists(place):
            of_hub = ("revision", "non_ema_revision")  # the second in training alone
            yield from idle(self, f"is for models on the Hub, {place} is one here: leave it out", *of_hub)
        if place and not os.path.isfile(place):
            yield from idle(self, f"describes a single file, {place} is none: leave it out", "single_file_config")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a dataset holds what."""

    dataset_config_name: str | None = None
    """Configuration of the dataset, if it has several."""
    dataset_revision: str | None = None
    """Revision of the dataset on the Hub."""
    split: str | None = None
    """Split of the dataset, such as test or "test[:64]". Default: the only one there is; ip2p-encode takes train."""
    original_image_column: Name | None = None
    """Column of the original images; in tar files, how their names end. Default: that of a known dataset, else
    input_image, else the only one with a name that says so."""
    edited_image_column: Name | None = None
    """Column of the edited images. Default: likewise, edited_image."""
    edit_prompt_column: Name | None = None
    """Column of the edit instructions. Default: likewise, edit_prompt."""
    mask_column: Name | None = None
    """Column of masks: white or transparent where the edit is. ip2p-encode caches them beside the pictures, and
    ip2p-train --edit_weight goes by them; ip2p-infer changes nothing outside. auto takes that of a known dataset, else
    the only one with a name that says so. Default: no masks."""

    def idle(self, dataset: str) -> Iterator[str]:
        """What is said of flags that are set and cannot act on a dataset of this name."""
        why = f"is for datasets on the Hub, not for {dataset}: leave it out"
        if os.path.exists(dataset):
            yield from idle(self, why, "dataset_revision")
        if os.path.isfile(dataset):
            yield from idle(self, why, "dataset_config_name")


@dataclasses.dataclass(frozen=True)
class Dataset(Columns):
    """The pairs: original image, edited image, edit instruction."""

    dataset_name: str | None = None
    """Dataset: a Hub id, a local file or folder that `datasets` reads, or WebDataset tar files: paths or urls, with
    {000..099} or * for several."""
    streaming: bool = False
    """Read the dataset as a stream, once, and keep only what is needed of it; with --max_train_samples, only these."""
    train_data_dir: Path | None = None
    """Folder whose metadata.jsonl, .csv or .parquet names both images and the instruction of each pair, or one with
    the seeds.json of the InstructPix2Pix repository."""
    prompt_choice: Literal["first", "all"] = "first"
    """Which instruction of a list is taken; with `all`, each makes a sample of its own."""
    reverse_pairs: bool = False
    """Add each pair reversed, with the instruction that leads back."""
    inverse_prompt_column: Name | None = None
    """Column of the instructions that lead back. Default: likewise, inverse_edit."""
    keep_columns: tuple[Name, ...] = ()
    """Columns of numbers, booleans or text that the table of samples keeps, for `ip2p-train --keep`. No picture is read
    for them, so they can be added to a finished cache."""
    max_train_samples: Count | None = None
    """Use only this many samples, from the first on."""

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_data_dir:
            raise SettingsError("give either --dataset_name or --train_data_dir: where the image pairs come from")
        if self.inverse_prompt_column and not self.reverse_pairs:
            raise SettingsError("--inverse_prompt_column is used with --reverse_pairs alone: add that, or leave it out")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is made of the images before they are encoded."""

    resolution: Count = 256
    """Side of the square images, in pixels; with --bucket_step other shapes have no more pixels than this square."""
    bucket_step: Count | None = None
    """Let pictures keep their shape: each is cropped to the nearest of a few, at most 2:1, whose sides are multiples of
    this; 64 is right from 512 px on. Default: all become squares."""
    resize_mode: Literal["squash", "center_crop", "random_crop"] | None = None
    """Make images square by squashing them, as diffusers does; or keep their aspect, resize one side and crop the
    other: in the middle, or in --crops places of which training draws one. Default: squash, and with --bucket_step
    center_crop."""
    center_crop: bool = False
    """The same as --resize_mode center_crop."""
    crops: Count = 4
    """Places of --resize_mode random_crop: as many views of each pair are stored."""
    random_flip: bool = False
    """Also encode each view flipped; training then tosses a coin for each sample."""
    no_flip_regex: str = NO_FLIP
    """Training never flips a sample whose instruction matches this, upper or lower case; `none` keeps none from it."""
    background: str = "white"
    """Color behind transparent pixels: a name, #rrggbb, ..."""

    def __post_init__(self) -> None:
        if self.center_crop and self.resize_mode == "random_crop":
            raise SettingsError("--center_crop and --resize_mode random_crop exclude each other: leave one out")
        if self.bucket_step and self.resize_mode == "squash":
            raise SettingsError("--bucket_step keeps shapes, and --resize_mode squash does not: leave one out")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise SettingsError(f"--background {self.background}: expected a color such as white or #a0b1c2") from None
        try:
            re.compile(self.no_flip_regex)
        except re.error as error:
            raise SettingsError(f"--no_flip_regex {self.no_flip_regex}: {error}") from None

    @property
    def resizing(self) -> str:
        """How images are brought to their shape: squash, center_crop or random_crop."""
        usual = "center_crop" if self.center_crop or self.bucket_step else "squash"
        return "center_crop" if self.center_crop else self.resize_mode or usual


@dataclasses.dataclass(frozen=True)
class Run:
    """How the encode runs."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision in which the VAE and the text encoder run. The cache holds float16 in any case."""
    vae_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision of the VAE alone; fp32 is another word for no. Default: that of --mixed_precision; for SDXL float32,
    since its VAE overflows, unless the VAE's configuration says that it does not (force_upcast: false)."""
    cache_text: bool = True
    """Keep instructions embedded. With --no_cache_text they are kept alone, and training embeds those of each batch:
    the text encoder takes time and memory there, and its output no room here, 116 KiB of each instruction (SD 1.5)."""
    encode_batch_size: Count = 16
    """Pairs in one batch of the VAE, and twice as many instructions in one of the text encoder."""
    dataloader_num_workers: Whole | None = None
    """Processes that read and resize images. Default: its share of the cores but one, at most sixteen."""
    on_error: Literal["quarantine", "fail"] = "quarantine"
    """What a sample that cannot be encoded does: stand aside with its reason, or stop the run."""
    retry_quarantined: bool = False
    """Try the samples again that stood aside in earlier runs."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Encode (original image, edited image, edit instruction) once into a cache that ip2p-train reads."""

    model: Model
    cache: Path
    """Folder of the cache. An unfinished one is continued, a finished one is extended by what is new."""
    dataset: Dataset = Dataset()
    pictures: Pictures = Pictures()
    run: Run = Run()
    scores: PairScores = dataclasses.field(default_factory=PairScores)

    def __post_init__(self) -> None:
        if not (self.dataset.dataset_name or self.dataset.train_data_dir):
            raise SettingsError("give either --dataset_name or --train_data_dir: where the image pairs come from")

    @classmethod
    def of(cls, **flags: Any) -> "EncodeConfig":
        """A configuration by the flags of `ip2p-encode`: `EncodeConfig.of(cache="cache", …)`; or SettingsError."""
        return configured(cls, "ip2p-encode", REFUSED, flags)

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        yield from (*self.model.idle(), *self.scores.idle())
        yield from self.dataset.idle(self.dataset.dataset_name or str(self.dataset.train_data_dir))
        if self.pictures.resizing != "random_crop":
            yield from idle(self.pictures, "belongs to --resize_mode random_crop: add that, or leave it out", "crops")
        if not self.pictures.random_flip:
            yield from idle(self.pictures, "belongs to --random_flip: add that, or leave it out", "no_flip_regex")
