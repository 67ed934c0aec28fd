"""Encodes a few samples of a cache afresh and measures how far the cached numbers are from that."""

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from ..base.console import bar
from ..base.errors import CacheMismatch, ImageError, SourceError
from ..base.files import content_key
from ..cache.format import Cache, View, differences
from ..cache.shapes import latents_of
from ..config import EncodeConfig
from ..data.pairs import Pairs, open_pairs
from ..geometry import Geometry, Shape
from ..models.checkpoint import find_checkpoint
from ..models.encoders import DTYPES, Encoders

TOLERANCE = 16
"""Rounding errors of half precision (or of the encoders', if coarser) by which two encodings of a sample may differ."""


class Deviation(NamedTuple):
    """The worst difference in one array. The relative one is to the value, or to its row's RMS where that is larger."""

    absolute: float
    relative: float
    tolerated: float  # of the relative one

    @property
    def is_wrong(self) -> bool:
        return not self.relative <= self.tolerated  # NaN is wrong, too


def reencode(cache: Cache, config: EncodeConfig, count: int) -> dict[str, Deviation]:
    """Compare `count` random samples, always the same, in all views with a fresh encoding; by array.

    Args:
        cache: a sound cache.
        config: names the model and the dataset it was made from.

    Raises:
        CacheMismatch: the model is another one.
        SourceError: the dataset is another one.
    """
    checkpoint = find_checkpoint(config.model, without=("unet",))
    identity = {"identity": checkpoint.identity()}
    if lines := differences(cache.manifest, identity, ("identity",), ("in the cache", "in the model")):
        made = f"{cache.folder} was not made by {config.model.pretrained_model_name_or_path}"
        mend = "name its model with --pretrained_model_name_or_path"
        raise CacheMismatch("\n".join([f"{made}: {mend}", *lines]))
    source = open_pairs(config.dataset, config.model.cache_dir)
    encoding = cache.manifest["encoding"]
    text_dtype, vae_dtype = DTYPES[encoding["mixed_precision"]], DTYPES[encoding["vae_precision"]]
    encoders = Encoders(checkpoint, torch.device(PartialState().device or "cpu"), text_dtype, vae_dtype)
    samples = [sample for sample in cache.samples().to_pylist() if sample["status"] == "ok"]
    worst: dict[str, Deviation] = {}
    for sample in bar(random.Random(0).sample(samples, min(count, len(samples))), "re-encode", "sample"):
        cached, fresh = _cached(cache, sample), _fresh(cache, encoders, source, sample)
        for name, values in fresh.items():
            dtype = text_dtype if name in ("text", "pooled") else encoders.vae_dtype
            tolerated = TOLERANCE * max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
            found = Deviation(*_difference(cached[name], values), tolerated)
            worst[name] = Deviation(*map(max, found, worst.get(name, found)))
    return worst


def _cached(cache: Cache, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a cache holds of a sample, by array, (views or 1, ...)."""
    arrays = cache.arrays("text") if cache.holds_text else {}
    texts = {name: np.asarray(array[sample["text_row"]])[None] for name, array in arrays.items()}
    return _split(latents_of(cache, sample)) | texts


def _fresh(cache: Cache, encoders: Encoders, source: Pairs, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same, encoded now."""
    position = sample["position"]
    pair = source[position] if position < len(source) else None
    if pair is None or content_key(pair.original or b"", pair.edited or b"") != sample["pair"]:
        other = f"{source.name} holds another pair than {cache.folder} at position {position:,}"
        raise SourceError(f"{other}: name the dataset that was encoded with --dataset_name")
    try:
        views = [View.parse(name) for name in cache.views]
        shape, geometry = Shape(sample["height"], sample["width"]), Geometry.of(cache.manifest["encoding"])
        pixels, _ = geometry.read(pair[:2], sample["pair"], views, shape)  # (V, 2, 3, H, W)
    except ImageError as error:
        raise SourceError(f"{source.name}, position {position:,}: {error}, but once could be") from None
    encoded = encoders.moments(torch.from_numpy(pixels).flatten(0, 1))()  # (V * 2, 8, h, w)
    moments = encoded.unflatten(0, (-1, 2)).numpy()
    images = _split({"original": moments[:, 0, : moments.shape[2] // 2], "edited": moments[:, 1]})
    if not cache.holds_text:
        return images
    text, pooled = encoders.embed([sample["instruction"]])()
    return images | {"text": text.numpy()} | ({} if pooled is None else {"pooled": pooled.numpy()})


def _split(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    mean, log_variance = np.split(images["edited"], 2, axis=1)
    return {"original": images["original"], "edited mean": mean, "edited log variance": log_variance}


def _difference(cached: np.ndarray, fresh: np.ndarray) -> tuple[float, float]:
    """The worst absolute and relative difference of two arrays (rows, ...)."""
    a, b = (values.astype(np.float64).reshape(len(values), -1) for values in (cached, fresh))
    error = np.abs(a - b)
    scale = np.maximum(np.abs(b), np.sqrt(np.mean(b**2, axis=1, keepdims=True)))
    return float(error.max()), float((error / np.maximum(scale, np.finfo(np.float16).tiny)).max())
