"""The manifest of a cache: what is encoded, with what, how; and whether two manifests go together."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .base.flags import dump
from .cache.format import CONVENTION, FORMAT
from .cache.views import view_names
from .config import EncodeConfig
from .data.sources import Source
from .models.checkpoint import Checkpoint

RowShapes = dict[str, dict[str, tuple[int, ...]]]


def describe(config: EncodeConfig, source: Source, checkpoint: Checkpoint, processes: int) -> dict[str, Any]:
    """The manifest: what is encoded, with what, how."""
    return {
        "format": FORMAT,
        "ip2p": version("ip2p"),
        "model": {
            "name": config.pretrained_model_name_or_path,
            "revision": config.revision,
            "variant": config.variant,
            "vae": config.pretrained_vae_model_name_or_path,
            "single_file_config": config.single_file_config,
            "prediction_type": checkpoint.prediction_type(),
        },
        "identity": checkpoint.identity(),
        "encoding": {
            "convention": CONVENTION,
            "resolution": config.resolution,
            "resize_mode": config.resize_mode,
            "background": config.background,
            "mixed_precision": config.mixed_precision,
            "vae_precision": checkpoint.vae_precision(config.vae_precision, config.mixed_precision),
        },
        "views": view_names(config.crops if config.resize_mode == "random_crop" else None, config.random_flip),
        "dataset": {
            "name": source.name,
            "split": config.split,
            "columns": list(source.columns),
            "samples": len(source),
            "fingerprint": source.fingerprint(),
        },
        "settings": dump(config) | {"processes": processes},  # how this run was started; decides nothing
    }


def row_shapes(checkpoint: Checkpoint, resolution: int) -> RowShapes:
    """The shape of one row of each array."""
    side, channels = resolution // checkpoint.vae_scale_factor, checkpoint.latent_channels
    length, width, pooled = checkpoint.text_shape()
    text = {"text": (length, width)} | ({"pooled": (pooled,)} if pooled else {})
    return {
        "images": {"original": (channels, side, side), "edited": (2 * channels, side, side)},
        "text": text,
    }


def differences(old: dict[str, Any], new: dict[str, Any], parts: Sequence[str], names: tuple[str, str]) -> list[str]:
    """Field by field, where two manifests differ in `parts`; `names` say whose value is whose."""
    fields = [(part, field) for part in parts for field in old[part] | new[part]]
    return [
        f"  {field}: {old[part].get(field)} {names[0]}, {new[part].get(field)} {names[1]}"
        for part, field in fields
        if old[part].get(field) != new[part].get(field)
    ]
