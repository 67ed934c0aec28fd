"""Looks at a model in training from outside: its loss with fixed noise on held-out samples, edited pictures, scores.

Nothing of it touches the run: it has its own seed, and weights with and without validation are equal bit for bit.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.utils import load_image
from PIL import Image

from ...encode.base.console import say
from ...encode.base.errors import SettingsError, reason
from ...encode.cache.reader import Reader
from ...encode.cached import Samples
from ...encode.data.sheet import contact_sheet
from ...encode.models.checkpoint import Checkpoint
from ...infer.drawing.denoise import TooLarge
from ...infer.edit import Editor
from ...infer.score.metrics import Edit
from ..config import TrainConfig, Watching
from ..data.batches import gather
from ..data.text import Texts
from ..objective import Objective
from ..save.pipeline import make_pipeline
from ..unet.update import Update
from .frozen import KnownTexts, encode, half, load_vae
from .score import Scores

BANDS = 4  # of timesteps, for which the loss is reported separately
SEED = 0
FULL = torch.OutOfMemoryError, TooLarge  # what ends no run


@dataclasses.dataclass(frozen=True)
class Validation:
    """What is looked at every `validation_every` steps; nothing if the flags ask for nothing."""

    config: TrainConfig
    accelerator: Accelerator
    checkpoint: Checkpoint  # the base model, whose frozen parts draw the pictures
    reader: Reader
    objective: Objective
    held_out: Samples
    texts: Texts | None  # embeds instructions, where the caches do not hold that

    def __post_init__(self) -> None:
        _ = self.picture, self.scores  # what is wrong with them is said before hours of training

    def run(self, step: int, unet: torch.nn.Module, update: Update) -> dict[str, float]:
        """Losses and scores, raw and averaged; and pictures, drawn with the weights that would be saved."""
        model: Any = self.accelerator.unwrap_model(unet)
        model.eval()
        kinds = {"": None, "ema_": update.average} if update.average else {"": None}
        values, edits, seconds = dict[str, float](), dict[str, list[Edit]](), 0.0
        # What a compiled UNet meets here, other batch sizes and no gradients, it would have to be compiled for anew.
        eager = torch.compiler.set_stance("force_eager") if self.config.machine.compile else contextlib.nullcontext()
        with torch.no_grad(), eager:
            for prefix, average in kinds.items():
                with update.weights.averaged(average):
                    values |= self.losses(model, f"{prefix}validation_loss")
                    began, edits[prefix] = time.perf_counter(), []
                    with contextlib.suppress(*FULL):
                        edits[prefix] = self.edit(model)
                    seconds += time.perf_counter() - began
                    try:
                        if average is update.average:
                            self.draw(step, model)
                    except FULL:
                        say(f"no pictures at step {step}: out of memory")
                    self.tidy()  # before the weights come back
            values |= self.scores.measure(step, edits, seconds)
            self.tidy()
        model.train()
        return values

    def tidy(self) -> None:
        """Let go of what pictures were made and seen with."""
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def losses(self, unet: torch.nn.Module, name: str) -> dict[str, float]:
        """The mean loss over the held-out samples, in all and by band of timesteps, both conditions kept."""
        count, size = len(self.held_out.rows), self.config.steps.train_batch_size
        if not count:
            return {}
        steps = len(self.objective.scheduler.alphas_cumprod)
        width, device = steps // BANDS, self.accelerator.device
        sums = torch.zeros(BANDS, device=device)
        batches = [
            members[start : start + size]
            for members in self.held_out.by_shape().values()
            for start in range(0, len(members), size)
        ]
        for number in range(len(batches))[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = gather(self.reader, self.held_out, batches[number], device, self.texts)
            draws = self.objective.draw(batch, SEED, number * size, 0, 0)
            draws = draws._replace(dropout=torch.ones_like(draws.dropout))
            for band in range(BANDS):
                timesteps = band * width + draws.timesteps % width
                sums[band] += self.objective.losses(unet, batch, draws._replace(timesteps=timesteps)).sum()
        means = (self.accelerator.reduce(sums, "sum") / count).tolist()  # type: ignore[union-attr, operator]
        bands = {f"{name}_{band * width}_{(band + 1) * width}": mean for band, mean in enumerate(means)}
        return {name: math.fsum(means) / BANDS} | bands

    @functools.cached_property
    def picture(self) -> Image.Image | None:
        """What is edited beside the held-out pairs; raises as `open_picture` does."""
        return open_picture(self.config.watching)

    @functools.cached_property
    def scores(self) -> Scores:
        """What held-out pairs are edited and scored with; raises as that does."""
        return Scores(self.config, self.accelerator, self.reader.caches, self.held_out)

    def edit(self, unet: UNet2DConditionModel) -> list[Edit]:
        """Edit the pairs that are scored, this process's share of them, at the size that they have in the cache."""
        if not len(self.scores.pairs.rows):
            return []
        editor = self.editor(unet)
        return self.scores.edit(editor, self.decode(editor.pipeline, self.scores.pairs))

    def draw(self, step: int, unet: UNet2DConditionModel) -> None:
        """Edit the validation picture and held-out ones, on the main process, and keep one sheet of them.

        One picture at a time, so that it takes less than a training step of most models does; those that are held out
        at the size that they have in the cache.
        """
        if not self.accelerator.is_main_process or (self.picture is None and not len(self.held_out.rows)):
            return
        editor = self.editor(unet)
        seeds = range(SEED, SEED + self.config.watching.num_validation_images)
        how: dict[str, Any] = {"seed": SEED, "num_images": len(seeds), "batch_size": 1}
        rows: list[tuple[str, Sequence[Image.Image | None]]] = []
        if self.picture is not None:
            prompt = str(self.config.watching.validation_prompt)
            rows.append((prompt, [self.picture, None, *editor.edit(self.picture, prompt, **how)]))
        for prompt, original, target in self.decode(editor.pipeline, self.shown):
            edits = editor.edit(original, prompt, resolution=max(original.size), **how)
            rows.append((prompt, [original, target, *edits]))
        sheet = contact_sheet(rows, ["original", "target", *(f"edited, seed {seed}" for seed in seeds)])
        folder = self.config.saving.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [sheet]}, step=step)

    def editor(self, unet: UNet2DConditionModel) -> Editor:
        """A pipeline around a UNet, with as little of the frozen parts as it needs."""
        texts = self.known  # before the VAE is there
        frozen = texts | {"vae": load_vae(self.checkpoint, self.accelerator.device)}
        pipeline = make_pipeline(unet, self.objective.scheduler, self.checkpoint, frozen)
        pipeline.set_progress_bar_config(disable=True)
        return Editor(pipeline)

    @functools.cached_property
    def known(self) -> dict[str, KnownTexts]:
        """What the text encoders make of the instructions of all edits, and of none; they are loaded for it once."""
        pairs = self.shown, self.scores.pairs
        texts = {"", *(text for samples in pairs for text in samples.instructions(self.reader.caches))}
        if self.picture is not None:
            texts.add(str(self.config.watching.validation_prompt))
        return encode(self.checkpoint, texts, self.accelerator.device, half(self.accelerator.device))

    @property
    def shown(self) -> Samples:
        """Held-out samples that are drawn."""
        return self.held_out.spread(self.config.watching.num_validation_images)

    def decode(self, pipeline: Any, samples: Samples) -> Iterator[tuple[str, Image.Image, Image.Image]]:
        """Instruction, original and target of samples; the pictures decoded from the cache."""
        for number, instruction in enumerate(samples.instructions(self.reader.caches)):
            batch = gather(self.reader, samples, np.array([number]), self.accelerator.device, self.texts)
            latents = torch.cat([batch.original, batch.edited[:, : batch.original.shape[1]]]).float()
            yield instruction, *pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def open_picture(flags: Watching) -> Image.Image | None:
    """The picture of --val_image_url_or_path, if there is one; raises SettingsError where it cannot be used."""
    if not flags.image:
        return None
    try:
        return load_image(flags.image)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--val_image_url_or_path {flags.image} cannot be opened: {reason(error)}") from None


def validation_every(config: TrainConfig, steps_per_epoch: float) -> int:
    """Optimizer steps from one validation to the next; 0 for none."""
    flags = config.watching
    if not (flags.num_validation_samples or flags.image):
        return 0
    if flags.validation_epochs:
        return max(1, round(flags.validation_epochs * steps_per_epoch))
    return flags.validation_steps or config.saving.checkpointing_steps
