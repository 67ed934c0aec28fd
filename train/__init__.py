"""From the cache to a trained pipeline: only the UNet runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .run import train

__all__ = ["TrainConfig", "train"]

_PLACES = {"TrainConfig": "config", "train": "run"}


def __getattr__(name: str) -> Any:
    """Import a name once it is asked for: torch takes seconds, and `ip2p-train --help` must not wait for them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
