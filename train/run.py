"""A whole training run, from the cache to the finished pipeline, on one page."""

import contextlib
import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from ..encode.base.errors import SettingsError, TrainError
from ..encode.cache.reader import Reader
from .config import TrainConfig
from .data.batches import Batches, null_conditioning
from .data.order import make_order
from .data.samples import Samples
from .machine import Precision, advise, make_accelerator
from .objective import Objective
from .save.card import push, write_card
from .save.checkpoint import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    PROGRESS,
    SCALE,
    SCHEDULE,
    Checkpoints,
    Parts,
    Progress,
    resume,
)
from .save.pipeline import export
from .setup import (
    agreed_checkpoint,
    agreed_seed,
    alone,
    base_checkpoint,
    noise_scheduler,
    open_caches,
    save_config,
)
from .unet.average import Average
from .unet.compiled import check_gradients
from .unet.flops import peak, training_flops
from .unet.load import choose_attention, load_unet
from .unet.optimizer import LossScale, Update, make_optimizer, takes_one_pass
from .unet.weights import Weights
from .watch.interrupt import Interrupt
from .watch.metrics import Metrics
from .watch.validate import Validation, hold_out


def train(config: TrainConfig) -> None:
    """Train a UNet from a cache and save the pipeline.

    Raises:
        Ip2pError: anything the user can mend.
        SystemExit: stopped by a signal, after a checkpoint.
    """
    accelerator, precision = make_accelerator(config)
    for line in advise(accelerator, precision):
        accelerator.print(line)
    try:
        with alone(config.saving.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            _train(config, accelerator, precision)
    except torch.OutOfMemoryError:
        raise TrainError(
            "out of memory: use a smaller --train_batch_size with more --gradient_accumulation_steps, "
            "--gradient_checkpointing, --mixed_precision bf16 or --use_8bit_adam"
        ) from None


def _train(config: TrainConfig, accelerator: Accelerator, precision: Precision) -> None:
    # What is trained, and on what.
    device = accelerator.device
    caches = open_caches(config, accelerator)
    manifest = caches[0].manifest  # how all of them were encoded
    checkpoint = base_checkpoint(config, caches[0], accelerator)
    reader = Reader(*caches)
    samples = Samples.of_all(reader, config.samples.max_train_samples)
    reader.require(samples.rows, samples.text_rows)
    samples, held_out = hold_out(samples, config.watching.num_validation_samples)
    objective = Objective(
        noise_scheduler(config, checkpoint),
        null_conditioning(caches[0], reader, device),
        checkpoint.scaling_factor,
        config.objective.dropout,
        config.objective.snr_gamma,
        config.objective.noise_offset,
        precision.dtype,
    )
    validation = Validation(config, accelerator, checkpoint, reader, objective, held_out)

    # What changes while it trains.
    unet: Any = load_unet(config, checkpoint).to(device)
    choose_attention(unet, device, precision.name)
    weights = Weights(unet, precision.half)
    average = Average(weights.masters, config.optimizer.ema_decay) if config.optimizer.use_ema else None
    scale = LossScale(device) if precision.name == "fp16" else None
    optimizer = make_optimizer(config, weights, accelerator.num_processes)
    fused = not config.optimizer.use_8bit_adam and takes_one_pass(device, precision.half)
    update = Update(weights, optimizer, config.optimizer.max_grad_norm, average, scale, fused=fused)
    unet = accelerator.prepare(unet)
    per_step = config.steps.train_batch_size * config.steps.gradient_accumulation_steps * accelerator.num_processes
    epoch = len(samples.rows) / per_step  # optimizer steps, not a whole number
    total = config.steps.max_train_steps or math.ceil(config.steps.num_train_epochs * epoch)
    validation_every = config.validation_every(epoch)
    lr_scheduler = get_scheduler(
        config.optimizer.lr_scheduler,
        optimizer,
        num_warmup_steps=config.optimizer.lr_warmup_steps,
        num_training_steps=total,
    )
    progress = Progress(manifest["identity"] | manifest["encoding"], agreed_seed(config))
    parts: Parts = {PROGRESS: progress, MODEL: weights, OPTIMIZER: update, SCHEDULE: lr_scheduler}
    parts |= {AVERAGE: average, SCALE: scale}
    if previous := agreed_checkpoint(config, accelerator):
        resume(previous, parts)
        if config.steps.seed not in (None, progress.seed):
            raise SettingsError(
                f"--seed {config.steps.seed}: {previous} was trained with seed {progress.seed}, leave it out"
            )
    save_config(config, progress.seed, accelerator)

    rank, size = accelerator.process_index, config.steps.train_batch_size
    batches = Batches(
        reader,
        samples,
        make_order(config, samples, progress.seed),
        device,
        batch_size=size,
        start=progress.samples + rank * size,
        stride=accelerator.num_processes * size,
    )
    checkpoints = Checkpoints(
        config.saving.output_dir, config.saving.checkpoints_total_limit, writes=accelerator.is_main_process
    )
    metrics = Metrics(
        accelerator,
        config.saving.output_dir,
        every=config.watching.logging_steps,
        total=total,
        done=progress.step,
        per_step=per_step,
        data=lambda: batches.waited,
        checkpoints=lambda: checkpoints.waited,
        share=share_of_peak(unet, reader, precision, device),
    )
    unchecked = config.machine.compile
    with Interrupt(accelerator) as interrupt, contextlib.closing(batches), checkpoints:
        while progress.step < total:
            loss = torch.zeros((), device=device)
            for micro in range(config.steps.gradient_accumulation_steps):
                last = micro == config.steps.gradient_accumulation_steps - 1
                batch = next(batches)
                draws = objective.draw(batch, progress.seed, progress.step, micro, rank)
                if unchecked:
                    check_gradients(unet, partial(objective.loss, unet, batch, draws), precision.name)
                    unchecked = False
                with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                    part = objective.loss(unet, batch, draws) / config.steps.gradient_accumulation_steps
                    (part * scale.value if scale else part).backward()
                loss += part.detach()
            norm, skipped = update(averages=(progress.step + 1) % config.optimizer.ema_steps == 0)
            lr_scheduler.step()
            progress.step += 1
            progress.samples += per_step

            metrics.step(progress.step, loss, norm, skipped, float(lr_scheduler.get_last_lr()[0]))
            if validation_every and (progress.step % validation_every == 0 or progress.step == total):
                with metrics.paused():
                    if values := validation.run(progress.step, unet, weights, average):
                        metrics.write(progress.step, values)
            checkpoints.check()
            stopping = interrupt.agreed()
            if progress.step % config.saving.checkpointing_steps == 0 or progress.step == total or stopping:
                # A launcher kills several processes soon after a signal: then one checkpoint has to be enough.
                enough = stopping and checkpoints.busy and accelerator.num_processes > 1
                if not enough:
                    checkpoints.save(progress.step, parts)
            if stopping and progress.step < total:
                checkpoints.wait()
                accelerator.wait_for_everyone()  # a launcher kills the others when the first process is gone
                metrics.close()
                accelerator.end_training()
                accelerator.print(f"stopped at step {progress.step}: continue with --resume_from_checkpoint latest")
                raise SystemExit(128 + stopping)
    metrics.close()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        result: Any = accelerator.unwrap_model(unet)
        weights.finish(average)
        export(result, objective.scheduler, checkpoint, manifest["encoding"]["resolution"], config.saving.output_dir)
        write_card(config, caches, progress.step, progress.samples)
        print(
            f"saved the pipeline in {config.saving.output_dir}: try `ip2p-infer --model {config.saving.output_dir} …`"
        )
        if config.saving.push_to_hub:
            print(f"uploaded to {push(config)}")
    accelerator.end_training()


def share_of_peak(unet: Any, reader: Reader, precision: Precision, device: torch.device) -> float | None:
    """The share of the GPU's peak that one sample in a second is; None where the peak is not known."""
    tera = peak(device) if precision.name != "no" else None
    if tera is None:
        return None
    shapes = {name: array.row_shape for name, array in reader.arrays.items()}
    channels, *sides = shapes["original"]
    config = getattr(unet, "module", unet).config
    pooled = shapes["pooled"][0] if "pooled" in shapes else None
    return training_flops(config, (2 * channels, *sides), shapes["text"], pooled) / tera
