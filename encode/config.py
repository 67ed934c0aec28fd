"""The flags of `ip2p-encode`."""

import dataclasses
from pathlib import Path
from typing import Literal

from .errors import SettingsError

TRAIN_ONLY = """
    output_dir logging_dir report_to seed train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
    conditioning_dropout_prob use_ema non_ema_revision use_8bit_adam allow_tf32 adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    enable_xformers_memory_efficient_attention val_image_url val_image_url_or_path validation_prompt
    num_validation_images validation_epochs validation_steps push_to_hub hub_token hub_model_id
""".split()  # noqa: SIM905 - as a list it would take forty lines
"""Names of diffusers' training flags that belong to `ip2p-train`, so that they can be refused with a pointer."""


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Encode (original image, edited image, edit instruction) once into a cache that ip2p-train reads."""

    pretrained_model_name_or_path: str
    """Stable Diffusion whose VAE and text encoder are used: a Hub id or a folder in diffusers' layout."""
    cache: Path
    """Folder of the cache. An unfinished one is continued, a finished one is extended by what is new."""
    dataset_name: str | None = None
    """Dataset: a Hub id, a local folder that `datasets.load_dataset` reads, or one written by `save_to_disk`."""
    dataset_config_name: str | None = None
    """Configuration of the dataset, if it has several."""
    dataset_revision: str | None = None
    """Revision of the dataset on the Hub."""
    split: str = "train"
    """Split of the dataset."""
    train_data_dir: Path | None = None
    """Folder of images whose metadata.jsonl or .csv names both files and the instruction of each pair."""
    original_image_column: str | None = None
    """Column of the original images. Default: input_image."""
    edited_image_column: str | None = None
    """Column of the edited images. Default: edited_image."""
    edit_prompt_column: str | None = None
    """Column of the edit instructions. Default: edit_prompt."""
    max_train_samples: int | None = None
    """Use only this many samples, from the first on."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads."""
    revision: str | None = None
    """Revision of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE: a Hub id or a folder. The weights decide whether a training run fits the cache, not the name."""
    vae_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the VAE alone. Default: that of --mixed_precision; for SDXL float32, since its VAE overflows."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision in which the VAE and the text encoder run. The cache holds float16 in any case."""
    resolution: int = 256
    """Side of the square images, in pixels."""
    center_crop: bool = False
    """Resize the short side and crop the middle. Without it images are squashed to a square, as in diffusers."""
    random_flip: bool = False
    """Also encode each pair flipped; training then tosses a coin for each sample."""
    encode_batch_size: int = 16
    """Pairs in one batch of the VAE, and twice as many instructions in one of the text encoder."""
    dataloader_num_workers: int | None = None
    """Processes that read and resize images. Default: one for each core but one, at most eight."""
    on_error: Literal["quarantine", "fail"] = "quarantine"
    """What a sample that cannot be encoded does: stand aside with its reason, or stop the run."""
    retry_quarantined: bool = False
    """Try the samples again that stood aside in earlier runs."""

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise SettingsError("give either --dataset_name or --train_data_dir: where the image pairs come from")
        for name in ("resolution", "encode_batch_size", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name} {value}: expected a number above 0")
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise SettingsError(f"--dataloader_num_workers {self.dataloader_num_workers}: expected 0 or more")

    @property
    def resize_mode(self) -> str:
        return "center_crop" if self.center_crop else "squash"

    @property
    def views(self) -> tuple[str, ...]:
        """The views of a pair that the cache holds."""
        return ("plain", "flip") if self.random_flip else ("plain",)
