"""The flags of `ip2p-train` that say how it learns, in groups."""

import dataclasses
from typing import Annotated, Literal

from ..encode.base.errors import SettingsError
from ..encode.base.flags import Amount, AtLeast, Count, Whole

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


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
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw8bit keeps moments in 8 bits, a quarter of their memory; adafactor only sums of their rows and columns."""
    use_8bit_adam: bool = False
    """The same as --optimizer adamw8bit."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights that are trained. bf16 rounds them and AdamW's moments at random: half the memory."""
    fused_backward: bool = False
    """Change each weight as soon as its gradient is there, inside the backward pass, so that none has to be kept."""
    max_grad_norm: Amount = 1.0
    """Norm to which gradients are clipped; `inf` leaves them."""
    use_ema: bool = False
    """Average the weights over time, and save the average."""
    ema_decay: float = 0.9999
    """Largest decay of the average; early on it is (1 + step) / (10 + step)."""
    ema_steps: Count = 1
    """Optimizer steps from one update of averages to the next."""
    ema_device: Literal["cpu"] | None = None
    """`cpu` keeps averages in the host's memory, where an update takes longer. Default: beside the weights."""
    ema_power: bool = False
    """Track two more averages, and keep eight snapshots of them, of which --ema_length makes others (EDM2, arXiv
    2312.02696)."""
    ema_length: float | None = None
    """Save the average of this length, a standard deviation as a share of the training: 0.03 to 0.2, best 0.05 to 0.1.
    With --resume_from_checkpoint latest, a finished run saves another one, and trains nothing."""

    @property
    def averages(self) -> int:
        """How many averages of the weights there are."""
        return self.use_ema + 2 * self.ema_power

    @property
    def name(self) -> str:
        """The optimizer, whichever flag names it."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer


@dataclasses.dataclass(frozen=True)
class Lora:
    """Training small adapters instead of all weights (LoRA, arXiv 2106.09685); needs pip install peft."""

    lora_rank: Count | None = None
    """Train adapters of this rank, such as 16, beside the frozen UNet; `conv_in` always gets one of full rank."""
    lora_targets: Literal["attn", "all"] = "attn"
    """Layers that get an adapter: those of attention, or all of the UNet's blocks."""
    lora_alpha: Count | None = None
    """Strength: what adapters add is multiplied by alpha / rank. Default: the rank."""

    @property
    def alpha(self) -> int | None:
        """The strength, which is the rank unless it was given."""
        return self.lora_alpha or self.lora_rank

    @property
    def described(self) -> str:
        """The flags that a checkpoint was trained with and must be gone on with."""
        if not self.lora_rank:
            return "all weights (no --lora_rank)"
        return f"--lora_rank {self.lora_rank} --lora_targets {self.lora_targets} --lora_alpha {self.alpha}"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the UNet learns."""

    conditioning_dropout_prob: tuple[float, ...] = (0.05,)
    """Probability of dropping instruction, both conditions, image: three or one for all. Guidance needs it."""
    snr_gamma: Amount | None = None
    """Weigh timesteps by min-SNR with this clip; its paper recommends 5."""
    noise_offset: Amount = 0.0
    """Strength of noise that a whole channel shares, such as 0.1."""
    edit_weight: Annotated[float, AtLeast(1)] = 1.0
    """How much more an error counts where the edit is than elsewhere, by the masks in the cache, else by its latents; 1
    counts all alike."""
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
    ignore_memory: bool = False
    """Begin without asking what a step needs of the GPU's memory, which takes some seconds."""
    estimate: bool = False
    """Print what a step needs of a GPU's memory, with these flags and with others, and train nothing. Needs no GPU."""
    deterministic: bool = False
    """Use slower GPU kernels that give the same bits each time, as those of a CPU do: a resumed run is then exact."""
