"""The flags of `ip2p-train`, in groups."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from ..encode.base.errors import SettingsError
from ..encode.base.flags import SECRET, Amount, Count, Whole, flags_of
from ..encode.config import PER_SAMPLE, EncodeConfig, Model
from .demands import check, idle

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclasses.dataclass(frozen=True)
class BaseModel(Model):
    """The Stable Diffusion model to start from: the one that the cache was encoded with."""

    non_ema_revision: str | None = None
    """Revision of the UNet on the Hub, if it is another."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is trained on."""

    cache: tuple[Path, ...]
    """Cache folder, written by ip2p-encode; or several that the same model encoded, to train on together."""
    verify_cache: bool = False
    """Check every byte of the cache before training, as `ip2p-cache verify` does."""
    cache_weights: tuple[float, ...] = ()
    """Shares of the caches in an epoch, such as 3 1. Default: an epoch holds every sample of all of them once."""
    max_train_samples: Count | None = None
    """Use only this many samples of each cache, from the first on."""
    sample_by: Literal["sample", "prompt"] = "sample"
    """`prompt` draws a prompt and then one of its samples, as the original project does; `sample` takes each once."""

    def __post_init__(self) -> None:
        if not self.cache:
            raise SettingsError("--cache: expected at least one cache folder")
        weights = self.cache_weights
        if weights and (len(weights) != len(self.cache) or not all(0 < weight < math.inf for weight in weights)):
            raise SettingsError(
                f"--cache_weights {' '.join(map(str, weights))}: expected one number above 0 for each --cache "
                f"({' '.join(map(str, self.cache))})"
            )


@dataclasses.dataclass(frozen=True)
class Steps:
    """How long, and on how much at once."""

    train_batch_size: Count = 16
    """Samples in one batch of one process."""
    gradient_accumulation_steps: Count = 1
    """Batches in one optimizer step."""
    num_train_epochs: Count = 100
    """Passes over the dataset, unless --max_train_steps is given."""
    max_train_steps: Count | None = None
    """Optimizer steps in all."""
    seed: Whole | None = None
    """Decides order, noise, timesteps and dropout. Without one, a seed is drawn and recorded."""

    def samples(self, processes: int) -> int:
        """Samples that all processes see in an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the weights change."""

    learning_rate: Amount = 1e-4
    """Learning rate after the warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size, accumulation steps and processes."""
    lr_scheduler: Schedule = "constant"
    """Schedule of the learning rate, counted in optimizer steps."""
    lr_warmup_steps: Whole = 500
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
    max_grad_norm: Amount = 1.0
    """Norm to which gradients are clipped; `inf` leaves them."""
    use_ema: bool = False
    """Average the weights over time, and save the average."""
    ema_decay: float = 0.9999
    """Largest decay of the average; early on it is (1 + step) / (10 + step)."""
    ema_steps: Count = 1
    """Optimizer steps from one update of the average to the next."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the UNet learns."""

    conditioning_dropout_prob: tuple[float, ...] = (0.05,)
    """Probability of dropping instruction, both conditions, image: three or one for all. Guidance needs it."""
    snr_gamma: Amount | None = None
    """Weigh timesteps by min-SNR with this clip; its paper recommends 5."""
    noise_offset: Amount = 0.0
    """Strength of noise that a whole channel shares, such as 0.1."""
    rescale_betas_zero_snr: bool = False
    """Let the noise schedule end in pure noise; for models with v-prediction."""

    def __post_init__(self) -> None:
        given = self.conditioning_dropout_prob
        if len(given) not in (1, 3) or min(given) < 0 or sum(self.dropout) > 1 + 1e-9:
            raise SettingsError(
                f"--conditioning_dropout_prob {' '.join(map(str, given))}: expected one number from 0 to 1/3, "
                "or three that sum to at most 1"
            )

    @property
    def dropout(self) -> tuple[float, float, float]:
        """Probabilities of dropping the instruction alone, both conditions, and the image alone."""
        text, both, image = self.conditioning_dropout_prob * (1 if len(self.conditioning_dropout_prob) == 3 else 3)
        return text, both, image


@dataclasses.dataclass(frozen=True)
class Machine:
    """How it is computed."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward and backward pass. Default: that of accelerate's own configuration."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    compile: bool = False
    """Compile the UNet: some minutes at the start, faster steps after that. Its first gradients are checked."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention by xformers instead of PyTorch."""
    allow_tf32: bool = True
    """Let what stays in float32 use the TF32 format on NVIDIA GPUs; --no_allow_tf32 for full float32."""
    deterministic: bool = False
    """Use slower GPU kernels that give the same bits each time, as those of a CPU do: a resumed run is then exact."""


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
    """Train an InstructPix2Pix UNet from a cache that ip2p-encode made."""

    model: BaseModel
    samples: Samples
    saving: Saving
    steps: Steps = Steps()
    optimizer: Optimizer = Optimizer()
    objective: Objective = Objective()
    machine: Machine = Machine()
    watching: Watching = Watching()

    __post_init__ = check
    idle = idle


def refused() -> dict[str, str]:
    """Flags that `ip2p-train` does not take, with what to do about them."""
    others = flags_of(EncodeConfig).keys() - flags_of(TrainConfig).keys()
    return PER_SAMPLE | dict.fromkeys(others, "belongs to ip2p-encode: give it there")
