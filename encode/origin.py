"""What a cache was made from: model and dataset as its manifest records them, unless flags name others."""

from typing import TYPE_CHECKING, Any

from .base.flags import build, flags_of
from .config import EncodeConfig
from .models.checkpoint import Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from .keeper.__main__ import Origin


def recorded_config(manifest: dict[str, Any], origin: "Origin") -> EncodeConfig:
    """The flags of the encode that made a cache, with those of `origin` that are given in their place."""
    names = flags_of(EncodeConfig)
    given = {name: value for name, value in vars(origin).items() if name in names and value is not None}
    if given.keys() & {"dataset_name", "train_data_dir"}:  # one takes the place of the other
        given = {"dataset_name": None, "train_data_dir": None} | given
    return build(EncodeConfig, manifest["settings"] | given)


def named_checkpoint(config: EncodeConfig, without: tuple[str, ...] = ("unet",)) -> Checkpoint:
    """The checkpoint that these flags name."""
    return find_checkpoint(
        config.model.pretrained_model_name_or_path,
        revision=config.model.revision,
        variant=config.model.variant,
        vae=config.model.pretrained_vae_model_name_or_path,
        single_file_config=config.model.single_file_config,
        cache_dir=config.model.cache_dir,
        without=without,
    )
