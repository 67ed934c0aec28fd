"""The flags of ip2p-infer that say what edits, and how: the arguments of `Editor` and `Editor.edit`."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ..encode.base.arguments import also
from ..encode.base.errors import SettingsError
from ..encode.base.flags import Count, idle

MODEL, OUTPUT = also("pretrained_model_name_or_path"), also("output_dir")
PRECISION = also("mixed_precision", {"no": "float32", "fp16": "float16", "bf16": "bfloat16"})
"""What the other commands call the model, the place of results, and the precision."""


@dataclasses.dataclass(frozen=True)
class Editing:
    """How pictures are edited."""

    seed: int = 0
    """The k-th picture of each input is drawn with seed + k, wherever the input stands."""
    num_inference_steps: int = 20
    """Denoising steps."""
    image_guidance_scale: float = 1.5
    """How closely to keep to the input picture, from 0 up; below 1 works too."""
    guidance_scale: float = 10.0
    """How closely to follow the prompt, from 0 up."""
    guidance_rescale: float = 0.0
    """0 to 1: pulls back the contrast that guidance adds; for models with zero terminal SNR, about 0.7."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps between which guidance acts; outside, a step takes a third of the time (arXiv 2404.07724)."""
    negative_prompt: str | None = None
    """What to steer away from."""
    resolution: int | None = None
    """Long side in pixels while editing, a multiple of 8; default: the trained one. Outputs have their input's size."""
    batch_size: Count = 4
    """Pictures edited at once; changes the speed alone."""

    @property
    def described(self) -> str:
        """Steps and scales, as results are reported with."""
        scales = f"image guidance {self.image_guidance_scale:g}, text guidance {self.guidance_scale:g}"
        return f"{self.num_inference_steps} steps, {scales}"

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        if self.image_guidance_scale == self.guidance_scale == 1:
            of_guidance = ("negative_prompt", "guidance_rescale", "guidance_interval")
            yield from idle(self, "acts by guidance: raise --guidance_scale", *of_guidance)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights of a model, and what is added to them."""

    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    lora: tuple[str, ...] = ()
    """Folder or folders that ip2p-train saved with --lora_rank, whose adapters are added to each model (pip install
    peft): the one that they were trained from, which may be a plain Stable Diffusion."""
    lora_weights: tuple[float, ...] = ()
    """What adapters are multiplied by, one number for each --lora. Default: 1."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads."""

    def __post_init__(self) -> None:
        given = self.lora_weights
        if self.lora and given and not (len(given) == len(self.lora) and all(map(math.isfinite, given))):
            shown, folders = " ".join(map(str, given)), " ".join(self.lora)
            raise SettingsError(f"--lora_weights {shown}: expected one finite number for each --lora ({folders})")

    def idle(self, models: Iterable[str]) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        if all(map(os.path.exists, models)):
            yield from idle(self, f"is for models on the Hub, not for {' or '.join(models)}: leave it out", "revision")
        if not self.lora:
            yield from idle(self, "belongs to --lora: add that, or leave it out", "lora_weights")


SCALES = ("num_inference_steps", "image_guidance_scale", "guidance_scale")
PRESETS: dict[str, dict[str, float]] = {
    "guide": {name: getattr(Editing, name) for name in SCALES},
    "paper": dict(zip(SCALES, (100, 1.5, 7.5), strict=True)),
}
"""Steps and scales of diffusers' guide, with which `ip2p-infer` edits, and of the paper, with which `evaluate` does."""
Preset = Literal["guide", "paper"]


@dataclasses.dataclass(frozen=True)
class Loading(Weights):
    """How a model is loaded."""

    device: str | None = None
    """cuda, mps, cpu …; default: the accelerator if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = dataclasses.field(default=None, metadata=PRECISION)
    """Or --mixed_precision no, fp16, bf16. Default: float16 on CUDA, float32 elsewhere."""
    scheduler: str | None = None
    """diffusers' class name of another scheduler, such as DDIM or EulerAncestralDiscrete."""
