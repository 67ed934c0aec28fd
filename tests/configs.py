"""Configurations by flat flags, as a command line gives them."""

from pathlib import Path
from typing import Any

from ip2p.encode.base.flags import build
from ip2p.encode.config import EncodeConfig
from ip2p.train.config import TrainConfig


def encode_config(model: Path | str = "model", cache: Path | str = "cache", **flags: Any) -> EncodeConfig:
    """A configuration of ip2p-encode."""
    return build(EncodeConfig, {"pretrained_model_name_or_path": str(model), "cache": cache} | flags)


def train_config(
    model: Path | str = "model", cache: Any = "cache", output_dir: Path | str = "out", **flags: Any
) -> TrainConfig:
    """A configuration of ip2p-train."""
    required = {"pretrained_model_name_or_path": str(model), "cache": cache, "output_dir": output_dir}
    return build(TrainConfig, required | flags)
