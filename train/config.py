"""The flags of `ip2p-train`."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from ..encode.base.errors import SettingsError
from ..encode.base.flags import dump
from ..encode.config import PER_SAMPLE, EncodeConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train an InstructPix2Pix UNet from a cache that ip2p-encode made."""

    pretrained_model_name_or_path: str
    """Stable Diffusion to start from, the one that the cache was encoded with: a Hub id, a folder or a .safetensors
    file. A base with 4 input channels is widened to 8; one that has 8 already is continued."""
    cache: tuple[Path, ...]
    """Cache folder, written by ip2p-encode; or several that the same model encoded, to be trained on together."""
    output_dir: Path
    """Where checkpoints, logs and the finished pipeline go."""
    revision: str | None = None
    """Revision of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """The other VAE that the cache was encoded with, if there was one and it has moved. Default: as recorded there."""
    single_file_config: str | None = None
    """For a single file: folder or Hub id of a model of its kind, if it moved. Default: as recorded in the cache."""
    non_ema_revision: str | None = None
    """Revision of the UNet on the Hub, if it is another."""
    cache_dir: Path | None = None
    """Where huggingface_hub keeps downloads."""
    verify_cache: bool = False
    """Check every byte of the cache before training, as `ip2p-cache verify` does."""
    cache_weights: tuple[float, ...] = ()
    """Shares of the caches in an epoch, such as 3 1. Default: an epoch holds every sample of all of them once."""
    max_train_samples: int | None = None
    """Use only this many samples of each cache, from the first on."""
    sample_by: Literal["sample", "prompt"] = "sample"
    """`prompt` draws a prompt and then one of its samples, as the original project does; `sample` takes each once."""
    seed: int | None = None
    """Decides order, noise, timesteps and dropout. Without one, a seed is drawn and recorded."""
    train_batch_size: int = 16
    """Samples in one batch of one process."""
    num_train_epochs: int = 100
    """Passes over the dataset, unless --max_train_steps is given."""
    max_train_steps: int | None = None
    """Optimizer steps in all."""
    gradient_accumulation_steps: int = 1
    """Batches in one optimizer step."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    learning_rate: float = 1e-4
    """Learning rate after the warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size, accumulation steps and processes."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Schedule of the learning rate, counted in optimizer steps."""
    lr_warmup_steps: int = 500
    """Optimizer steps over which the learning rate rises; `constant` has none."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    use_8bit_adam: bool = False
    """Keep Adam's moments in 8 bits; needs bitsandbytes."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""
    conditioning_dropout_prob: tuple[float, ...] = (0.05,)
    """Probability of dropping the instruction alone, both conditions, and the image alone: one number for all three,
    or three. Classifier-free guidance needs it (section 3.2.1 of the InstructPix2Pix paper)."""
    snr_gamma: float | None = None
    """Weigh timesteps by min-SNR with this clip; its paper recommends 5."""
    noise_offset: float = 0.0
    """Strength of noise that a whole channel shares, such as 0.1."""
    rescale_betas_zero_snr: bool = False
    """Let the noise schedule end in pure noise; for models with v-prediction."""
    use_ema: bool = False
    """Average the weights over time, and save the average."""
    ema_decay: float = 0.9999
    """Largest decay of the average; early on it is (1 + step) / (10 + step)."""
    ema_steps: int = 1
    """Optimizer steps from one update of the average to the next."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward and backward pass. Default: that of accelerate's own configuration."""
    allow_tf32: bool = True
    """Let what stays in float32 use the TF32 format on NVIDIA GPUs; --no_allow_tf32 for full float32."""
    deterministic: bool = False
    """Use kernels on the GPU that give the same bits each time, so that a resumed run equals an undisturbed one there
    as well; they are slower. On a CPU it is so in any case."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention by xformers instead of PyTorch."""
    compile: bool = False
    """Compile the UNet with torch.compile: some minutes at the start, faster steps after that. Its first gradients are
    compared with those of the uncompiled UNet."""
    checkpointing_steps: int = 500
    """Optimizer steps from one checkpoint to the next."""
    checkpoints_total_limit: int = 3
    """Keep only this many checkpoints, the newest; 0 keeps all."""
    num_validation_samples: int = 0
    """Samples of the cache that are held out from training, for a validation loss and validation pictures."""
    val_image_url_or_path: str | None = None
    """Picture to edit for validation: a path or a url."""
    val_image_url: str | None = None
    """The same under the name that diffusers' SD script gives it."""
    validation_prompt: str | None = None
    """Instruction for that picture."""
    num_validation_images: int = 4
    """Edits of each validation picture, and the most held-out pairs that are drawn."""
    validation_steps: int | None = None
    """Optimizer steps from one validation to the next. Default: those of --checkpointing_steps."""
    validation_epochs: int | None = None
    """The same in passes over the dataset."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest one with `latest`; `auto` starts anew if there is none."""
    report_to: str = "tensorboard"
    """Tracker: tensorboard, wandb, comet_ml, all or none. OUTPUT_DIR/metrics.jsonl is written in any case."""
    logging_dir: str = "logs"
    """Folder of the tracker, inside the output folder."""
    logging_steps: int = 10
    """Optimizer steps over which the reported loss is averaged."""

    push_to_hub: bool = False
    """Upload the finished pipeline to the Hub."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the name of the output folder."""
    hub_token: str | None = None
    """Token for the Hub. Default: that of `hf auth login`. It is written nowhere."""

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "checkpointing_steps"):
            self._at_least(1, name)
        for name in ("max_train_steps", "max_train_samples", "logging_steps", "ema_steps"):
            self._at_least(1, name)
        for name in ("num_validation_images", "validation_steps", "validation_epochs"):
            self._at_least(1, name)
        for name in (
            "seed",
            "lr_warmup_steps",
            "learning_rate",
            "max_grad_norm",
            "snr_gamma",
            "noise_offset",
            "num_validation_samples",
            "checkpoints_total_limit",
        ):
            self._at_least(0, name)
        if not self.cache:
            raise SettingsError("--cache: expected at least one cache folder")
        weights = self.cache_weights
        if weights and (len(weights) != len(self.cache) or not all(0 < weight < math.inf for weight in weights)):
            raise SettingsError(
                f"--cache_weights {' '.join(map(str, weights))}: expected one number above 0 for each --cache "
                f"({' '.join(map(str, self.cache))})"
            )
        if not 0 <= self.ema_decay <= 1:
            raise SettingsError(f"--ema_decay {self.ema_decay}: expected a number from 0 to 1")
        dropout = self.conditioning_dropout_prob
        if len(dropout) not in (1, 3) or min(dropout) < 0 or sum(self.dropout) > 1 + 1e-9:
            raise SettingsError(
                f"--conditioning_dropout_prob {' '.join(map(str, dropout))}: expected one number from 0 to 1/3, "
                "or three that sum to at most 1"
            )

    def _at_least(self, least: int, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise SettingsError(f"--{name} {value}: expected {least} or more")

    def dump(self) -> dict[str, object]:
        """The resolved configuration as plain values, without secrets; a single cache is one value, not a list."""
        caches = [str(folder) for folder in self.cache]
        return dump(self) | {"cache": caches[0] if len(caches) == 1 else caches}

    @property
    def validation_image(self) -> str | None:
        """Path or url of the picture to edit for validation."""
        return self.val_image_url_or_path or self.val_image_url

    def validation_every(self, steps_per_epoch: float) -> int:
        """Optimizer steps from one validation to the next; 0 for none."""
        if not (self.num_validation_samples or self.validation_image):
            return 0
        if self.validation_epochs:
            return max(1, round(self.validation_epochs * steps_per_epoch))
        return self.validation_steps or self.checkpointing_steps

    @property
    def dropout(self) -> tuple[float, float, float]:
        """Probabilities of dropping the instruction alone, both, and the image alone."""
        first, *rest = self.conditioning_dropout_prob
        both, image = rest or (first, first)
        return first, both, image


def refused() -> dict[str, str]:
    """Flags that `ip2p-train` does not take, with what to do about them."""
    mine = {field.name for field in dataclasses.fields(TrainConfig)}
    others = {field.name for field in dataclasses.fields(EncodeConfig)} - mine
    return PER_SAMPLE | dict.fromkeys(others, "belongs to ip2p-encode: give it there")
