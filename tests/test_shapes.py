"""Tests of pictures that keep their shape, from the flag to the weights: one cache, one run, several shapes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import tiny
from configs import encode_config
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.cache import format as cache_module
from ip2p.encode.cache.format import Cache, View
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.shapes import latents_of
from ip2p.encode.cached import Samples
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.geometry import Geometry, Shape
from ip2p.encode.keeper.__main__ import main as keep
from ip2p.encode.keeper.verify import verify
from ip2p.train.__main__ import main
from ip2p.train.data.batches import gather
from test_train import assert_same, flags, states

Encode = Callable[..., None]
SHAPED = {"resolution": 32, "bucket_step": 4, "resize_mode": "random_crop", "crops": 2, "random_flip": True}


@pytest.fixture(scope="module")
def small_shards() -> Any:
    """Sixteen rows in a shard, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def shaped(small_shards: None, sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """A cache of fifty pairs in five shapes, two crops and their flips."""
    folder = tmp_path_factory.mktemp("shaped")
    encode(sd, tiny.dataset(folder / "data", tiny.pairs(50, sizes=tiny.SIDES)), folder / "cache", **SHAPED)
    return folder / "cache"


def fresh(model: Path, cache: Cache) -> list[np.ndarray]:
    """What the VAE alone makes of the pictures of each sample, in all views and its own shape, (V, 2, 8, h, w)."""
    vae: Any = AutoencoderKL.from_pretrained(model, subfolder="vae")
    source = open_pairs(encode_config(dataset_name=cache.manifest["dataset"]["name"]).dataset, None)
    geometry, found = Geometry.of(cache.manifest["encoding"]), []
    for sample in cache.samples().to_pylist():
        views = [View.parse(name) for name in cache.views]
        pixels, _ = geometry.read(source[sample["position"]][:2], sample["pair"], views)
        assert pixels.shape[-2:] == (sample["height"], sample["width"])
        with torch.no_grad():
            posterior = vae.encode(2 * (torch.from_numpy(pixels).flatten(0, 1).float() / 255) - 1).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        found.append(moments.unflatten(0, (len(views), 2)).half().numpy())
    return found


def test_each_picture_is_encoded_in_its_own_shape(sd: Path, shaped: Path) -> None:
    """The cache is sound, and holds the VAE's own latents of the same pixels, in room for the largest, zeros behind."""
    cache = Cache.open(shaped)
    assert verify(shaped) == []
    table, arrays = cache.samples().to_pylist(), cache.arrays("images")
    assert cache.views == ["crop0", "crop1", "crop0-flip", "crop1-flip"]
    assert arrays["edited"].shape == (50, 4, 8, 256)
    assert len({(sample["height"], sample["width"]) for sample in table}) == 5
    for sample, moments in zip(table, fresh(sd, cache), strict=True):
        found = latents_of(cache, sample)
        assert found["original"].shape[-2:] == (sample["height"] // 2, sample["width"] // 2)
        np.testing.assert_allclose(found["original"], moments[:, 0, :4], rtol=0, atol=2e-3)
        np.testing.assert_allclose(found["edited"], moments[:, 1], rtol=0, atol=2e-3)
        row = np.asarray(arrays["edited"][sample["row"]])
        assert not row[:, :, sample["height"] // 2 * sample["width"] // 2 :].any()


def test_growth_touches_no_record(
    small_shards: None,
    sd: Path,
    shaped: Path,
    tmp_path: Path,
    encode: Encode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is there stays where it is and in its shape, whatever its file's header may tell by now: the records say.

    Squares, or another step, are another encoding.
    """
    monkeypatch.setattr("ip2p.encode.geometry.header_size", lambda _: (30, 60))
    cache = Path(shutil.copytree(shaped, tmp_path / "cache"))
    records = {path.name: path.read_bytes() for path in (cache / "commits").iterdir() if "000003" not in path.name}
    data = tiny.dataset(tmp_path / "data", tiny.pairs(70, sizes=tiny.SIDES))
    encode(sd, data, cache, **SHAPED)
    assert {name: (cache / "commits" / name).read_bytes() for name in records} == records
    assert verify(cache) == []
    assert Cache.open(cache).manifest["counts"] == {"ok": 70}
    before = [sample | {"position": 0} for sample in Cache.open(shaped).samples().to_pylist()]
    assert [sample | {"position": 0} for sample in Cache.open(cache).samples().to_pylist()][:50] == before
    assert {(row["height"], row["width"]) for row in Cache.open(cache).samples().to_pylist()[50:]} == {(40, 24)}
    for other in ({"bucket_step": None}, {"bucket_step": 8}):
        with pytest.raises(SystemExit, match="2"):
            encode(sd, data, cache, **SHAPED | other)
        assert f"  bucket_step: 4 in the cache, {other['bucket_step']} asked for" in capsys.readouterr().err


def test_batches_hold_latents_in_their_shape(shaped: Path) -> None:
    """Gathered through the reader they are those of the cache, sample by sample, and views of one buffer."""
    cache = Cache.open(shaped)
    reader, samples, table = Reader(cache), Samples.of(cache, None), cache.samples().to_pylist()
    assert reader.largest == (4, 16, 16)
    for shape, members in samples.by_shape().items():
        batch = gather(reader, samples, members, torch.device("cpu"))
        assert batch.edited.shape == (len(members), 8, *shape)
        for number, original, edited in zip(members, batch.original, batch.edited, strict=True):
            found = latents_of(cache, table[number])
            assert np.array_equal(original, found["original"][0])
            assert np.array_equal(edited, found["edited"][0])


def test_training_goes_through_all_shapes_and_goes_on_exactly(
    sd: Path, shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle and resumed it is as undisturbed; held-out pictures are seen in their own shape."""
    how = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 3, "num_validation_samples": 9}
    how |= {"num_validation_images": 1, "validation_steps": 4, "gradient_accumulation_steps": 2}
    main(flags(sd, shaped, tmp_path / "straight", **how))
    said = capsys.readouterr().out
    state = torch.load(tmp_path / "straight" / "checkpoint-4" / "custom_checkpoint_0.pkl")
    assert sum(state["seen"]) == state["samples"] == 24
    assert len(state["seen"]) == 5
    assert min(state["seen"]) > 0
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    main(flags(sd, shaped, tmp_path / "again", **how, resume_from_checkpoint="latest"))
    assert "anew" not in said + capsys.readouterr().out
    assert_same(states(tmp_path / "again" / "checkpoint-4"), states(tmp_path / "straight" / "checkpoint-4"))
    assert "in 5 shapes" in (tmp_path / "again" / "README.md").read_text()
    last = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_loss"] > 0


def test_other_samples_are_gone_through_anew(
    small_shards: None, sd: Path, shaped: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the cache has grown, no shape catches up alone: positions begin at 0 in another order; the run goes on."""
    cache = Path(shutil.copytree(shaped, tmp_path / "cache"))
    arguments = flags(sd, cache, tmp_path / "out", train_batch_size=7, use_ema=False)
    main([*arguments, "--max_train_steps", "2"])
    assert "fewer than" not in capsys.readouterr().out
    encode(sd, tiny.dataset(tmp_path / "data", tiny.pairs(54, sizes=tiny.SIDES)), cache, **SHAPED)
    main([*arguments, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"])
    assert "gone through anew" in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "custom_checkpoint_0.pkl")
    assert (state["samples"], sum(state["seen"]), state["lap"], state["step"]) == (28, 14, 1, 4)
    main([*arguments, "--max_train_steps", "5", "--resume_from_checkpoint", "latest"])
    assert "gone through anew" not in capsys.readouterr().out


def test_a_shape_with_fewer_samples_than_a_batch_is_told(
    sd: Path, shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They repeat in a batch, and nothing is dropped."""
    main(flags(sd, shaped, tmp_path, train_batch_size=16, max_train_steps=1))
    assert "7 samples have 36 x 28 px, fewer than the 16 of a batch: it holds them several" in capsys.readouterr().out


def test_sdxl_is_told_the_shape_of_each_picture(sdxl: Path, shaped: Path, tmp_path: Path, encode: Encode) -> None:
    """Time ids are original height and width, crop top and left, height and width of the shape; and a step trains."""
    encode(sdxl, shaped.parent / "data", tmp_path / "cache", **SHAPED)
    cache = Cache.open(tmp_path / "cache")
    samples, table = Samples.of(cache, None), cache.samples().to_pylist()
    for number, sample in enumerate(table):
        size, tops, lefts = ("original_height", "original_width"), sample["crop_top"], sample["crop_left"]
        expected = [
            [*(sample[side] for side in size), top, left, sample["height"], sample["width"]]
            for top, left in zip(tops, lefts, strict=True)
        ]
        assert samples.time_ids[number].tolist() == expected
        assert samples.shapes[number].tolist() == [sample["height"] // 2, sample["width"] // 2]
    main(flags(sdxl, tmp_path / "cache", tmp_path / "out", max_train_steps=5, use_ema=False))


def test_the_keeper_knows_shapes(sd: Path, shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are decoded, encoded afresh, copied and counted as they are."""
    keep(["preview", str(shaped), "--output", str(tmp_path / "sheet.png"), "--samples", "5"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_ROWS", 16)
        keep(["verify", str(shaped), "--reencode", "7"])
    assert "is sound" in capsys.readouterr().out
    keep(["push", str(shaped), str(tmp_path / "copy")])
    assert verify(tmp_path / "copy") == []
    capsys.readouterr()
    keep(["info", str(shaped), "--json"])
    assert json.loads(capsys.readouterr().out)["shapes"] == {
        "24 x 40": 7,
        "28 x 36": 7,
        "32 x 32": 14,
        "36 x 28": 7,
        "40 x 24": 15,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bucket_step": 3}, "--bucket_step 3: this VAE needs a multiple of 2, such as 2 or 4"),
        ({"bucket_step": 64}, "--resolution 16: --bucket_step needs a multiple of 64, such as 64"),
        ({"bucket_step": 12}, "--resolution 16: --bucket_step needs a multiple of 12, such as 12 or 24"),
    ],
)
def test_steps_that_make_no_shapes_are_refused(
    sd: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str], given: dict, said: str
) -> None:
    """With what would do; before anything is read."""
    with pytest.raises(SystemExit, match="2"):
        encode(sd, data, tmp_path / "cache", **given)
    assert said in capsys.readouterr().err


def test_a_step_takes_the_place_of_squashing() -> None:
    """Who asks for shapes wants them kept; who asks for both is asked which."""
    assert encode_config(dataset_name="x").pictures.resizing == "squash"
    assert encode_config(dataset_name="x", bucket_step=64).pictures.resizing == "center_crop"
    assert encode_config(dataset_name="x", bucket_step=64, resize_mode="random_crop").pictures.resizing == "random_crop"
    with pytest.raises(SettingsError, match="--bucket_step keeps shapes, and --resize_mode squash does not"):
        encode_config(dataset_name="x", bucket_step=64, resize_mode="squash")


def test_a_step_as_long_as_the_side_makes_squares_alone(sd: Path, shaped: Path, tmp_path: Path, encode: Encode) -> None:
    """One shape has the arrays that squares always had."""
    encode(sd, shaped.parent / "data", tmp_path / "cache", resolution=16, bucket_step=16, max_train_samples=3)
    cache = Cache.open(tmp_path / "cache")
    assert cache.arrays("images")["edited"].shape == (3, 1, 8, 8, 8)
    assert [(row["height"], row["width"]) for row in cache.samples().to_pylist()] == [Shape(16, 16)] * 3
