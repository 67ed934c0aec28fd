"""What the flags of `ip2p-train` ask of each other: each of them acts, or is refused with what to do."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from ..encode.base.errors import SettingsError

Idle = tuple[Any, tuple[str, ...], str]
EMA = ("ema_decay", "ema_steps")
LOOKS = ("validation_steps", "validation_epochs", "num_validation_images")


def check(config: Any) -> None:
    """Raise SettingsError for a flag of a `TrainConfig` that cannot act, or is given and would do nothing.

    Given is what is not the default. That --max_train_steps wins over --num_train_epochs is as in diffusers: a
    recorded run can be cut short, or gone on with.
    """
    optimizer, watching = config.optimizer, config.watching
    if not 0 <= optimizer.ema_decay <= 1:
        raise SettingsError(f"--ema_decay {optimizer.ema_decay}: expected a number from 0 to 1")
    if optimizer.max_grad_norm == 0:
        raise SettingsError("--max_grad_norm 0 leaves nothing of any gradient: expected a number above 0, or inf")
    if config.objective.snr_gamma == 0:
        raise SettingsError("--snr_gamma 0 leaves nothing of the loss: expected a number above 0")
    if watching.image and not watching.validation_prompt:
        raise SettingsError(f"--val_image_url_or_path {watching.image} needs a --validation_prompt")
    for group, names, why in idle(config):
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if field.name in names and value != field.default:
                shown = "" if field.metadata.get("secret") else f" {value}"
                raise SettingsError(f"--{field.name}{shown} does nothing {why}")


def idle(config: Any) -> Iterator[Idle]:
    """Flags that have nothing to act on: their group, their names, and what to do."""
    model, optimizer, watching = config.model, config.optimizer, config.watching
    if os.path.exists(name := model.pretrained_model_name_or_path):
        yield model, ("revision", "non_ema_revision"), f"for {name}, which lies here: leave it out, or give a Hub id"
    if not optimizer.use_ema:
        yield optimizer, EMA, "without --use_ema: add that, or leave it out"
    if optimizer.lr_scheduler == "constant" and optimizer.lr_warmup_steps:
        yield optimizer, ("lr_warmup_steps",), "with --lr_scheduler constant: take constant_with_warmup, or 0 steps"
    if not config.saving.push_to_hub:
        yield config.saving, ("hub_token",), "without --push_to_hub: add that, or leave it out"
    if not watching.image:
        yield (
            watching,
            ("validation_prompt",),
            "without a picture to edit: add --val_image_url_or_path, or leave it out",
        )
    if not (watching.image or watching.num_validation_samples):
        what = "--num_validation_samples or --val_image_url_or_path with a --validation_prompt"
        yield watching, LOOKS, f"without anything to look at: add {what}, or leave it out"
    if watching.val_image_url_or_path:
        yield watching, ("val_image_url",), "beside --val_image_url_or_path: leave one of them out"
    if watching.validation_epochs:
        yield watching, ("validation_steps",), "beside --validation_epochs: leave one of them out"
    if watching.report_to == "none":
        yield watching, ("logging_dir",), "with --report_to none: leave one of them out"
