"""Tests of views over a whole encode: crops, flips and sizes, from the flags to what training sees."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

import fakes
import tiny
from ip2p.encode.base.errors import CacheMismatch, SettingsError
from ip2p.encode.base.flags import parse
from ip2p.encode.cache.format import Cache, View
from ip2p.encode.cached import Samples
from ip2p.encode.config import EncodeConfig
from ip2p.encode.data.pairs import Pair
from ip2p.encode.geometry import Geometry
from ip2p.train.data.order import Order

CROPS = {"resize_mode": "random_crop", "crops": 3}


def png(number: int, size: tuple[int, int]) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    tiny.picture(number, size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> fakes.Pairs:
    """Six pairs, wide and tall, that the encodes of a test read; every other one names a side."""
    sizes, texts = [(40, 10), (10, 30)], ["make it red", "Put it on the LEFT"]
    pairs = [Pair(png(2 * n, sizes[n % 2]), png(2 * n + 1, sizes[n % 2]), texts[n % 2]) for n in range(6)]
    source = fakes.Pairs(pairs)
    fakes.install(monkeypatch, source, rows=4)
    return source


def numbers(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """All of `original` and `edited`, (rows, views, ...)."""
    arrays = cache.arrays("images")
    return np.asarray(arrays["original"][:]), np.asarray(arrays["edited"][:])


def check(cache: Cache, source: fakes.Pairs) -> None:
    """Every view of every sample holds the moments of that view of its own pair."""
    geometry, (original, edited) = Geometry.of(cache.manifest["encoding"]), numbers(cache)
    samples = cache.samples().to_pylist()
    assert [sample["status"] for sample in samples] == ["ok"] * len(source)
    for sample, pair in zip(samples, source, strict=True):
        pixels, sizes = geometry.read(pair[:2], sample["pair"], [View.parse(name) for name in cache.views])
        for view, both in enumerate(torch.from_numpy(pixels)):
            expected = fakes.moments(both).numpy()
            assert np.array_equal(original[sample["row"], view], expected[0, :4])
            assert np.array_equal(edited[sample["row"], view], expected[1])
        assert [sample["crop_top"], sample["crop_left"]] == [[size[4] for size in sizes], [size[5] for size in sizes]]


def test_every_random_crop_of_both_images_is_stored(source: fakes.Pairs, tmp_path: Path) -> None:
    """Three crops and their flips are six views, at places that differ."""
    fakes.encode(tmp_path, random_flip=True, **CROPS)
    cache = Cache.open(tmp_path)
    assert cache.views == ["crop0", "crop1", "crop2", "crop0-flip", "crop1-flip", "crop2-flip"]
    check(cache, source)
    wide = cache.samples().to_pylist()[0]
    assert len(set(wide["crop_left"][:3])) == 3
    assert [left + right for left, right in zip(wide["crop_left"][:3], wide["crop_left"][3:], strict=True)] == [24] * 3
    assert wide["crop_top"] == [0] * 6


def test_crops_and_flips_can_be_added_to_a_finished_cache(source: fakes.Pairs, tmp_path: Path) -> None:
    """What is there stays as it is and where it is; what is new is encoded, and nothing twice."""
    fakes.encode(tmp_path, resize_mode="random_crop", crops=2)
    before = numbers(Cache.open(tmp_path))
    fakes.Encoders.log.clear()
    fakes.encode(tmp_path, random_flip=True, **CROPS)
    cache = Cache.open(tmp_path)
    assert cache.views == ["crop0", "crop1", "crop2", "crop0-flip", "crop1-flip", "crop2-flip"]
    assert len(fakes.Encoders.log) == 6 * 4
    check(cache, source)
    for old, new in zip(before, numbers(cache), strict=True):
        assert np.array_equal(old, new[:, :2])
    fakes.Encoders.log.clear()
    fakes.encode(tmp_path, resize_mode="random_crop", crops=1)
    assert Cache.open(tmp_path).views == cache.views
    assert not fakes.Encoders.log


def test_the_end_of_a_run_says_what_shapes_and_words_mean(
    source: fakes.Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs of two sizes, originals that every crop shows whole, and instructions that are kept from the flip."""
    source += [
        Pair(png(20, (40, 10)), png(21, (20, 5)), "add snow"),
        Pair(png(22, (9, 9)), png(23, (9, 9)), "add rain"),
    ]
    fakes.encode(tmp_path, random_flip=True, **CROPS)
    said = capsys.readouterr().out
    assert "1 pairs have images of two sizes" in said
    assert "1 originals have no more than is shown: all their crops are the same" in said
    assert "3 instructions match --no_flip_regex" in said
    check(Cache.open(tmp_path), source)


def shown(cache: Cache) -> dict[str, set[str]]:
    """For each instruction, the views that training sees in many epochs."""
    table, samples = cache.samples().to_pylist(), Samples.of(cache, None)
    drawn, views = Order(len(table), len(cache.views), seed=1)(0, 200 * len(table))
    seen: dict[str, set[str]] = {}
    for number, view in zip(drawn, samples.views[drawn, views], strict=True):
        seen.setdefault(table[number]["instruction"], set()).add(cache.views[view])
    return seen


def test_instructions_that_name_a_side_are_never_shown_flipped(source: fakes.Pairs, tmp_path: Path) -> None:
    """The same crop is shown unflipped instead; all others are shown in every view."""
    fakes.encode(tmp_path, random_flip=True, **CROPS)
    seen = shown(Cache.open(tmp_path))
    assert seen["make it red"] == {"crop0", "crop1", "crop2", "crop0-flip", "crop1-flip", "crop2-flip"}
    assert seen["Put it on the LEFT"] == {"crop0", "crop1", "crop2"}


def test_what_is_kept_from_the_flip_can_be_changed_without_encoding(source: fakes.Pairs, tmp_path: Path) -> None:
    """Instructions may share a pair, so the choice is a column of the samples and touches no number."""
    source.append(source[0]._replace(instruction="turn it to the right"))
    fakes.encode(tmp_path, random_flip=True)
    fakes.Encoders.log.clear()
    both, samples = {"plain", "flip"}, Cache.open(tmp_path).samples().to_pylist()
    assert samples[0]["row"] == samples[-1]["row"]
    names = "make it red", "Put it on the LEFT", "turn it to the right"
    assert shown(Cache.open(tmp_path)) == dict(zip(names, [both, {"plain"}, {"plain"}], strict=True))
    fakes.encode(tmp_path, random_flip=True, no_flip_regex="none")
    assert shown(Cache.open(tmp_path)) == dict.fromkeys(names, both)
    fakes.encode(tmp_path, random_flip=True, no_flip_regex="^turn|RED")
    assert shown(Cache.open(tmp_path)) == dict(zip(names, [{"plain"}, both, {"plain"}], strict=True))
    assert not fakes.Encoders.log


@pytest.mark.parametrize(
    ("instruction", "flip"),
    [
        ("make him look left", False),
        ("Move the right-hand lamp", False),
        ("the leftmost tree", False),
        ("rotate it counterclockwise", False),
        ("add leftover pizza", True),
        ("a bright copyright sign", True),
        ("make it snow", True),
    ],
)
def test_the_offered_pattern_knows_whole_words(
    instruction: str, flip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that contain left or right by chance are flipped like any other."""
    fakes.install(monkeypatch, fakes.Pairs([Pair(fakes.png(0), fakes.png(1), instruction)]), rows=4)
    fakes.encode(tmp_path, random_flip=True)
    assert Cache.open(tmp_path).samples()["flip"].to_pylist() == [flip]


def test_a_pair_that_cannot_be_decoded_stands_aside_in_all_views(source: fakes.Pairs, tmp_path: Path) -> None:
    """Its neighbors in the batch are encoded as ever."""
    source.insert(1, Pair(png(30, (40, 10)), b"torn", "make it red"))
    fakes.encode(tmp_path, random_flip=True, **CROPS)
    cache = Cache.open(tmp_path)
    samples = cache.samples().to_pylist()
    assert [sample["status"] for sample in samples] == ["ok", "quarantined", *["ok"] * 5]
    assert np.isnan(numbers(cache)[1][samples[1]["row"]]).all()
    assert np.isfinite(numbers(cache)[1][samples[2]["row"]]).all()


def test_center_crop_is_diffusers_name_of_a_resize_mode(source: fakes.Pairs, tmp_path: Path) -> None:
    """Both flags make the same cache."""
    fakes.encode(tmp_path, center_crop=True)
    check(Cache.open(tmp_path), source)
    fakes.Encoders.log.clear()
    fakes.encode(tmp_path, resize_mode="center_crop")
    assert not fakes.Encoders.log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"background": "black"}, "background: white in the cache, black asked for"),
        ({"resize_mode": "random_crop"}, "resize_mode: squash in the cache, random_crop asked for"),
    ],
)
def test_another_geometry_is_another_encoding(
    source: fakes.Pairs, tmp_path: Path, flags: dict[str, str], message: str
) -> None:
    """One cache never mixes two of them."""
    fakes.encode(tmp_path)
    with pytest.raises(CacheMismatch, match=message):
        fakes.encode(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"background": "whit"}, "--background whit: expected a color"),
        ({"no_flip_regex": "(left"}, r"--no_flip_regex \(left: missing \)"),
        ({"center_crop": True, "resize_mode": "random_crop"}, "exclude each other"),
        ({"crops": 0}, "--crops 0: expected 1 or more"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path: Path, flags: dict[str, object], message: str) -> None:
    """The message names the flag and what was expected."""
    given = {"pretrained_model_name_or_path": "model", "cache": tmp_path, "dataset_name": "data"} | flags
    argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    with pytest.raises(SettingsError, match=message):
        parse(EncodeConfig, argv, "ip2p-encode")
