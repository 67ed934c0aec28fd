"""Tests of verify --reencode: a fresh encoding says whether the cached numbers are right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

import tiny
from ip2p.encode.base.files import file_record, read_record, write_record
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.writer import write_state
from ip2p.encode.keeper.__main__ import main
from ip2p.encode.keeper.origin import FullOrigin, Origin, recorded_config
from ip2p.encode.keeper.reencode import reencode
from ip2p.encode.keeper.verify import verify

Encode = Callable[..., None]


def change(folder: Path, array: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write other numbers into a cache, with checksums that fit them."""
    numbers = zarr.open_group(folder / "data.zarr")[array]
    assert isinstance(numbers, zarr.Array)
    numbers[:] = function(np.asarray(numbers[:]))
    for path in (folder / "commits").glob("*.json"):
        record = read_record(path)
        write_record(path, record | {"files": {name: file_record(folder / name) for name in record["files"]}})
    cache = Cache.open(folder)
    write_state(folder, cache.manifest, cache.samples(), cache.commits())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_cache_equals_a_fresh_encoding(
    family: str, data: Path, tmp_path: Path, encode: Encode, request: pytest.FixtureRequest
) -> None:
    """All arrays of all samples, in both views, are what the encoders give now, whatever the batch size."""
    encode(request.getfixturevalue(family), data, tmp_path / "cache", random_flip=True, encode_batch_size=3)
    cache = Cache.open(tmp_path / "cache")
    found = reencode(cache, recorded_config(cache.manifest, Origin()), 100)
    pooled = {"pooled"} if family == "sdxl" else set()
    assert found.keys() == {"original", "edited mean", "edited log variance", "text"} | pooled
    for deviation in found.values():
        assert deviation.relative <= 2**-9
        assert deviation.tolerated == 16 * 2**-10


@pytest.mark.parametrize(
    ("array", "part", "function"),
    [
        ("original", "original", lambda values: values[:, ::-1]),  # the views changed places
        ("original", "original", lambda values: values * np.float16(1.05)),
        ("edited", "edited mean", lambda values: np.concatenate([values[:, :, :4] * 0.18215, values[:, :, 4:]], 2)),
        ("edited", "edited log variance", lambda values: np.concatenate([values[:, :, :4], values[:, :, 4:] / 2], 2)),
        ("text", "text", lambda values: values + np.float16(0.1)),
    ],
)
def test_wrong_numbers_with_right_checksums_are_found(
    array: str,
    part: str,
    function: Callable[[np.ndarray], np.ndarray],
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What no checksum can tell, `--reencode` tells, by the name of the array; the exit status is 1."""
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    change(folder, array, function)
    assert verify(folder) == []
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(folder), "--reencode", "2", "--json"])
    assert stopped.value.code == 1
    deviations = json.loads(capsys.readouterr().out)["reencoded"]
    wrong = [name for name, found in deviations.items() if found["relative"] > found["tolerated"]]
    assert wrong == [part]
    with pytest.raises(SystemExit):
        main(["verify", str(folder), "--reencode", "2"])
    assert f"{folder}: {part} differs from a fresh encoding" in capsys.readouterr().out


def test_model_and_dataset_may_have_moved(
    sd: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they are is taken from the manifest, unless flags say where they are now."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(sd, old / "sd")
    shutil.copytree(data, old / "pairs")
    encode(old / "sd", old / "pairs", tmp_path / "cache")
    old.rename(new)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "cache"), "--reencode", "2"])
    assert stopped.value.code == 2
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
    flags = {"pretrained_model_name_or_path": new / "sd", "dataset_name": new / "pairs", "reencode": 2}
    main(["verify", str(tmp_path / "cache"), *tiny.arguments(flags)])
    assert "is sound" in capsys.readouterr().out


def test_another_model_or_dataset_is_refused(
    cache: Path, sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What did not make the cache cannot judge it: the difference is named, with the flag that mends it."""
    others = {
        "pretrained_model_name_or_path": tiny.checkpoint(tmp_path / "other", seed=1),
        "dataset_name": tiny.dataset(tmp_path / "data", tiny.pairs(10, first=50)),
    }
    for flag, other in others.items():
        with pytest.raises(SystemExit) as stopped:
            main(["verify", str(cache), "--reencode", "1", f"--{flag}", str(other)])
        assert stopped.value.code == 2
        assert f"with --{flag}" in capsys.readouterr().err


def test_a_given_folder_of_images_takes_the_place_of_the_dataset(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--train_data_dir and --dataset_name exclude each other, whichever was recorded."""
    manifest = Cache.open(cache).manifest
    config = recorded_config(manifest, FullOrigin(train_data_dir=Path("images")))
    assert (config.dataset.dataset_name, config.dataset.train_data_dir) == (None, Path("images"))
    assert recorded_config(manifest, FullOrigin()).dataset.dataset_name == manifest["settings"]["dataset_name"]
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(cache), "--train_data_dir", "images", "--dataset_name", "pairs"])
    assert stopped.value.code == 2
    assert "either --dataset_name or --train_data_dir" in capsys.readouterr().err
