"""What a run needs of a GPU's memory, said before the UNet is loaded; and where it does not fit, which flags would."""

import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..encode.base.console import say
from ..encode.base.errors import CacheMismatch, SettingsError
from ..encode.base.flags import changed
from ..encode.cache.reader import Reader
from ..encode.cache.remote import open_caches
from ..encode.config import EncodeConfig
from ..encode.geometry import check_resolution, geometry_of
from ..encode.models.checkpoint import Checkpoint, find_checkpoint
from ..encode.models.encoders import DTYPES
from ..encode.models.judge import clip_bytes
from ..encode.models.parts import read_config
from .config import TrainConfig
from .memory import Passes, Shapes, simulate
from .setup import base_checkpoint, with_model
from .unet.rounding import BLOCK
from .unet.weights import Precision, choose_precision
from .watch.frozen import Frozen, simulate_picture

GIB = 2**30
LIBRARIES = 0.7 * GIB  # bytes of CUDA's context, and what its libraries work in
FRAGMENTS = 0.07  # share of the memory in free pieces too small to be used
WIDTH = len("activations")
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB


class Need(NamedTuple):
    """Bytes at the peaks of a run: of a step, and of a validation, when gradients and activations are gone."""

    weights: int  # and masters behind them
    moments: int
    average: int
    text: int  # weights of the text encoders, where they embed instructions in training
    gradients: int
    activations: int  # and whatever else a step takes beside all gradients
    validation: int  # what draws pictures, or CLIP, which sees them then, beside the UNet

    @property
    def most(self) -> int:
        """Bytes at the higher peak."""
        stays = self.weights + self.moments + self.average + self.text
        return stays + max(self.gradients + self.activations, self.validation)

    @property
    def card(self) -> float:
        """Bytes of a GPU on which that fits, with what it holds besides."""
        return (self.most + LIBRARIES) / (1 - FRAGMENTS)


class Model(NamedTuple):
    """What a run trains and draws with: configurations, and the shapes of what is cached."""

    unet: Mapping[str, Any]
    shapes: Shapes
    frozen: Frozen
    text: int = 0  # bytes of the text encoders that run beside it

    @classmethod
    def of(cls, base: Checkpoint, reader: Reader) -> "Model":
        """From the files of a checkpoint and of a cache."""
        found: dict[str, Any] = {name: array.row_shape for name, array in reader.arrays.items()}
        length, size, _ = base.text_shape()
        channels, height, width = reader.largest
        if (channels, *found["text"]) != (base.latent_channels, length, size):
            was, asked = f"text of {found['text'][1]} numbers", f"{base.folder} takes {size}"
            raise CacheMismatch(f"{reader.caches[0].folder} holds {was}, and {asked}: give the model that encoded it")
        precision = reader.caches[0].manifest["encoding"]["mixed_precision"]
        return cls._of(base, (height, width), embeds=None if reader.holds_text else precision)

    @classmethod
    def planned(cls, base: Checkpoint, encoding: EncodeConfig) -> "Model":
        """From the files of a checkpoint, and the flags by which a dataset is to be encoded: nothing of it is read."""
        check_resolution(geometry_of(encoding), base.vae_scale_factor)
        run = encoding.run
        side = encoding.pictures.resolution // base.vae_scale_factor  # of several shapes the square is the largest
        return cls._of(base, (side, side), embeds=None if run.cache_text else run.mixed_precision)

    @classmethod
    def _of(cls, base: Checkpoint, sides: tuple[int, int], *, embeds: str | None) -> "Model":
        """Of latents of these sides; `embeds` is the precision of text encoders that run beside it, if they do."""
        length, size, pooled = base.text_shape()
        shapes, frozen = Shapes((2 * base.latent_channels, *sides), (length, size), pooled), Frozen.of(base)
        text = sum(frozen.text_weights()) * DTYPES[embeds].itemsize if embeds else 0
        return cls(read_config(base.folder / "unet", "unet"), shapes, frozen, text)


def estimate(config: TrainConfig, encoding: EncodeConfig | None = None) -> None:
    """For --estimate: print what a run of this model on these pictures needs, as it is and with other flags.

    With an `encoding` the caches need not be there.
    """
    if encoding:
        model = Model.planned(base := find_checkpoint(encoding.model, weights=False), encoding)
    else:
        caches = open_caches(config.samples.cache, config.samples.window_dir)
        config = with_model(config, caches[0])
        base = base_checkpoint(config, caches[0])
        model = Model.of(base, Reader(*caches, window=config.samples.room))
    height, width = (base.vae_scale_factor * side for side in model.shapes.latents[1:])
    batch = config.steps.train_batch_size
    say(f"GiB of a GPU's memory at the most, for {width} x {height} px, batches of {batch}:")
    say(" ".join(f"{name:>{WIDTH}}" for name in (*Need._fields, "in all", "card of")) + "  with")
    for flags, other in changes(config):
        need = needed(other, model)
        figures = " ".join(f"{part / GIB:{WIDTH}.2f}" for part in (*need, need.most))
        card = next((f"{size} GB" for size in CARDS if need.card <= size * GIB), "none")
        say(f"{figures} {card:>{WIDTH}}  {flags or 'the flags that are given'}")


def check_memory(config: TrainConfig, base: Checkpoint, reader: Reader, device: torch.device) -> None:
    """Say what a run needs beside what the GPU has; raises SettingsError where it does not fit, with what would."""
    if device.type != "cuda" or config.machine.ignore_memory:
        return
    model, free = Model.of(base, reader), torch.cuda.mem_get_info(device)[0]
    need = needed(config, model)
    parts = ", ".join(f"{name} {part / GIB:.1f}" for name, part in need._asdict().items())
    told = f"this run needs about {need.card / GIB:.1f} GiB of the GPU's memory ({parts})"
    say(f"{told}; {free / GIB:.1f} GiB are free")
    if need.card <= free:
        return
    fit = next((flags for flags, other in changes(config) if flags and needed(other, model).card <= free), None)
    mend = f"it would fit with {fit}" if fit else "no flags make it fit"
    if not fit and need._replace(validation=0).card <= free:
        mend = "it would fit without --num_validation_samples and --val_image_url_or_path"
    raise SettingsError(f"{told}, and {free / GIB:.1f} GiB are free: {mend}; --ignore_memory begins all the same")


def changes(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """The flags of a run, then with one change more each time, of which the first ones cost least; and LoRA."""
    yield "", config
    whole, taken, batches = config, "", config.steps.train_batch_size * config.steps.gradient_accumulation_steps
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--gradient_checkpointing", {"gradient_checkpointing": True}),
        ("--ema_device cpu", {"ema_device": "cpu"} if config.optimizer.averages else {}),
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
    """What a run on a GPU needs."""
    flags, machine, precision = config.optimizer, config.machine, choose_precision(config, cuda=True)
    how = precision._replace(copies=precision.half is not None, rounded=False)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # then gradients are never gone
    found = _simulated(
        json.dumps(model.unet),
        model.shapes,
        config.steps.train_batch_size,
        how,
        checkpointing=machine.gradient_checkpointing,
        drop=flags.fused_backward,
        summed=several or config.steps.gradient_accumulation_steps > 1,
        norms=not machine.compile,
        lora=config.lora if config.lora.lora_rank else None,
    )
    masters = 4 * found.numbers if precision.rounded else 0  # which copies have behind them, and rounded weights do not
    average = 0 if flags.ema_device else 4 * found.numbers * flags.averages
    gradients = 0 if flags.fused_backward else (2 if precision.half else 4) * found.numbers
    validation, clip = 0, config.watching.clip_model
    if config.watching.image or config.watching.num_validation_samples:
        drawn = _simulated_picture(json.dumps(model), how, norms=not machine.compile)
        # CLIP comes when the pictures are made.
        validation = max(drawn, clip_bytes(clip, config.model.cache_dir) if clip else 0) + several * gradients
    kept = moments(found, flags.name, rounded=precision.rounded)
    return Need(found.static - masters, kept, average, model.text, gradients, found.peak - gradients, validation)


@functools.cache
def _simulated(unet: str, *args: Any, **how: Any) -> Passes:
    """The same passes only once, which take seconds."""
    return simulate(json.loads(unet), *args, **how)


@functools.cache
def _simulated_picture(model: str, precision: Precision, *, norms: bool) -> int:
    unet, shapes, frozen, _ = json.loads(model)
    return simulate_picture(Frozen(*frozen), unet, Shapes(*shapes), precision, norms=norms)


def moments(found: Passes, optimizer: str, *, rounded: bool) -> int:
    """Bytes of what an optimizer keeps of the weights that are trained (`unet/optimizers.py`)."""
    if optimizer == "adamw":
        return (4 if rounded else 8) * found.numbers
    if optimizer == "adamw8bit":
        return sum(2 * (math.prod(shape) + 4 * -(-math.prod(shape) // BLOCK)) for shape in found.trained)
    return sum(4 * (shape[0] + math.prod(shape[1:]) if shape[1:] else shape[0]) for shape in found.trained)
