"""What a row of each array holds, and latents of several shapes in rows of one."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from .format import ARRAYS, Cache, Record

Cells = TypeVar("Cells", bound=Any)  # an array of numpy or a tensor
RowShapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The shape of one row of each array, by kind and name."""


def row_shapes(
    channels: int, cells: tuple[int, ...], tokens: int, width: int, pooled: int | None, *, masks: bool = False
) -> RowShapes:
    """Shapes of latents (channels, *cells), maybe masks (1, *cells), instructions (tokens, width), for SDXL (pooled,).

    `cells` is height and width where all latents have one shape, else the largest number of them: see `shaped`.
    """
    images = {"original": (channels, *cells), "edited": (2 * channels, *cells)} | (
        {"mask": (1, *cells)} if masks else {}
    )
    return {"images": images, "text": {"text": (tokens, width)} | ({"pooled": (pooled,)} if pooled else {})}


def misfit(cache: Cache) -> str | None:
    """What the manifest of a cache says otherwise than its arrays, as no encode writes it; None where they agree."""
    arrays, manifest = {kind: cache.arrays(kind) for kind in ARRAYS}, cache.manifest
    views, _, *cells = arrays["images"]["original"].shape[1:]
    said = {"views": len(cache.views), "masks": bool(manifest.get("masks")), "vae_scale_factor": cache.factor}
    side = math.isqrt(math.prod(cells))  # of the square, which has the most cells of several shapes
    found = {"views": views, "masks": "mask" in arrays["images"]}
    found |= {"vae_scale_factor": manifest["encoding"]["resolution"] // side}
    for kind, those in arrays.items():
        said |= {f"shard_rows of {name}": cache.shard_rows[kind] for name in those}
        found |= {f"shard_rows of {name}": (array.shards or array.chunks)[0] for name, array in those.items()}
    other = next((name for name in said if said[name] != found[name]), None)
    return other and f"says {said[other]} of {other}, and the arrays say {found[other]}: encode anew"


def shaped(cells: Cells, height: int, width: int) -> Cells:
    """Latents (..., height, width) out of rows that have room for the largest shape, zeros after them; a view."""
    return cells[..., : height * width].reshape(*cells.shape[:-1], height, width)


def latents_of(cache: Cache, sample: Record) -> dict[str, np.ndarray]:
    """What is cached of a sample of the table, by array, (views, channels, h, w)."""
    rows = {name: (array.ndim, np.asarray(array[sample["row"]])) for name, array in cache.arrays("images").items()}
    shape = [sample[side] // cache.factor for side in ("height", "width")]
    return {name: shaped(row, *shape) if dimensions == 4 else row for name, (dimensions, row) in rows.items()}
