"""The flags of `ip2p-encode`."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from PIL import ImageColor

from .base.errors import SettingsError

TRAIN_ONLY = """
    output_dir logging_dir report_to seed train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
    conditioning_dropout_prob use_ema non_ema_revision use_8bit_adam allow_tf32 adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    enable_xformers_memory_efficient_attention val_image_url val_image_url_or_path validation_prompt
    num_validation_images validation_epochs validation_steps push_to_hub hub_token hub_model_id
""".split()
"""Names of diffusers' training flags that belong to `ip2p-train`."""
PER_SAMPLE: dict[str, str] = dict.fromkeys(
    ("crops_coords_top_left_h", "crops_coords_top_left_w"), "is not needed: SDXL is trained with each sample's own crop"
)
REFUSED: dict[str, str] = PER_SAMPLE | dict.fromkeys(TRAIN_ONLY, "belongs to ip2p-train: give it there")
"""diffusers' flags that `ip2p-encode` does not take, with what to do about them."""


NO_FLIP = r"\b(left|right)(most|wards?|side|hand(ed)?)?\b|clockwise"
"""Instructions that are wrong in a mirror."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Encode (original image, edited image, edit instruction) once into a cache that ip2p-train reads."""

    pretrained_model_name_or_path: str
    """Stable Diffusion whose VAE and text encoder are used: a Hub id, a folder in diffusers' layout, or a .safetensors
    file in the original layout."""
    cache: Path
    """Folder of the cache. An unfinished one is continued, a finished one is extended by what is new."""
    dataset_name: str | None = None
    """Dataset: a Hub id, a local file or folder that `datasets` reads, or WebDataset tar files: paths or urls, with
    {000..099} or * for several."""
    dataset_config_name: str | None = None
    """Configuration of the dataset, if it has several."""
    dataset_revision: str | None = None
    """Revision of the dataset on the Hub."""
    split: str | None = None
    """Split of the dataset. Default: train, or the only one there is."""
    streaming: bool = False
    """Read the dataset as a stream, once, and keep only what is needed of it; with --max_train_samples, only these."""
    train_data_dir: Path | None = None
    """Folder whose metadata.jsonl, .csv or .parquet names both images and the instruction of each pair, or one with
    the seeds.json of the InstructPix2Pix repository."""
    original_image_column: str | None = None
    """Column of the original images; in tar files, how their names end. Default: that of a known dataset, else
    input_image, else the only one with a name that says so."""
    edited_image_column: str | None = None
    """Column of the edited images. Default: likewise, edited_image."""
    edit_prompt_column: str | None = None
    """Column of the edit instructions. Default: likewise, edit_prompt."""
    prompt_choice: Literal["first", "all"] = "first"
    """Which instruction of a list is taken; with `all`, each makes a sample of its own."""
    reverse_pairs: bool = False
    """Add each pair reversed, with the instruction that leads back."""
    inverse_prompt_column: str | None = None
    """Column of the instructions that lead back. Default: likewise, inverse_edit."""
    max_train_samples: int | None = None
    """Use only this many samples, from the first on."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads."""
    revision: str | None = None
    """Revision of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    single_file_config: str | None = None
    """For a single file: folder or Hub id of a model of its kind, with its shapes, noise schedule and tokenizer.
    Default: the one on the Hub that diffusers takes it for."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE: a Hub id or a folder. The weights decide whether a training run fits the cache, not the name."""
    vae_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the VAE alone. Default: that of --mixed_precision; for SDXL float32, since its VAE overflows, unless
    the VAE's configuration says that it does not (force_upcast: false)."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision in which the VAE and the text encoder run. The cache holds float16 in any case."""
    resolution: int = 256
    """Side of the square images, in pixels."""
    resize_mode: Literal["squash", "center_crop", "random_crop"] = "squash"
    """Make images square by squashing them, as diffusers does; or keep their shape, resize the short side and crop
    the long one: in the middle, or in --crops places of which training draws one."""
    center_crop: bool = False
    """The same as --resize_mode center_crop."""
    crops: int = 4
    """Places of --resize_mode random_crop: as many views of each pair are stored."""
    random_flip: bool = False
    """Also encode each view flipped; training then tosses a coin for each sample."""
    no_flip_regex: str = NO_FLIP
    """Training never flips a sample whose instruction matches this, upper or lower case; `none` keeps none from it."""
    background: str = "white"
    """Color behind transparent pixels: a name, #rrggbb, ..."""
    encode_batch_size: int = 16
    """Pairs in one batch of the VAE, and twice as many instructions in one of the text encoder."""
    dataloader_num_workers: int | None = None
    """Processes that read and resize images. Default: its share of the cores but one, at most sixteen."""
    on_error: Literal["quarantine", "fail"] = "quarantine"
    """What a sample that cannot be encoded does: stand aside with its reason, or stop the run."""
    retry_quarantined: bool = False
    """Try the samples again that stood aside in earlier runs."""

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise SettingsError("give either --dataset_name or --train_data_dir: where the image pairs come from")
        if self.inverse_prompt_column and not self.reverse_pairs:
            raise SettingsError("--inverse_prompt_column is used with --reverse_pairs alone: add that, or leave it out")
        for name in ("resolution", "crops", "encode_batch_size", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name} {value}: expected a number above 0")
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise SettingsError(f"--dataloader_num_workers {self.dataloader_num_workers}: expected 0 or more")
        self._check_geometry()

    def _check_geometry(self) -> None:
        if self.center_crop:
            if self.resize_mode == "random_crop":
                raise SettingsError("--center_crop and --resize_mode random_crop exclude each other: leave one out")
            object.__setattr__(self, "resize_mode", "center_crop")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise SettingsError(f"--background {self.background}: expected a color such as white or #a0b1c2") from None
        try:
            re.compile(self.no_flip_regex)
        except re.error as error:
            raise SettingsError(f"--no_flip_regex {self.no_flip_regex}: {error}") from None
