"""A whole training run, from the cache to the finished pipeline, on one page."""

import contextlib
import math
import secrets
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ..encode.cache import Cache
from ..encode.checkpoint import Checkpoint, find_checkpoint
from ..encode.errors import CacheMismatch, ModelError, SettingsError
from ..encode.manifest import differences
from ..encode.reader import Reader
from ..encode.settings import dump
from .checkpoint import Progress, export, find, resume, save
from .config import TrainConfig
from .data import Batches, Order, Samples, null_conditioning
from .metrics import Metrics
from .model import load_unet
from .objective import draw, loss


def train(config: TrainConfig) -> None:
    """Train a UNet from a cache and save the pipeline.

    Raises:
        Ip2pError: anything the user can mend.
    """
    accelerator = start(config)
    cache = Cache.open(config.cache)
    cache.check_files()
    checkpoint = base_checkpoint(config, cache, accelerator)
    samples, reader = Samples.of(cache, config.max_train_samples), Reader(cache)
    null = null_conditioning(cache, reader, accelerator.device)
    scheduler = noise_scheduler(checkpoint)

    unet = load_unet(config, checkpoint)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=True)
    optimizer = make_optimizer(config, unet, accelerator)
    per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    total = config.max_train_steps or math.ceil(config.num_train_epochs * len(samples.rows) / per_step)
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    progress = Progress(cache.manifest["identity"] | cache.manifest["encoding"], agreed_seed(config))
    accelerator.register_for_checkpointing(progress, lr_scheduler)
    if config.use_ema:
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    if previous := find(config.output_dir, config.resume_from_checkpoint):
        resume(accelerator, previous)
        if config.seed not in (None, progress.seed):
            raise SettingsError(f"--seed {config.seed}: {previous} was trained with seed {progress.seed}, leave it out")
    save_config(config, progress.seed, accelerator)

    order = Order(len(samples.rows), len(cache.views), progress.seed)
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = Batches(
        reader,
        samples,
        order,
        accelerator.device,
        batch_size=config.train_batch_size,
        start=progress.samples + rank * config.train_batch_size,
        stride=processes * config.train_batch_size,
    )
    metrics = Metrics(accelerator, config.output_dir, every=config.logging_steps, total=total, done=progress.step)
    last = config.gradient_accumulation_steps - 1
    while progress.step < total:
        step_loss = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            batch = next(batches)
            draws = draw(batch, len(scheduler.alphas_cumprod), progress.seed, progress.step, micro, rank)
            with contextlib.nullcontext() if micro == last else accelerator.no_sync(unet):
                micro_loss = loss(
                    unet,
                    scheduler,
                    batch,
                    draws,
                    null,
                    scaling_factor=checkpoint.scaling_factor,
                    dropout=config.dropout,
                )
                accelerator.backward(micro_loss / config.gradient_accumulation_steps)
            step_loss += micro_loss.detach() / config.gradient_accumulation_steps
        accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not optimizer.step_was_skipped:
            lr_scheduler.step()
        if config.use_ema:
            ema.step(unet.parameters())
        progress.step += 1
        progress.samples += per_step
        metrics.step(progress.step, step_loss, lr_scheduler.get_last_lr()[0], per_step, batches.waited)
        if progress.step % config.checkpointing_steps == 0 or progress.step == total:
            save(accelerator, config.output_dir, progress.step, config.checkpoints_total_limit)
    batches.close()
    metrics.close()
    if accelerator.is_main_process:
        result: Any = accelerator.unwrap_model(unet)
        if config.use_ema:
            ema.copy_to(result.parameters())
        export(result, checkpoint, cache.manifest["encoding"]["resolution"], config.output_dir)
        print(f"saved the pipeline in {config.output_dir}: try `ip2p-infer --model {config.output_dir} …`")
    accelerator.end_training()


def start(config: TrainConfig) -> Accelerator:
    """Set up devices, processes and trackers."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    config.output_dir.mkdir(parents=True, exist_ok=True)
    folders = ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / config.logging_dir))
    tracker = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=tracker, project_config=folders)
    except ValueError as error:
        raise SettingsError(f"{error} (--mixed_precision {config.mixed_precision}, --report_to {tracker})") from None
    return accelerator


def base_checkpoint(config: TrainConfig, cache: Cache, accelerator: Accelerator) -> Checkpoint:
    """Find the model, and make sure that the cache was encoded with its VAE and text encoder.

    Raises:
        CacheMismatch: it was not; the message says where they differ.
    """
    with accelerator.main_process_first():
        checkpoint = find_checkpoint(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            vae=cache.manifest["model"]["vae"],
            cache_dir=config.cache_dir,
        )
    names = ("in the cache", f"in {config.pretrained_model_name_or_path}")
    if different := differences(cache.manifest, {"identity": checkpoint.identity()}, ["identity"], names):
        raise CacheMismatch(
            f"{cache.folder} was not encoded with {config.pretrained_model_name_or_path}: train the model that it was "
            f"made with ({cache.manifest['model']['name']}), or run ip2p-encode with this one into another --cache\n"
            + "\n".join(different)
        )
    return checkpoint


def noise_scheduler(checkpoint: Checkpoint) -> DDPMScheduler:
    """The noise schedule that the base model was trained with."""
    scheduler = DDPMScheduler.from_pretrained(checkpoint.folder, subfolder="scheduler")
    if (kind := scheduler.config["prediction_type"]) not in ("epsilon", "v_prediction"):
        raise ModelError(f"{checkpoint.folder}/scheduler predicts {kind}, expected epsilon or v_prediction")
    return scheduler


def make_optimizer(config: TrainConfig, unet: UNet2DConditionModel, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW, fused or in 8 bits."""
    scale = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    options: dict[str, Any] = {
        "lr": config.learning_rate * (scale if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(unet.parameters(), fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            "--use_8bit_adam needs bitsandbytes: pip install 'ip2p[gpu]', or leave the flag out"
        ) from None
    return AdamW8bit(unet.parameters(), **options)


def agreed_seed(config: TrainConfig) -> int:
    """The seed of the flags, or one that all processes agree on."""
    seed = [secrets.randbits(32) if config.seed is None else config.seed]
    broadcast_object_list(seed)
    return seed[0]


def save_config(config: TrainConfig, seed: int, accelerator: Accelerator) -> None:
    """Keep the resolved configuration beside the results; `--config` reads it."""
    if accelerator.is_main_process:
        settings = dump(config) | {"seed": seed}
        Path(config.output_dir, "train.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        accelerator.init_trackers("ip2p", {name: str(value) for name, value in settings.items()})
