"""A whole training run on one page: prepare, fit, finish."""

import contextlib
import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from ..encode.base.console import say
from ..encode.base.errors import TrainError
from ..encode.cache.reader import Reader
from ..encode.models.checkpoint import Checkpoint
from .config import TrainConfig
from .data.batches import Batches, gather, null_conditioning
from .data.order import make_order
from .data.samples import Samples, hold_out
from .objective import Objective, make_objective
from .save.card import push, write_card
from .save.checkpoint import AVERAGE, MODEL, OPTIMIZER, PROGRESS, SCALE, SCHEDULE, Checkpoints, Parts
from .save.lock import alone
from .save.pipeline import export
from .save.resume import Progress, resume
from .setup import advise, agreed_seed, base_checkpoint, make_accelerator, open_caches, save_config
from .unet.compiled import check_gradients
from .unet.flops import share_of_peak
from .unet.load import choose_attention, load_unet
from .unet.optimizer import make_update
from .unet.update import Update
from .unet.weights import Precision
from .watch.interrupt import Interrupt
from .watch.metrics import Metrics
from .watch.validate import Validation, open_picture


def train(config: TrainConfig) -> None:
    """Train a UNet from a cache and save the pipeline.

    Raises:
        Ip2pError: anything the user can mend.
        SystemExit: stopped by a signal, after a checkpoint.
    """
    accelerator, precision = make_accelerator(config)
    say(*advise(accelerator, precision))
    try:
        with alone(config.saving.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            run = prepare(config, accelerator, precision)
            signal = fit(run)
            if accelerator.is_main_process and not signal:
                finish(run)
    except torch.OutOfMemoryError:
        raise TrainError(
            "out of memory: use a smaller --train_batch_size with more --gradient_accumulation_steps, "
            "--gradient_checkpointing, --mixed_precision bf16 or --use_8bit_adam"
        ) from None
    accelerator.end_training()
    if signal:
        say(f"stopped at step {run.progress.step}: continue with --resume_from_checkpoint latest")
        raise SystemExit(128 + signal)


@dataclasses.dataclass(frozen=True)
class Run:
    """What goes through a run together: what it trains on, what it trains, and how far it has come."""

    config: TrainConfig
    accelerator: Accelerator
    precision: Precision
    base: Checkpoint  # the model on the disk that it starts from
    reader: Reader  # of the caches
    samples: Samples
    objective: Objective
    validation: Validation
    unet: Any  # as accelerate has prepared it
    update: Update  # the weights, and what moves them
    lr_scheduler: Any
    progress: Progress
    per_step: int  # samples that all processes see in an optimizer step
    total: int  # optimizer steps

    @property
    def state(self) -> Parts:
        """All that a checkpoint holds."""
        update, schedule = self.update, self.lr_scheduler
        parts: Parts = {PROGRESS: self.progress, MODEL: update.weights, OPTIMIZER: update, SCHEDULE: schedule}
        return parts | {AVERAGE: update.average, SCALE: update.scale}

    def due(self, every: int) -> bool:
        """Whether it is the turn of what is done every so many steps and after the last one; never for 0."""
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.total)


def prepare(config: TrainConfig, accelerator: Accelerator, precision: Precision) -> Run:
    """Open, load and resume what the flags ask for."""
    # What it trains on.
    caches = open_caches(config, accelerator)
    manifest = caches[0].manifest  # how all of them were encoded
    base = base_checkpoint(config, caches[0], accelerator)
    reader = Reader(*caches)
    samples = Samples.of_all(reader, config.samples.max_train_samples)
    reader.require(samples.rows, samples.text_rows)
    samples, held_out = hold_out(samples, config.watching.num_validation_samples)
    objective = make_objective(config, base, null_conditioning(reader, accelerator.device), precision.dtype)
    validation = Validation(config, accelerator, base, reader, objective, held_out, open_picture(config))

    # What it trains, and how far it has come.
    unet: Any = load_unet(config, base).to(accelerator.device)
    choose_attention(unet, accelerator.device, precision.name)
    update = make_update(config, unet, precision, accelerator.num_processes)
    per_step = config.steps.train_batch_size * config.steps.gradient_accumulation_steps * accelerator.num_processes
    epoch = len(samples.rows) / per_step  # optimizer steps, not a whole number
    total = config.steps.max_train_steps or math.ceil(config.steps.num_train_epochs * epoch)
    lr_scheduler: Any = get_scheduler(
        config.optimizer.lr_scheduler,
        update.optimizer,
        num_warmup_steps=config.optimizer.lr_warmup_steps,
        num_training_steps=total,
    )
    run = Run(
        config,
        accelerator,
        precision,
        base,
        reader,
        samples,
        objective,
        validation,
        accelerator.prepare(unet),
        update,
        lr_scheduler,
        Progress(manifest["identity"] | manifest["encoding"], agreed_seed(config)),
        per_step,
        total,
    )
    resume(config, accelerator, run.state)
    save_config(config, run.progress.seed, accelerator)
    return run


def fit(run: Run) -> int:
    """Train until the last step, or until a signal asks to stop; returns that signal, or 0."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    if config.machine.compile:
        check_compiled(run)
    size, rank, processes = config.steps.train_batch_size, accelerator.process_index, accelerator.num_processes
    order = make_order(config, run.samples, progress.seed)
    start, stride = progress.samples + rank * size, processes * size
    batches = Batches(run.reader, run.samples, order, accelerator.device, batch_size=size, start=start, stride=stride)
    checkpoints = Checkpoints(
        config.saving.output_dir, config.saving.checkpoints_total_limit, writes=accelerator.is_main_process
    )
    share = share_of_peak(run.unet, run.reader, run.precision, accelerator.device)
    metrics = Metrics(
        accelerator, config, (batches, checkpoints), run.total, progress.step, per_step=run.per_step, share=share
    )
    validation_every = config.validation_every(len(run.samples.rows) / run.per_step)
    signal = 0
    with Interrupt(accelerator) as interrupt:
        with metrics.bar, contextlib.closing(batches), checkpoints:
            while progress.step < run.total and not signal:
                loss, norm, skipped = step(run, batches)
                metrics.step(progress.step, loss, norm, skipped, float(run.lr_scheduler.get_last_lr()[0]))
                if run.due(validation_every):
                    with metrics.paused():
                        metrics.write(progress.step, run.validation.run(progress.step, run.unet, run.update))
                checkpoints.check()
                signal = interrupt.agreed()
                # A launcher kills several processes soon after a signal: then one checkpoint has to be enough.
                enough = signal and checkpoints.busy and processes > 1
                if (signal or run.due(config.saving.checkpointing_steps)) and not enough:
                    checkpoints.save(progress.step, run.state)
        accelerator.wait_for_everyone()  # a launcher kills the others when the first process is gone
    return signal if progress.step < run.total else 0


def step(run: Run, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Take one optimizer step: the loss, the gradients' norm, and 1 if it was skipped, else 0; all on the device."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    count, loss = config.steps.gradient_accumulation_steps, torch.zeros((), device=accelerator.device)
    for micro in range(count):
        batch = next(batches)
        draws = run.objective.draw(batch, progress.seed, progress.step, micro, accelerator.process_index)
        with contextlib.nullcontext() if micro == count - 1 else accelerator.no_sync(run.unet):
            part = run.objective.loss(run.unet, batch, draws) / count
            run.update.backward(part)
        loss += part.detach()
    norm, skipped = run.update(averages=(progress.step + 1) % config.optimizer.ema_steps == 0)
    run.lr_scheduler.step()
    progress.step += 1
    progress.samples += run.per_step
    return loss, norm, skipped


def finish(run: Run) -> None:
    """Save the pipeline and its card, and upload them if that is asked for."""
    config, caches = run.config, run.reader.caches
    unet: Any = run.accelerator.unwrap_model(run.unet)
    run.update.weights.finish(run.update.average)
    export(
        unet, run.objective.scheduler, run.base, caches[0].manifest["encoding"]["resolution"], config.saving.output_dir
    )
    write_card(config, caches, run.progress.step, run.progress.samples)
    say(f"saved the pipeline in {config.saving.output_dir}: try `ip2p-infer --model {config.saving.output_dir} …`")
    if config.saving.push_to_hub:
        say(f"uploaded to {push(config)}")


def check_compiled(run: Run) -> None:
    """Hold the compiled UNet against itself uncompiled, on a batch of the shape that it will be trained with."""
    numbers = np.arange(run.config.steps.train_batch_size) % len(run.samples.rows)
    batch = gather(run.reader, run.samples, numbers, run.accelerator.device)
    draws = run.objective.draw(batch, run.progress.seed)
    check_gradients(run.unet, partial(run.objective.loss, run.unet, batch, draws), run.precision.name)
