"""From images and instructions to the cache: the frozen encoders run once over a dataset."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base.errors import Ip2pError
    from .cache.format import Cache
    from .config import EncodeConfig
    from .dataset import CacheDataset
    from .run import encode

__all__ = ["Cache", "CacheDataset", "EncodeConfig", "Ip2pError", "encode"]

_PLACES = {
    "Cache": "cache.format",
    "CacheDataset": "dataset",
    "EncodeConfig": "config",
    "Ip2pError": "base.errors",
    "encode": "run",
}


def __getattr__(name: str) -> Any:
    """Import a name once it is asked for: torch takes seconds, and `ip2p-encode --help` must not wait for them."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
