"""What the flags of `ip2p-train` ask of each other: each of them acts, or is refused with what to do."""

import math
from collections.abc import Iterator
from typing import Any

from ..encode.base import flags
from ..encode.base.errors import SettingsError
from ..encode.base.files import is_url

EMA = ("ema_steps", "ema_device")
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
LORA = ("lora_targets", "lora_alpha")
LOOKS = ("validation_steps", "validation_epochs", "num_validation_images")


def check(config: Any) -> None:
    """Raise SettingsError for a flag of a `TrainConfig` of whose value nothing could be learnt, or nothing seen."""
    optimizer, watching = config.optimizer, config.watching
    if not 0 <= optimizer.ema_decay <= 1:
        raise SettingsError(f"--ema_decay {optimizer.ema_decay}: expected a number from 0 to 1")
    if not 0.03 <= (optimizer.ema_length or 0.05) <= 0.2:
        raise SettingsError(f"--ema_length {optimizer.ema_length}: expected a number from 0.03 to 0.2")
    if optimizer.max_grad_norm == 0:
        raise SettingsError("--max_grad_norm 0 leaves nothing of any gradient: expected a number above 0, or inf")
    _fit_together(config)
    if config.objective.snr_gamma == 0:
        raise SettingsError("--snr_gamma 0 leaves nothing of the loss: expected a number above 0")
    if watching.score_samples > watching.num_validation_samples:
        raise SettingsError(
            f"--score_samples {watching.score_samples} are chosen among those that are held out: give "
            f"--num_validation_samples {watching.score_samples} or more"
        )
    if lacking := _best_lacks(watching):
        raise SettingsError(f"--keep_best {watching.keep_best} needs {lacking}")
    if watching.image and not watching.validation_prompt:
        raise SettingsError(f"--val_image_url_or_path {watching.image} needs a --validation_prompt")


def _best_lacks(watching: Any) -> str | None:
    """The flag without which there is no score of the kind that the best pipeline is chosen by."""
    needed = {"loss": ("num_validation_samples",), None: ()}.get(watching.keep_best, ("score_samples",))
    if str(watching.keep_best).startswith("clip"):
        needed = *needed, "clip_model"
    return next((f"--{flag}" for flag in needed if not getattr(watching, flag)), None)


def _fit_together(config: Any) -> None:
    """Raise SettingsError for flags that save memory in ways that exclude each other."""
    optimizer, precision = config.optimizer, config.machine.mixed_precision
    if optimizer.use_8bit_adam and optimizer.optimizer == "adafactor":
        raise SettingsError("--use_8bit_adam is --optimizer adamw8bit, not adafactor: leave one of them out")
    if optimizer.weights == "bf16" and config.lora.lora_rank:
        raise SettingsError(
            "--weights bf16: with --lora_rank adapters are float32, and what is frozen is in half precision as it is: "
            "leave one of them out"
        )
    if optimizer.weights == "bf16" and precision not in (None, "bf16"):
        raise SettingsError(f"--weights bf16 computes in bf16, not in --mixed_precision {precision}: leave that out")
    if optimizer.fused_backward and (why := _against_fused_backward(config)):
        raise SettingsError(f"--fused_backward changes a weight as soon as its own gradient is there: {why}")


def _against_fused_backward(config: Any) -> str:
    norm, batches = config.optimizer.max_grad_norm, config.steps.gradient_accumulation_steps
    if norm < math.inf:
        return f"it cannot clip the norm of all of them to --max_grad_norm {norm}, give inf"
    if batches > 1:
        return f"it cannot sum --gradient_accumulation_steps {batches}, give a larger --train_batch_size"
    if config.machine.mixed_precision == "fp16":
        return "it cannot skip a step of --mixed_precision fp16 in which another overflows, take bf16"
    return ""


def idle(config: Any) -> Iterator[str]:
    """What is said of flags that are set and cannot act.

    That --max_train_steps wins over --num_train_epochs is as in diffusers: a recorded run can be cut short, or gone on
    with.
    """
    optimizer, saving, watching = config.optimizer, config.saving, config.watching
    yield from config.model.idle()
    if not optimizer.use_ema:
        yield from flags.idle(optimizer, "does nothing without --use_ema: add that, or leave it out", "ema_decay")
    if not optimizer.averages:
        yield from flags.idle(optimizer, "does nothing without --use_ema: add that, or leave it out", *EMA)
    if not optimizer.ema_power:
        yield from flags.idle(optimizer, "does nothing without --ema_power: add that, or leave it out", "ema_length")
    if not config.lora.lora_rank:
        yield from flags.idle(config.lora, "does nothing without --lora_rank: add that, or leave it out", *LORA)
    if optimizer.name == "adafactor":
        yield from flags.idle(optimizer, "does nothing with --optimizer adafactor: leave one of them out", *ADAM)
    if optimizer.lr_scheduler == "constant" and optimizer.lr_warmup_steps:
        why = "does nothing with --lr_scheduler constant: take constant_with_warmup, or 0 steps"
        yield from flags.idle(optimizer, why, "lr_warmup_steps")
    if not saving.push_to_hub:
        why = "does nothing without --push_to_hub: add that, or leave it out"
        yield from flags.idle(saving, why, "hub_token", "hub_private_repo")
    if not watching.image:
        why = "does nothing without a picture to edit: add --val_image_url_or_path, or leave it out"
        yield from flags.idle(watching, why, "validation_prompt")
    if not (watching.image or watching.num_validation_samples):
        what = "--num_validation_samples or --val_image_url_or_path with a --validation_prompt"
        why = f"does nothing without anything to look at: add {what}, or leave it out"
        yield from flags.idle(watching, why, *LOOKS)
    if not watching.score_samples:
        why = "does nothing without edits to score: add --score_samples, or leave it out"
        yield from flags.idle(watching, why, "clip_model")
    if watching.val_image_url_or_path:
        why = "does nothing beside --val_image_url_or_path: leave one of them out"
        yield from flags.idle(watching, why, "val_image_url")
    if watching.validation_epochs:
        why = "does nothing beside --validation_epochs: leave one of them out"
        yield from flags.idle(watching, why, "validation_steps")
    urls = [is_url(place) for place in config.samples.cache]
    if all(urls):
        why = "does nothing for a cache at a url, whose files are checked as they arrive: leave it out"
        yield from flags.idle(config.samples, why, "verify_cache")
    if not any(urls):
        yield from flags.idle(config.samples, "does nothing without a url in --cache: leave it out", "window_dir")
    if watching.report_to == "none":
        yield from flags.idle(watching, "does nothing with --report_to none: leave one of them out", "logging_dir")
