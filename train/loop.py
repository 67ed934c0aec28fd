"""A whole training run, from the cache to the finished pipeline, on one page."""

import contextlib
import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ..encode.errors import SettingsError, TrainError
from ..encode.reader import Reader
from .card import push, write_card
from .checkpoint import Progress, export, find, resume, save
from .compiled import check_gradients
from .config import TrainConfig
from .data import Batches, null_conditioning
from .interrupt import Interrupt
from .metrics import Metrics
from .model import choose_attention, load_unet
from .objective import Objective
from .order import make_order
from .samples import Samples
from .setup import (
    agreed_seed,
    base_checkpoint,
    make_accelerator,
    make_optimizer,
    noise_scheduler,
    open_caches,
    save_config,
)
from .validate import Validation, hold_out


def train(config: TrainConfig) -> None:
    """Train a UNet from a cache and save the pipeline.

    Raises:
        Ip2pError: anything the user can mend.
        SystemExit: stopped by a signal, after a checkpoint.
    """
    try:
        _train(config)
    except torch.OutOfMemoryError:
        raise TrainError(
            "out of memory: use a smaller --train_batch_size with more --gradient_accumulation_steps, "
            "--gradient_checkpointing, --mixed_precision bf16 or --use_8bit_adam"
        ) from None


def _train(config: TrainConfig) -> None:
    # What is trained, and on what.
    accelerator = make_accelerator(config)
    caches = open_caches(config, accelerator)
    manifest = caches[0].manifest  # how all of them were encoded
    checkpoint = base_checkpoint(config, caches[0], accelerator)
    reader = Reader(*caches)
    samples = Samples.of_all(reader, config.max_train_samples)
    reader.require(samples.rows, samples.text_rows)
    samples, held_out = hold_out(samples, config.num_validation_samples)
    objective = Objective(
        noise_scheduler(config, checkpoint),
        null_conditioning(caches[0], reader, accelerator.device),
        checkpoint.scaling_factor,
        config.dropout,
        config.snr_gamma,
        config.noise_offset,
    )
    validation = Validation(config, accelerator, checkpoint, reader, objective, held_out)

    # What changes while it trains.
    unet = load_unet(config, checkpoint)
    choose_attention(unet, accelerator.device, accelerator.mixed_precision)
    optimizer = make_optimizer(config, unet, accelerator)
    per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    epoch = len(samples.rows) / per_step  # optimizer steps, not a whole number
    total = config.max_train_steps or math.ceil(config.num_train_epochs * epoch)
    validation_every = config.validation_every(epoch)
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    progress = Progress(manifest["identity"] | manifest["encoding"], agreed_seed(config))
    accelerator.register_for_checkpointing(progress, lr_scheduler)
    ema = make_ema(config, unet, accelerator)

    if previous := find(config.output_dir, config.resume_from_checkpoint):
        resume(accelerator, previous)
        if config.seed not in (None, progress.seed):
            raise SettingsError(f"--seed {config.seed}: {previous} was trained with seed {progress.seed}, leave it out")
    save_config(config, progress.seed, accelerator)

    rank, size = accelerator.process_index, config.train_batch_size
    batches = Batches(
        reader,
        samples,
        make_order(config, samples, progress.seed),
        accelerator.device,
        batch_size=size,
        start=progress.samples + rank * size,
        stride=accelerator.num_processes * size,
    )
    metrics = Metrics(accelerator, config.output_dir, every=config.logging_steps, total=total, done=progress.step)
    unchecked = config.compile
    with Interrupt(accelerator, config.logging_steps) as interrupt, contextlib.closing(batches):
        while progress.step < total:
            loss = torch.zeros((), device=accelerator.device)
            for micro in range(config.gradient_accumulation_steps):
                last = micro == config.gradient_accumulation_steps - 1
                batch = next(batches)
                draws = objective.draw(batch, progress.seed, progress.step, micro, rank)
                if unchecked:
                    check_gradients(accelerator, unet, partial(objective.loss, unet, batch, draws))
                    unchecked = False
                with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                    part = objective.loss(unet, batch, draws)
                    accelerator.backward(part / config.gradient_accumulation_steps)
                loss += part.detach() / config.gradient_accumulation_steps
            skipped = update(accelerator, unet, optimizer, config.max_grad_norm)
            lr_scheduler.step()
            progress.step += 1
            progress.samples += per_step
            if ema and progress.step % config.ema_steps == 0:
                ema.step(unet.parameters())

            metrics.step(progress.step, loss, skipped, float(lr_scheduler.get_last_lr()[0]), per_step, batches.waited)
            if validation_every and (progress.step % validation_every == 0 or progress.step == total):
                validation.run(progress.step, unet, ema, metrics)
            stopping = interrupt.agreed(progress.step)
            if progress.step % config.checkpointing_steps == 0 or progress.step == total or stopping:
                save(accelerator, config.output_dir, progress.step, config.checkpoints_total_limit)
                metrics.pause()
            if stopping and progress.step < total:
                metrics.close()
                accelerator.end_training()
                print(f"stopped at step {progress.step}: continue with --resume_from_checkpoint latest")
                raise SystemExit(128 + stopping)
    metrics.close()

    if accelerator.is_main_process:
        result: Any = accelerator.unwrap_model(unet)
        if ema:
            ema.copy_to(result.parameters())
        export(result, objective.scheduler, checkpoint, manifest["encoding"]["resolution"], config.output_dir)
        write_card(config, caches, progress.step, progress.samples)
        print(f"saved the pipeline in {config.output_dir}: try `ip2p-infer --model {config.output_dir} …`")
        if config.push_to_hub:
            print(f"uploaded to {push(config)}")
    accelerator.end_training()


def update(accelerator: Accelerator, unet: torch.nn.Module, optimizer: Any, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradients and change the weights, unless a gradient is not finite.

    Returns:
        1 on the device if the weights were left as they are, else 0.
    """
    norm = accelerator.clip_grad_norm_(unet.parameters(), max_grad_norm)
    skipped = 1 - torch.isfinite(norm).float()  # type: ignore[arg-type]
    if accelerator.scaler is None and isinstance(optimizer.optimizer, torch.optim.AdamW):
        # The fused kernel itself reads this, as it does for a gradient scaler: nobody has to wait for the device.
        optimizer.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif accelerator.scaler is not None or not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def make_ema(config: TrainConfig, unet: UNet2DConditionModel, accelerator: Accelerator) -> EMAModel | None:
    """The average of the weights over time, as part of the checkpoints."""
    if not config.use_ema:
        return None
    model: Any = accelerator.unwrap_model(unet)
    ema = EMAModel(
        model.parameters(), decay=config.ema_decay, foreach=True, model_cls=type(model), model_config=model.config
    )
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    return ema
