"""The flags of `ip2p-train`, in groups."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Literal

from ..encode.base.errors import SettingsError
from ..encode.base.files import is_url
from ..encode.base.flags import SECRET, Amount, Count, Whole, flags_of
from ..encode.base.keywords import configured
from ..encode.base.refused import NOT_NEEDED
from ..encode.config import EncodeConfig, Model
from .demands import check, idle
from .learning import Lora, Machine, Objective, Optimizer, Steps

WINDOW = 64  # GiB


@dataclasses.dataclass(frozen=True)
class BaseModel(Model):
    """The Stable Diffusion model to start from: the one that the cache was encoded with."""

    pretrained_model_name_or_path: str = ""
    """Stable Diffusion 1.x, 2.x or SDXL: a Hub id, a folder in diffusers' layout, or a .safetensors file in the
    original layout. Its UNet is widened to 8 input channels. Default: the one that the cache records."""
    non_ema_revision: str | None = None
    """Revision of the UNet on the Hub, if it is another."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is trained on."""

    cache: tuple[str, ...]
    """Cache folder, written by ip2p-encode; or several that the same model encoded, to train on together. Instead of
    folders there may be urls, of any kind that fsspec reads (`s3:`, `gs:`, `hf:`). With --dataset_name or
    --train_data_dir: where that is encoded to; default: a folder of its own in ~/.cache/ip2p/caches."""
    window: Amount | None = None
    """GiB of the caches that are read at once: of those in an object store, what lies on this machine at a time. Each
    epoch goes through all of them, in the order of a moving window. Default: folders whole, urls with 64 GiB."""
    window_dir: Path = Path("~/.cache/ip2p")
    """Where that lies: best on a disk of this machine. What is left there saves the next run the fetching."""
    verify_cache: bool = False
    """Check every byte of the cache before training, as `ip2p-cache verify` does."""
    cache_weights: tuple[float, ...] = ()
    """Shares of the caches in an epoch, such as 3 1. Default: an epoch holds every sample of all of them once."""
    keep: str | None = None
    """Use only the samples of each cache for which this is true: a condition in SQL's language on the columns of their
    table, with those of `ip2p-encode --keep_columns`, such as "score > 7 and source = 'web'"."""
    max_train_samples: Count | None = None
    """Use only this many samples of each cache, from the first on that --keep keeps."""
    sample_by: Literal["sample", "prompt"] = "sample"
    """`prompt` draws a prompt and then one of its samples, as the original project does; `sample` takes each once."""

    @property
    def room(self) -> float | None:
        """GiB of the window; None where there is none."""
        return self.window or (WINDOW if any(map(is_url, self.cache)) else None)

    def __post_init__(self) -> None:
        if not self.cache:
            raise SettingsError("--cache: expected at least one cache folder")
        places = [place.rstrip("/") if is_url(place) else os.path.realpath(place) for place in self.cache]
        if twice := [place for n, place in enumerate(self.cache) if places[n] in places[:n]]:
            mend = "leave it out; --cache_weights says which share of an epoch each cache has"
            raise SettingsError(f"--cache names {twice[0]} a second time: {mend}")
        if self.window == 0:
            raise SettingsError("--window 0 leaves nothing to train on: expected GiB above 0")
        weights = self.cache_weights
        if weights and (
            len(weights) != len(self.cache) or not (all(weight > 0 for weight in weights) and sum(weights) < math.inf)
        ):
            raise SettingsError(
                f"--cache_weights {' '.join(map(str, weights))}: expected one number above 0 for each --cache "
                f"({' '.join(map(str, self.cache))}), with a finite sum"
            )


@dataclasses.dataclass(frozen=True)
class Saving:
    """What is kept, and where."""

    output_dir: Path
    """Where checkpoints, logs and the finished pipeline go."""
    checkpointing_steps: Count = 500
    """Optimizer steps from one checkpoint to the next."""
    checkpoints_total_limit: Whole = 3
    """Keep only this many checkpoints, the newest; 0 keeps all."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest one with `latest`; `auto` starts anew if there is none.
    With no more --max_train_steps than it has, a pipeline is made of it, in another --output_dir if you like."""
    push_to_hub: bool = False
    """Upload the finished pipeline to the Hub."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the name of the output folder."""
    hub_private_repo: bool = False
    """Let nobody see the repository but its owner."""
    hub_license: str | None = None
    """Licence on the model card, as the Hub calls it, such as creativeml-openrail-m. Default: the base's, where the
    card of that names one."""
    hub_token: str | None = dataclasses.field(default=None, metadata=SECRET)
    """Token for the Hub. Default: that of `hf auth login`. It is written nowhere."""


@dataclasses.dataclass(frozen=True)
class Watching:
    """What is seen of the training."""

    num_validation_samples: Whole = 0
    """Samples of the cache that are held out from training, for a validation loss and validation pictures."""
    val_image_url_or_path: str | None = None
    """Picture to edit for validation: a path or a url."""
    val_image_url: str | None = None
    """The same under the name that diffusers' SD script gives it."""
    validation_prompt: str | None = None
    """Instruction for that picture."""
    num_validation_images: Count = 4
    """Edits of each validation picture, and the most held-out pairs that are drawn."""
    score_samples: Whole = 0
    """Held-out pairs, always the same ones, that each validation edits with the weights and with their average, and
    scores as `ip2p-infer evaluate` does: by L1, L2 and PSNR. Takes the time of so many edits, which is said."""
    clip_model: str | None = None
    """CLIP's folder or Hub id, such as openai/clip-vit-base-patch32, for scores by it; those that need captions are
    there where `ip2p-encode --keep_columns original_prompt edited_prompt` kept some."""
    keep_best: Literal["loss", "l1", "l2", "psnr", "clip_i", "clip_t", "clip_direction"] | None = None
    """Keep the pipeline of the validation that scores best, of --use_ema's average if there is one, in OUTPUT_DIR/best.
    Each checkpoint holds the best one until then as well, as links to the same files. (CLIP's likeness to the
    original is no such score: who edits nothing has the most.)"""
    validation_steps: Count | None = None
    """Optimizer steps from one validation to the next. Default: those of --checkpointing_steps."""
    validation_epochs: Count | None = None
    """The same in passes over the dataset."""
    report_to: str = "tensorboard"
    """Tracker: tensorboard, wandb, comet_ml, all or none. OUTPUT_DIR/metrics.jsonl is written in any case."""
    logging_dir: str = "logs"
    """Folder of tensorboard's files, inside the output folder."""
    logging_steps: Count = 10
    """Optimizer steps over which the reported loss is averaged."""

    @property
    def image(self) -> str | None:
        """Path or url of the picture to edit for validation."""
        return self.val_image_url_or_path or self.val_image_url


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train an InstructPix2Pix UNet from a cache that ip2p-encode made. Given --dataset_name or --train_data_dir, all
    flags of ip2p-encode are taken as well, and what the cache lacks of the dataset is encoded first.
    """

    model: BaseModel
    samples: Samples
    saving: Saving
    steps: Steps = dataclasses.field(default_factory=Steps)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    lora: Lora = dataclasses.field(default_factory=Lora)
    objective: Objective = dataclasses.field(default_factory=Objective)
    machine: Machine = dataclasses.field(default_factory=Machine)
    watching: Watching = Watching()

    __post_init__ = check
    idle = idle

    @classmethod
    def of(cls, **flags: Any) -> "TrainConfig":
        """A configuration by the flags of `ip2p-train`: `TrainConfig.of(cache="cache", …)`; or SettingsError."""
        return configured(cls, "ip2p-train", refused("give it to EncodeConfig, and `encode` comes first"), flags)


def refused(mend: str = "give it there, or a --dataset_name here as well") -> dict[str, str]:
    """Flags that `ip2p-train` does not take, with what to do about them."""
    others = flags_of(EncodeConfig).keys() - flags_of(TrainConfig).keys()
    renamed = {"rank": "is called --lora_rank here"}  # in diffusers' scripts for LoRA
    return NOT_NEEDED | renamed | dict.fromkeys(others, f"belongs to ip2p-encode: {mend}")
