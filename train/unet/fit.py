"""Whether what a checkpoint holds is what a run needs."""

from typing import Any

from torch import Tensor


class Misfit(Exception):
    """What a checkpoint holds is not what the run needs; says what it lacks."""


def fit(found: Any, needed: Any, where: str = "") -> None:
    """Raise Misfit unless a tree of dictionaries, lists, tensors and numbers holds all that `needed` does.

    Tensors must have the shapes of those needed, which give no more than that; for None anything will do.
    """
    if isinstance(needed, dict | list):
        if type(found) is not type(needed) or (isinstance(needed, list) and len(found) != len(needed)):
            raise Misfit(f"lacks {where or 'all'} that was saved")
        for key, value in needed.items() if isinstance(needed, dict) else enumerate(needed):
            if isinstance(found, dict) and key not in found:
                raise Misfit(f"lacks {where}{key}")
            fit(found[key], value, f"{where}{key}.")
    elif isinstance(needed, Tensor):
        shape = tuple(found.shape) if isinstance(found, Tensor) else f"of a {type(found).__name__}"
        if shape != tuple(needed.shape):
            raise Misfit(f"holds {where.rstrip('.')} in shape {shape}, expected {tuple(needed.shape)}")
    elif isinstance(needed, int | float) and not isinstance(found, int | float):
        raise Misfit(f"holds {where.rstrip('.')} as a {type(found).__name__}, expected a number")
