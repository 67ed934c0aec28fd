"""A whole training run on one page: prepare, fit, finish."""

import contextlib
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..encode.base.console import say
from ..encode.base.errors import Stopped, TrainError
from ..encode.cache.reader import Reader
from ..encode.cached import Samples
from .config import TrainConfig
from .data.batches import Batches, gather, null_conditioning
from .data.keep import choose, hold_out
from .data.order import identity, make_order, remarks
from .data.sweep import sweep_over
from .data.text import Texts
from .machine import advise, alone, make_accelerator
from .need import check_memory, estimate
from .objective import Objective, noise_scheduler
from .save.averages import AVERAGES, Averages
from .save.best import keep
from .save.checkpoint import AVERAGE, MODEL, OPTIMIZER, PROGRESS, SCALE, Checkpoints, Parts, checkpoints
from .save.pipeline import export, finished
from .save.public import told
from .save.resume import SETTINGS, Progress, find, go_on, resume
from .save.room import announce
from .save.upload import publish
from .setup import agreed_seed, base_checkpoint, open_caches, save_config, track, with_model
from .unet.load import allow_graphs, check_gradients
from .unet.make import make_schedule, make_unet, make_update
from .unet.weights import Precision
from .watch.interrupt import Interrupt
from .watch.metrics import Metrics, share_of_peak
from .watch.validate import Validation, validation_every


def train(config: TrainConfig) -> None:
    """Train a UNet from a cache and save the pipeline.

    Raises:
        Ip2pError: anything the user can mend.
        Stopped: by a signal, after a checkpoint.
    """
    if config.machine.estimate:
        return estimate(config)
    if os.environ.get("RANK", "0") == "0":  # before anything is made or loaded
        find(config.saving.output_dir, config.saving.resume_from_checkpoint)
    accelerator, precision = make_accelerator(config)
    say(*advise(accelerator, precision))
    try:
        with alone(config.saving.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            run = Run(config, accelerator, precision)
            signal = run.fit()
            if accelerator.is_main_process and not signal:
                run.finish()
    except torch.OutOfMemoryError:
        mend = "the command with --estimate says what takes less, such as --gradient_checkpointing or --lora_rank 16"
        raise TrainError(f"out of memory: {mend}") from None
    accelerator.end_training()
    if signal:
        raise Stopped(run.progress.step, signal)


class Run:
    """What goes through a run together: what it trains on, what it trains, and how far it has come."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, precision: Precision):
        """Open, load and resume what the flags ask for."""
        # What it trains on.
        caches, device = open_caches(config, accelerator), accelerator.device
        self.accelerator, self.precision = accelerator, precision
        self.config = config = with_model(config, caches[0])
        self.base = base_checkpoint(config, caches[0], accelerator)
        self.reader = Reader(*caches, masks=config.objective.edit_weight != 1, window=config.samples.room)
        check_memory(config, self.base, self.reader, device)
        samples = Samples.of_all(self.reader, config.samples.max_train_samples, choose(caches, config.samples.keep))
        self.reader.require(samples.rows, samples.text_rows)
        self.samples, held_out = hold_out(samples, config.watching.num_validation_samples)
        sweep = sweep_over(self.reader, self.samples)
        scheduler, null = noise_scheduler(config.objective, self.base), null_conditioning(self.reader, device)
        self.objective = Objective(scheduler, null, self.base.scaling_factor, config.objective, precision.dtype)
        self.texts = Texts.of(caches, self.base, device)
        self.validation = Validation(config, accelerator, self.base, self.reader, self.objective, held_out, self.texts)

        # What it trains.
        seed = agreed_seed(config)
        unet = make_unet(config, self.base, precision, device, seed)
        self.update = make_update(config, unet, precision, accelerator.num_processes)
        self.averages = Averages(self.update, config.saving.output_dir, writes=accelerator.is_main_process)
        self.per_step = config.steps.samples(accelerator.num_processes)
        self.per_epoch = len(self.samples.rows) / self.per_step  # optimizer steps, not a whole number
        batch = self.per_step // config.steps.gradient_accumulation_steps
        say(*remarks(self.samples, batch, self.base.vae_scale_factor))
        self.total = config.steps.max_train_steps or math.ceil(config.steps.num_train_epochs * self.per_epoch)
        self.unet: Any = accelerator.prepare(unet)

        # How far it has come.
        position = {"seen": [0] * len(self.samples.by_shape()), "selection": identity(config, self.samples, sweep)}
        first = caches[0].manifest  # all of them were encoded alike; and text, cached or not, has the same numbers
        encoded = first["identity"] | first["encoding"] | {"text": None}
        self.progress = Progress(encoded, seed, trains=config.lora.described, **position)
        self.progress.files = [name for name, part in self.state.items() if part]
        self.origin = resume(config, self.state)
        self.update.seed = self.progress.seed
        self.order = make_order(config, self.samples, self.progress.seed, self.progress.lap, sweep)
        self.lr_scheduler = make_schedule(config.optimizer, self.update.optimizer, self.progress.step, self.total)
        announce(config, self.base, unet, self.state, self.total, self.per_step, len(self.samples.rows))

    @property
    def state(self) -> Parts:
        """All that a checkpoint holds."""
        parts: Parts = {PROGRESS: self.progress, MODEL: self.update.weights, OPTIMIZER: self.update}
        return parts | {AVERAGE: self.update.average, AVERAGES: self.averages or None, SCALE: self.update.scale}

    def due(self, every: int) -> bool:
        """Whether it is the turn of what is done every so many steps and after the last one; never for 0."""
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.total)

    def fit(self) -> int:
        """Train until the last step, or until a signal asks to stop; returns that signal, or 0."""
        config, accelerator, progress, device = self.config, self.accelerator, self.progress, self.accelerator.device
        if config.machine.compile and progress.step < self.total:
            self.check_compiled()
        self.begin()
        if progress.step >= self.total:
            return 0
        size, rank, processes = config.steps.train_batch_size, accelerator.process_index, accelerator.num_processes
        drawn = self.order.batches(progress.seen, size, rank, processes)
        whole = self.order.batches(progress.seen, size * processes)
        batches = Batches(self.reader, self.samples, drawn, device, batch_size=size, texts=self.texts, everywhere=whole)
        every, signal, writes = validation_every(config, self.per_epoch), 0, accelerator.is_main_process
        checkpoints = Checkpoints(config.saving.output_dir, config.saving.checkpoints_total_limit, writes=writes)
        share = share_of_peak(accelerator.unwrap_model(self.unet), self.reader, self.precision, device)
        metrics = Metrics(config, accelerator, (batches, checkpoints), range(progress.step, self.total), share)
        with Interrupt(accelerator) as interrupt:
            with metrics.bar, contextlib.closing(batches), checkpoints:
                while progress.step < self.total and not signal:
                    loss, norm, skipped = self.step(batches)
                    metrics.step(progress.step, loss, norm, skipped, float(self.lr_scheduler.get_last_lr()[0]))
                    if self.due(every):
                        with metrics.paused():
                            found = self.validation.run(progress.step, self.unet, self.update)
                            metrics.write(progress.step, found)
                            if writes:
                                keep(config, progress.step, found, checkpoints.wait, self.save)
                    checkpoints.check()
                    self.averages.snapshot(progress.step, self.total)
                    signal = interrupt.agreed()
                    # A launcher kills several processes soon after a signal: then one checkpoint has to be enough.
                    enough = signal and checkpoints.busy and processes > 1
                    if (signal or self.due(config.saving.checkpointing_steps)) and not enough:
                        checkpoints.save(progress.step, self.state)
            accelerator.wait_for_everyone()  # a launcher kills the others when the first process is gone
        return signal if progress.step < self.total else 0

    def begin(self) -> None:
        """Let the output folder and the trackers tell of this run, now that nothing but its steps can fail."""
        config, folder, step = self.config, self.config.saving.output_dir, self.progress.step
        trains, caches, known = step < self.total, self.reader.caches, self.progress.told
        self.progress.told = told(known, caches, self.samples, self.validation.held_out, trains=trains)
        if self.accelerator.is_main_process:
            if trains or not checkpoints(folder):
                go_on(folder, self.origin, step)
            recorded = self.origin.parent / SETTINGS if self.origin and not trains else None
            save_config(config, self.progress.seed, recorded)
            if trains:
                track(config, self.progress.seed, step, self.accelerator)
        self.averages.begin(self.origin, trains=trains)
        if not trains:
            say(f"nothing is trained: {self.origin} has {step:,} steps, and {self.total:,} are asked for in all")

    def step(self, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
        """Take one optimizer step: loss, norm of the gradients, 1 if it was skipped, else 0; all on the device."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        count, loss = config.steps.gradient_accumulation_steps, torch.zeros((), device=accelerator.device)
        for micro in range(count):
            batch = next(batches)
            draws = self.objective.draw(batch, progress.seed, progress.step, micro, accelerator.process_index)
            with contextlib.nullcontext() if micro == count - 1 else accelerator.no_sync(self.unet):
                part = self.objective.loss(self.unet, batch, draws) / count
                self.update.backward(part)
            loss += part.detach()
            progress.seen = self.order.after(progress.seen, self.per_step // count)
        norm, skipped = self.update(averages=(progress.step + 1) % config.optimizer.ema_steps == 0)
        self.lr_scheduler.step()
        progress.step += 1
        progress.samples += self.per_step
        return loss, norm, skipped

    def save(self, folder: Path, length: float | None = None) -> None:
        """Save a pipeline of what is trained by now: of the average of a length, or of what validation looks at."""
        plain, unet = self.update.average, self.accelerator.unwrap_model(self.unet)
        average = self.averages.of_length(length) if length else plain and plain.tensors
        unet = finished(self.config, self.base, unet, self.update.weights, average)
        export(unet, self.objective.scheduler, self.base, self.reader.caches[0], folder)

    def finish(self) -> None:
        """Save the pipeline and its card, and upload them if that is asked for."""
        self.save(self.config.saving.output_dir, self.config.optimizer.ema_length)
        publish(self.config, self.base, self.reader.caches, self.progress)

    def check_compiled(self) -> None:
        """Hold the compiled UNet against itself uncompiled, on a batch of each shape that it will be trained with."""
        shapes = self.samples.by_shape().values()
        allow_graphs(len(shapes))
        for members in shapes:
            numbers = np.resize(members, self.config.steps.train_batch_size)
            batch = gather(self.reader, self.samples, numbers, self.accelerator.device, self.texts)
            draws = self.objective.draw(batch, self.progress.seed)
            check_gradients(self.unet, partial(self.objective.loss, self.unet, batch, draws), self.precision.name)
