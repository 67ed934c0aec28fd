"""Where model and dataset of a cache are, as it records them or as flags of `ip2p-cache` say."""

import dataclasses
from pathlib import Path
from typing import Any

from ..base.errors import SettingsError
from ..base.flags import build
from ..config import EncodeConfig


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the model of a cache is now; by default where it was when the cache was made."""

    pretrained_model_name_or_path: str | None = None
    """The model that made the cache. Default: as recorded."""
    pretrained_vae_model_name_or_path: str | None = None
    """The other VAE that made it, if there was one. Default: as recorded."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads. Default: as recorded."""


@dataclasses.dataclass(frozen=True)
class FullOrigin(Origin):
    """Where model and dataset of a cache are now; by default where they were when the cache was made."""

    dataset_name: str | None = None
    """The dataset that was encoded. Default: as recorded."""
    train_data_dir: Path | None = None
    """The folder of images that was encoded. Default: as recorded."""
    clip_model: str | None = None
    """The CLIP that judged the pairs, if one did. Default: as recorded."""

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_data_dir:
            raise SettingsError("give either --dataset_name or --train_data_dir: what was encoded")


RECORDED, ALL_RECORDED = Origin(), FullOrigin()


def recorded_config(manifest: dict[str, Any], origin: Origin) -> EncodeConfig:
    """The flags of the encode that made a cache, with those of `origin` that are given in their place.

    Raises:
        SettingsError: a CLIP is given, and none has judged.
    """
    given = {name: value for name, value in vars(origin).items() if value is not None}
    if given.keys() & {"dataset_name", "train_data_dir"}:  # one takes the place of the other
        given = {"dataset_name": None, "train_data_dir": None} | given
    judged = manifest.get("pair_scores")  # by whichever encode, and the settings are of the last one
    if not judged and "clip_model" in given:
        raise SettingsError("no CLIP has judged the pairs of this cache: leave out --clip_model")
    names = judged["captions"] if judged else (None, None)
    scores = {"pair_scores": bool(judged), "clip_model": judged and judged["clip_model"]}
    scores |= dict(zip(("original_caption_column", "edited_caption_column"), names, strict=True))
    return build(EncodeConfig, manifest["settings"] | scores | given)
