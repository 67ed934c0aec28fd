"""What a cache was made from: model and dataset as its manifest records them, unless flags name others."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EncodeConfig
from .models.checkpoint import Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from .keeper.__main__ import Origin


def recorded_config(manifest: dict[str, Any], origin: "Origin") -> EncodeConfig:
    """The flags of the encode that made a cache, with those of `origin` that are given in their place."""
    names = {field.name for field in dataclasses.fields(EncodeConfig)}
    flags = {name: value for name, value in manifest["settings"].items() if name in names}
    given = {name: value for name, value in vars(origin).items() if name in names and value is not None}
    if given.keys() & {"dataset_name", "train_data_dir"}:  # one takes the place of the other
        flags |= {"dataset_name": None, "train_data_dir": None}
    flags |= given
    for name in ("cache", "cache_dir", "train_data_dir"):
        flags[name] = Path(flags[name]) if flags[name] is not None else None
    return EncodeConfig(**flags)


def named_checkpoint(config: EncodeConfig, without: tuple[str, ...] = ("unet",)) -> Checkpoint:
    """The checkpoint that these flags name."""
    return find_checkpoint(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
        single_file_config=config.single_file_config,
        cache_dir=config.cache_dir,
        without=without,
    )
