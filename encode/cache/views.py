"""The views of a pair that a cache holds: plain, flip, crop0, crop0-flip and so on."""

from collections.abc import Sequence
from typing import NamedTuple


class View(NamedTuple):
    """What is seen of a pair: which of its random crops, if there are any, and whether it is flipped."""

    crop: int | None
    flip: bool

    @classmethod
    def parse(cls, name: str) -> "View":
        """The view called plain, flip, crop0, crop0-flip, ..."""
        crop = name.removesuffix("-flip").removeprefix("crop")
        return cls(int(crop) if crop.isdecimal() else None, name.endswith("flip"))

    @property
    def name(self) -> str:
        if self.crop is None:
            return "flip" if self.flip else "plain"
        return f"crop{self.crop}" + ("-flip" if self.flip else "")


def view_names(crops: int | None, flip: bool) -> list[str]:
    """The views of a pair with some number of random crops, or none, and perhaps their flips."""
    return [View(crop, f).name for f in (False, True)[: 1 + flip] for crop in (range(crops) if crops else [None])]


def joined_views(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """All views of a cache that has `old` ones and is asked for `new` ones; each crop has its flip, or none has."""
    views = [View.parse(name) for name in (*old, *new)]
    crops = max((view.crop + 1 for view in views if view.crop is not None), default=None)
    return list(dict.fromkeys([*old, *view_names(crops, any(view.flip for view in views))]))
