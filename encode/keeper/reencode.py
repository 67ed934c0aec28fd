"""Encodes and judges a few samples of a cache afresh and measures how far the cached numbers are from that."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from ..base.console import bar
from ..base.errors import CacheMismatch, ImageError, SourceError
from ..cache.format import Cache, View, differences
from ..cache.shapes import latents_of
from ..config import EncodeConfig
from ..data.opening import open_pairs
from ..data.pairs import Pairs
from ..data.pictures import open_picture
from ..geometry import Geometry, Shape
from ..models.checkpoint import find_checkpoint
from ..models.encoders import DTYPES, Encoders
from ..models.judge import Judge

TOLERANCE = 16
"""Rounding errors of half precision (or of the encoders', if coarser) by which two encodings of a sample may differ."""
JUDGED = 0.01
"""By how much two scores of a pair may differ: where pictures differ little, rounding decides on the direction."""


class Deviation(NamedTuple):
    """The worst difference in one array, or of one score. The relative one is to the value, or to its row's RMS where
    that is larger; of scores, which are cosines, to 1."""

    absolute: float
    relative: float
    tolerated: float  # of the relative one

    @property
    def is_wrong(self) -> bool:
        return not self.relative <= self.tolerated  # NaN is wrong, too


def reencode(cache: Cache, config: EncodeConfig, count: int) -> dict[str, Deviation]:
    """Compare `count` random samples, always the same, in all views with a fresh encoding; by array and score.

    Args:
        cache: a sound cache.
        config: names the model and the dataset it was made from.

    Raises:
        CacheMismatch: the model is another one, or the CLIP.
        SourceError: the dataset is another one.
    """
    checkpoint = find_checkpoint(config.model, without=("unet",))
    identity = {"identity": checkpoint.identity()}
    if lines := differences(cache.manifest, identity, ("identity",), ("in the cache", "in the model")):
        made = f"{cache.folder} was not made by {config.model.pretrained_model_name_or_path}"
        mend = "name its model with --pretrained_model_name_or_path"
        raise CacheMismatch("\n".join([f"{made}: {mend}", *lines]))
    source = open_pairs(config.dataset, config.model.cache_dir, config.scores)
    encoding = cache.manifest["encoding"]
    text_dtype, vae_dtype = DTYPES[encoding["mixed_precision"]], DTYPES[encoding["vae_precision"]]
    encoders = Encoders(checkpoint, torch.device(PartialState().device or "cpu"), text_dtype, vae_dtype)
    samples = [sample for sample in cache.samples().to_pylist() if sample["status"] == "ok"]
    chosen, worst = random.Random(0).sample(samples, min(count, len(samples))), dict[str, Deviation]()
    for sample in bar(chosen, "re-encode", "sample"):
        cached, fresh = _cached(cache, sample), _fresh(cache, encoders, source, sample)
        for name, values in fresh.items():
            dtype = text_dtype if name in ("text", "pooled") else encoders.vae_dtype
            tolerated = TOLERANCE * max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
            found = Deviation(*_difference(cached[name], values), tolerated)
            worst[name] = Deviation(*map(max, found, worst.get(name, found)))
    return worst | _rejudged(cache, config, source, [sample for sample in chosen if sample.get("clip_of")])


def _rejudged(
    cache: Cache, config: EncodeConfig, source: Pairs, samples: Sequence[dict[str, Any]]
) -> dict[str, Deviation]:
    """The same of the scores of samples that were judged, and that the dataset still holds in their places."""
    if not samples:
        return {}
    name, worst = str(config.scores.clip_model), defaultdict[str, float](float)
    judge, background = Judge(name, None, cache_dir=config.model.cache_dir), cache.manifest["encoding"]["background"]
    if judge.identity != cache.manifest["pair_scores"]["clip"]:
        raise CacheMismatch(f"{cache.folder} was not judged by {name}: name its CLIP with --clip_model")
    captions = source.captions(np.array([sample["position"] for sample in samples]))
    texts = zip(*(column.to_pylist() for column in captions), strict=True)
    for sample, told in bar([*zip(samples, texts, strict=True)], "judge", "sample"):
        pictures = [open_picture(file or b"", background) for file in source[sample["position"]][:2]]
        original, edited = judge.see(pictures)[:, None]
        for score, (fresh,) in judge.compare(original, edited, [told]).items():
            known = sample[score]
            other = 0 if known is fresh else math.inf  # where one of them is None
            worst[score] = max(worst[score], other if None in (known, fresh) else abs(known - (fresh or 0)))
    return {score: Deviation(found, found, JUDGED) for score, found in worst.items()}


def _cached(cache: Cache, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a cache holds of a sample, by array, (views or 1, ...)."""
    arrays = cache.arrays("text") if cache.holds_text else {}
    texts = {name: np.asarray(array[sample["text_row"]])[None] for name, array in arrays.items()}
    return _split(latents_of(cache, sample)) | texts


def _fresh(cache: Cache, encoders: Encoders, source: Pairs, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same, encoded now."""
    position = sample["position"]
    pair = source[position] if position < len(source) else None
    if pair is None or pair.key != sample["pair"]:
        other = f"{source.name} holds another pair than {cache.folder} at position {position:,}"
        raise SourceError(f"{other}: name the dataset that was encoded with --dataset_name")
    try:
        views = [View.parse(name) for name in cache.views]
        shape, geometry = Shape(sample["height"], sample["width"]), Geometry.of(cache.manifest["encoding"])
        pixels, sizes = geometry.read(pair[:2], sample["pair"], views, shape)  # (V, 2, 3, H, W)
        masks = geometry.masks(pair.mask, sizes[0][:2], sample["pair"], views, shape, cache.factor)
    except ImageError as error:
        raise SourceError(f"{source.name}, position {position:,}: {error}, but once could be") from None
    encoded = encoders.moments(torch.from_numpy(pixels).flatten(0, 1))()  # (V * 2, 8, h, w)
    moments = encoded.unflatten(0, (-1, 2)).numpy()
    images = {"original": moments[:, 0, : moments.shape[2] // 2], "edited": moments[:, 1]}
    images = _split(images | ({"mask": masks} if cache.manifest.get("masks") else {}))
    if not cache.holds_text:
        return images
    text, pooled = encoders.embed([sample["instruction"]])()
    return images | {"text": text.numpy()} | ({} if pooled is None else {"pooled": pooled.numpy()})


def _split(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rest = dict(images)
    mean, log_variance = np.split(rest.pop("edited"), 2, axis=1)
    return rest | {"edited mean": mean, "edited log variance": log_variance}


def _difference(cached: np.ndarray, fresh: np.ndarray) -> tuple[float, float]:
    """The worst absolute and relative difference of two arrays (rows, ...)."""
    a, b = (values.astype(np.float64).reshape(len(values), -1) for values in (cached, fresh))
    error = np.abs(a - b)
    scale = np.maximum(np.abs(b), np.sqrt(np.mean(b**2, axis=1, keepdims=True)))
    return float(error.max()), float((error / np.maximum(scale, np.finfo(np.float16).tiny)).max())
