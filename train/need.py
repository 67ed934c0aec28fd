"""What a step needs of a GPU's memory, said before the UNet is loaded; and where it does not fit, which flags would."""

import functools
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..encode.base.console import say
from ..encode.base.errors import SettingsError
from ..encode.base.flags import changed
from ..encode.cache.format import Cache
from ..encode.cache.reader import Reader
from ..encode.cache.remote import open_caches
from ..encode.models.checkpoint import Checkpoint
from ..encode.models.encoders import DTYPES
from ..encode.models.parts import read_config
from .config import TrainConfig
from .memory import Passes, Shapes, simulate
from .setup import base_checkpoint
from .unet.rounding import BLOCK
from .unet.weights import choose_precision

GIB = 2**30
LIBRARIES = 0.7 * GIB  # bytes of CUDA's context, and what its libraries work in
FRAGMENTS = 0.07  # share of the memory in free pieces too small to be used
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB


class Need(NamedTuple):
    """Bytes at the peak of a step."""

    weights: int  # and masters behind them
    moments: int
    average: int
    passes: int  # activations and gradients
    text: int  # weights of the text encoders, where they embed instructions in training

    @property
    def card(self) -> float:
        """Bytes of a GPU on which that fits, with what it holds besides."""
        return (sum(self) + LIBRARIES) / (1 - FRAGMENTS)


class Model(NamedTuple):
    """What a run trains: the configuration of the UNet, and the shapes in the cache."""

    unet: Mapping[str, Any]
    shapes: Shapes
    text: int = 0  # bytes of the text encoders that run beside it

    @classmethod
    def of(cls, base: Checkpoint, reader: Reader) -> "Model":
        """From the files of a checkpoint and of a cache."""
        found = {name: array.row_shape for name, array in reader.arrays.items()}
        channels, height, width = reader.largest
        shapes = Shapes((2 * channels, height, width), found["text"], *found.get("pooled", ()))  # type: ignore[arg-type]
        return cls(read_config(base.folder / "unet", "unet"), shapes, text_bytes(base, reader.caches[0]))


def text_bytes(base: Checkpoint, cache: Cache) -> int:
    """Bytes of the weights of the text encoders that training on a cache needs."""
    if cache.holds_text:
        return 0
    numbers = 0
    with torch.device("meta"):
        for part in base.text_encoders:
            kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            network = kind(CLIPTextConfig.from_dict(read_config(base.folder / part, part)))
            numbers += sum(weight.numel() for weight in network.parameters())
    return numbers * DTYPES[cache.manifest["encoding"]["mixed_precision"]].itemsize


def estimate(config: TrainConfig) -> None:
    """For --estimate: print what a step of this model on these pictures needs, as it is and with other flags."""
    caches = open_caches(config.samples.cache, config.samples.window_dir)
    base = base_checkpoint(config, caches[0], Accelerator(cpu=True))
    model = Model.of(base, Reader(*caches, window=config.samples.room))
    height, width = (base.vae_scale_factor * side for side in model.shapes.latents[1:])
    batch = config.steps.train_batch_size
    say(f"GiB of a GPU's memory at the peak of a step, for {width} x {height} px, {batch} samples in a batch:")
    say(" ".join(f"{name:>8}" for name in (*Need._fields, "in all", "card of")) + "  with")
    for flags, other in changes(config):
        need = needed(other, model)
        figures = " ".join(f"{part / GIB:8.2f}" for part in (*need, sum(need)))
        card = next((f"{size} GB" for size in CARDS if need.card <= size * GIB), "none")
        say(f"{figures} {card:>8}  {flags or 'the flags that are given'}")


def check_memory(config: TrainConfig, base: Checkpoint, reader: Reader, device: torch.device) -> None:
    """Say what a step needs beside what the GPU has; raises SettingsError where it does not fit, with what would."""
    if device.type != "cuda" or config.machine.ignore_memory:
        return
    model, free = Model.of(base, reader), torch.cuda.mem_get_info(device)[0]
    need = needed(config, model)
    parts = ", ".join(f"{name} {part / GIB:.1f}" for name, part in need._asdict().items())
    told = f"a step needs about {need.card / GIB:.1f} GiB of the GPU's memory ({parts})"
    say(f"{told}; {free / GIB:.1f} GiB are free")
    if need.card <= free:
        return
    fit = next((flags for flags, other in changes(config) if flags and needed(other, model).card <= free), None)
    mend = f"it would fit with {fit}" if fit else "no flags make it fit"
    raise SettingsError(f"{told}, and {free / GIB:.1f} GiB are free: {mend}; --ignore_memory begins all the same")


def changes(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """The flags of a run, then with one change more each time, of which the first ones cost least; and LoRA."""
    yield "", config
    whole, taken, batches = config, "", config.steps.train_batch_size * config.steps.gradient_accumulation_steps
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--gradient_checkpointing", {"gradient_checkpointing": True}),
        ("--ema_device cpu", {"ema_device": "cpu"} if config.optimizer.use_ema else {}),
        ("--mixed_precision bf16 --weights bf16", {"weights": "bf16", "mixed_precision": "bf16"}),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"} if config.optimizer.name == "adamw" else {}),
        (f"--train_batch_size 1 --gradient_accumulation_steps {batches}", smaller(config)),
    ]
    for flags, values in steps if not config.lora.lora_rank else steps[:2] + steps[4:]:
        other = changed(whole, **values)
        if other != whole:
            whole, taken = other, f"{taken} {flags}".lstrip()
            yield taken, whole
    if not config.lora.lora_rank and importlib.util.find_spec("peft"):  # without it no adapters can be simulated
        adapters = {"lora_rank": 16, "gradient_checkpointing": True, "mixed_precision": "bf16", "weights": "fp32"}
        yield (
            "--lora_rank 16 --mixed_precision bf16 --gradient_checkpointing",
            changed(config, optimizer="adamw", **adapters),
        )


def smaller(config: TrainConfig) -> dict[str, Any]:
    """The flags with which one sample at a time makes the same steps; none where gradients are not summed."""
    steps = config.steps
    if config.optimizer.fused_backward:
        return {}
    return {
        "train_batch_size": 1,
        "gradient_accumulation_steps": steps.train_batch_size * steps.gradient_accumulation_steps,
    }


def needed(config: TrainConfig, model: Model) -> Need:
    """What a step of a run on a GPU needs."""
    flags, machine, precision = config.optimizer, config.machine, choose_precision(config, cuda=True)
    found = _simulated(
        json.dumps(model.unet),
        model.shapes,
        config.steps.train_batch_size,
        precision._replace(copies=precision.half is not None, rounded=False),
        checkpointing=machine.gradient_checkpointing,
        drop=flags.fused_backward,
        summed=config.steps.gradient_accumulation_steps > 1,
        norms=not machine.compile,
        lora=config.lora if config.lora.lora_rank else None,
    )
    masters = 4 * found.numbers if precision.rounded else 0  # which copies have behind them, and rounded weights do not
    average = 4 * found.numbers if flags.use_ema and not flags.ema_device else 0
    kept = moments(found, flags.name, rounded=precision.rounded)
    return Need(found.static - masters, kept, average, found.peak, model.text)


@functools.cache
def _simulated(unet: str, *args: Any, **how: Any) -> Passes:
    """The same passes only once, which take seconds."""
    return simulate(json.loads(unet), *args, **how)


def moments(found: Passes, optimizer: str, *, rounded: bool) -> int:
    """Bytes of what an optimizer keeps of the weights that are trained (`unet/optimizers.py`)."""
    if optimizer == "adamw":
        return (4 if rounded else 8) * found.numbers
    if optimizer == "adamw8bit":
        return sum(2 * (math.prod(shape) + 4 * -(-math.prod(shape) // BLOCK)) for shape in found.trained)
    return sum(4 * (shape[0] + math.prod(shape[1:]) if shape[1:] else shape[0]) for shape in found.trained)
