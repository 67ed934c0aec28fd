"""A judge that embeds once what several models and scales are compared by: originals, targets, captions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ...encode.base.files import content_key
from ...encode.models.judge import Judge


class Memory(Judge):
    """Keeps each embedding, some kilobytes, by what was seen or read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def see(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """As of `Judge`."""
        return self._each(super().see, pictures)

    def see_dino(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """As of `Judge`."""
        return self._each(super().see_dino, pictures)

    def read(self, captions: Sequence[str]) -> torch.Tensor:
        """As of `Judge`."""
        return self._each(super().read, captions)

    def _each(self, embed: Callable[[list[Any]], torch.Tensor], items: Sequence[Any]) -> torch.Tensor:
        keys = [(embed.__name__, *_key(item)) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, embed(list(new.values())), strict=True))
        return torch.stack([self._known[key] for key in keys])


def _key(item: Image.Image | str) -> tuple[Any, ...]:
    return (item,) if isinstance(item, str) else (item.size, content_key(item.tobytes()))
