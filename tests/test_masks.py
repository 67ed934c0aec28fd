"""Tests of masks: what they mean, their share of each cell, and their way from a column into batches."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from configs import encode_config
from forms import PAIRS, image_files, opened
from ip2p.encode.base.errors import CacheMismatch, ImageError, SourceError
from ip2p.encode.cache.format import Cache, View
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.shapes import latents_of
from ip2p.encode.cached import Samples
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.data.pictures import open_mask, pooled
from ip2p.encode.data.sheet import TILE
from ip2p.encode.geometry import Geometry, Shape
from ip2p.encode.keeper.__main__ import main as keep
from ip2p.encode.keeper.verify import verify
from ip2p.train.__main__ import main
from ip2p.train.data.batches import gather
from test_train import assert_same, flags

Encode = Callable[..., None]
SHAPED = {"resolution": 32, "bucket_step": 4, "resize_mode": "random_crop", "crops": 2, "random_flip": True}
MASKS: dict[str, object] = {"mask_column": "mask_image"}


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file in memory."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def edit(size: tuple[int, int], seed: int) -> np.ndarray:
    """Where an edit is: a box at random, as bool (height, width)."""
    random, area = np.random.default_rng(seed), np.zeros(size[::-1], bool)
    (left, right), (top, bottom) = (np.sort(random.integers(0, side, 2)) for side in size)
    area[top : bottom + 1, left : right + 1] = True
    return area


def transparent(area: np.ndarray) -> Image.Image:
    """A picture that is transparent where the edit is, as of MagicBrush."""
    picture = tiny.picture(0, area.shape[::-1]).convert("RGBA")
    picture.putalpha(Image.fromarray(np.where(area, 0, 255).astype(np.uint8)))
    return picture


def white(area: np.ndarray) -> Image.Image:
    """A black picture that is white where the edit is, as of UltraEdit."""
    return Image.fromarray(np.where(area, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_means_of_the_pixels_inside_by_area(seed: int) -> None:
    """However edges of cells and of the part that is shown cut through pixels; against pixels in finer ones."""
    random = np.random.default_rng(seed)
    (height, width), cells = random.integers(3, 9, 2), tuple(random.integers(1, 6, 2).tolist())
    left, top = random.integers(0, 6, 2)
    right, bottom = random.integers(7, 13, 2)
    shares = random.random((height, width), np.float32)
    fine = shares.repeat(12 * cells[0], axis=0).repeat(12 * cells[1], axis=1)
    fine = fine[
        top * height * cells[0] : bottom * height * cells[0], left * width * cells[1] : right * width * cells[1]
    ]
    expected = fine.reshape(cells[0], len(fine) // cells[0], cells[1], -1).mean(axis=(1, 3))
    found = pooled(shares, cells, (left / 12, top / 12, right / 12, bottom / 12))
    np.testing.assert_allclose(found, expected, atol=1e-6)


SEEN: dict[str, Callable[[np.ndarray], bytes]] = {
    "transparent": lambda area: png(transparent(area)),
    "white": lambda area: png(white(area)),
    "white, opaque": lambda area: png(white(area).convert("RGBA")),
    "white, 1 bit": lambda area: png(white(area).convert("1")),
    "white, colors": lambda area: png(white(area).convert("P")),
    "0 and 1": lambda area: png(Image.fromarray(area.astype(np.uint8))),
    "white, 16 bits": lambda area: png(Image.fromarray(np.where(area, 65535, 0).astype(np.uint16))),
    "one color is transparent": lambda area: png(white(area), transparency=255),
    "on its side": lambda area: png(white(area).transpose(Image.Transpose.ROTATE_90), exif=sideways()),
}


def sideways() -> Image.Exif:
    """Turn what is seen by a quarter."""
    exif = Image.Exif()
    exif[274] = 6
    return exif


@pytest.mark.parametrize("kind", SEEN)
def test_what_is_transparent_is_edited_else_what_is_white(kind: str) -> None:
    """In any mode; where the picture as a whole is opaque, its brightness decides."""
    area = edit((11, 7), 3)
    assert np.array_equal(open_mask(SEEN[kind](area)), area)
    assert open_mask(png(Image.new("L", (2, 2), 51))).tolist() == pytest.approx(np.full((2, 2), 0.2))


def test_a_mask_that_cannot_be_decoded_is_named() -> None:
    """So that nobody looks for the fault in the pictures."""
    with pytest.raises(ImageError, match=r"mask: the image cannot be decoded \(not an image file\)"):
        open_mask(b"<html>")
    with pytest.raises(ImageError, match="mask: the image is empty"):
        open_mask(b"")


@pytest.mark.parametrize("size", [(48, 32), (32, 56), (32, 32)])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("mode", ["center_crop", "random_crop", "squash"])
def test_a_mask_is_cut_and_flipped_as_its_pair(size: tuple[int, int], scale: int, mode: str) -> None:
    """A mask that is the picture itself, maybe larger, has the means of what is shown of it, in every view."""
    if mode == "squash":
        size = (32, 32)
    area = edit(size, 5)
    picture, large = white(area), white(area.repeat(scale, axis=0).repeat(scale, axis=1))
    geometry, shape, pair = Geometry(32, mode, "white"), Shape(32, 32), "9a" * 16
    views = [View(crop, flip) for crop in ((0, 1, 2) if mode == "random_crop" else (None,)) for flip in (False, True)]
    pixels, sizes = geometry.read([png(picture)] * 2, pair, views)
    found = geometry.masks(png(large), sizes[0][:2], pair, views, shape, 8)
    assert (found.shape, found.dtype) == ((len(views), 1, 4, 4), np.float16)
    expected = pixels[:, 0, :1].reshape(len(views), 1, 4, 8, 4, 8).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (geometry.masks(None, sizes[0][:2], pair, views, shape, 8) == 1).all()


def mean(shares: np.ndarray, box: tuple[float, float, float, float]) -> float:
    """The share of a part of a picture that is edited, by sums up to its edges."""
    height, width = shares.shape
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height

    def between(values: Any, start: float, stop: float) -> float:
        sums = np.append(0, np.cumsum(values, dtype=float))
        return float(np.diff(np.interp((start, stop), range(len(sums)), sums))[0])

    return between([between(line, left, right) for line in shares], top, bottom) / (right - left) / (bottom - top)


def columns(count: int) -> dict[str, list]:
    """Pairs in five shapes, with masks of both kinds, twice as large as the pictures, and every third without."""
    found = tiny.pairs(count, sizes=tiny.SIDES)
    kinds = (transparent, white)
    found["mask_image"] = [
        None if n % 3 == 0 else kinds[n % 3 - 1](edit((2 * picture.width, 2 * picture.height), n))
        for n, picture in enumerate(found["input_image"])
    ]
    return found


@pytest.fixture(scope="module")
def masked(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """A cache of ten pairs in several shapes, two crops and their flips, with masks."""
    folder = tmp_path_factory.mktemp("masked")
    encode(sd, tiny.dataset(folder / "data", columns(10)), folder / "cache", **SHAPED | MASKS)
    return folder / "cache"


def test_masks_are_cached_beside_the_latents_which_stay_as_they_are(
    sd: Path, masked: Path, tmp_path: Path, encode: Encode
) -> None:
    """In each sample's shape and views, with the area that is edited; all of a picture where there is no mask."""
    encode(sd, masked.parent / "data", tmp_path, **SHAPED)
    cache, plain = Cache.open(masked), Cache.open(tmp_path)
    assert verify(masked) == []
    assert cache.arrays("images")["mask"].shape == (10, 4, 1, 256)
    assert plain.arrays("images").keys() == {"original", "edited"}
    geometry, source = Geometry.of(cache.manifest["encoding"]), columns(10)["mask_image"]
    for sample, other in zip(cache.samples().to_pylist(), plain.samples().to_pylist(), strict=True):
        held, mask = latents_of(cache, sample), source[sample["position"]]
        assert (sample["pair"] == other["pair"]) == (sample["key"] == other["key"]) == (mask is None)
        shape, size = Shape(sample["height"], sample["width"]), (sample["original_width"], sample["original_height"])
        assert held["mask"].shape == (4, 1, shape.height // 2, shape.width // 2)
        if mask is None:
            assert np.array_equal(held["edited"], latents_of(plain, other)["edited"])
            assert (held["mask"] == 1).all()
            continue
        for name, shown in zip(cache.views, held["mask"][:, 0], strict=True):
            view = View.parse(name)
            expected = mean(open_mask(png(mask)), geometry.crop(size, shape, sample["pair"], view).box)
            assert shown.mean(dtype=float) == pytest.approx(expected, abs=1e-3)
            flipped = View(view.crop, not view.flip).name
            assert np.array_equal(held["mask"][cache.views.index(flipped), 0], shown[:, ::-1])


def test_a_cache_grows_with_masks_and_one_without_gets_none(
    sd: Path, masked: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """No record is touched; a pair whose mask changed is another pair, and masks from the middle on are refused."""
    cache = Path(shutil.copytree(masked, tmp_path / "cache"))
    before = {path.name: path.read_bytes() for path in (cache / "commits").iterdir()}
    more = columns(12)
    more["mask_image"][1] = white(edit((8, 8), 0))
    data = tiny.dataset(tmp_path / "data", more)
    encode(sd, data, cache, **SHAPED | MASKS)
    assert {name: (cache / "commits" / name).read_bytes() for name in before} == before
    assert verify(cache) == []
    old, new = (Cache.open(folder).samples().to_pylist() for folder in (masked, cache))
    assert [a["row"] == b["row"] for a, b in zip(old, new, strict=False)] == [n != 1 for n in range(10)]
    for folder, given, words in ((cache, {}, "has some: give"), (tmp_path / "plain", MASKS, "has none: leave out")):
        if not given:
            encode(sd, data, tmp_path / "plain", **SHAPED)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            encode(sd, data, folder, **SHAPED | given)
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert f"{folder} {words} --mask_column" in line


def test_a_mask_that_cannot_be_read_costs_its_sample(
    sd: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands aside with its reason: a file that is gone, or is none; a sample may be without a mask, too."""
    rows: list[dict[str, Any]] = list(image_files(tmp_path / "data", PAIRS[:4]))
    for row, mask in zip(rows, ("images/mask.png", "images/gone.png", "images/bad.png", None), strict=True):
        row["mask_path"] = mask
    (tmp_path / "data" / "images" / "mask.png").write_bytes(png(white(edit((12, 8), 1))))
    (tmp_path / "data" / "images" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encode(sd, tmp_path / "data", tmp_path / "cache", mask_column="auto")
    table = Cache.open(tmp_path / "cache").samples()
    assert table["status"].to_pylist() == ["ok", "quarantined", "quarantined", "ok"]
    reasons = table["reason"].to_pylist()
    assert reasons[1] == "the mask is missing"
    assert "mask: the image cannot be decoded" in reasons[2]
    assert verify(tmp_path / "cache") == []
    assert "found masks in mask_path (--mask_column)" in capsys.readouterr().out


def test_masks_in_tar_files_and_of_reversed_pairs(tmp_path: Path) -> None:
    """A sample that lacks the member has no mask; a pair that is reversed keeps the mask."""
    mask = png(white(edit((12, 8), 1)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, pair in enumerate(PAIRS[:2]):
            parts = {"input.jpg": pair.original, "edited.jpg": pair.edited, "txt": pair.instruction.encode()}
            for name, content in (
                parts | {"inverse_edit.txt": b"undo"} | ({} if number else {"mask.png": mask})
            ).items():
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content or b"")
                tar.addfile(member, io.BytesIO(content or b""))
    names = {"edit_prompt_column": "txt", "inverse_prompt_column": "inverse_edit.txt", "reverse_pairs": True}
    source = opened({"dataset_name": tmp_path / "a.tar", "mask_column": "auto"} | names)
    assert [source[n].mask for n in range(4)] == [mask, mask, None, None]
    assert (source[1].original, source[1].instruction) == (PAIRS[0].edited, "undo")
    with pytest.raises(SourceError, match=r"column txt of .* holds string, expected images"):
        opened({"dataset_name": tmp_path / "a.tar", "mask_column": "txt"} | names)


def test_a_stream_keeps_masks(masked: Path) -> None:
    """As they are in the table, also where a sample has none."""
    data: dict[str, Any] = {"dataset_name": str(masked.parent / "data")} | MASKS
    table, stream = (
        open_pairs(encode_config(**data, streaming=streaming).dataset, None) for streaming in (False, True)
    )
    assert [stream[n] for n in range(len(stream))] == [table[n] for n in range(len(table))]
    assert (table[0].mask, bool(table[1].mask)) == (None, True)


def test_the_keeper_knows_masks(masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Listed, shown beside the pictures, encoded afresh, copied, held against another cache; damage is found."""
    assert keep(["info", str(masked)]) in (0, None)
    assert "mask      10 x 4 x 1 x 256" in capsys.readouterr().out
    keep(["preview", str(masked), "--samples", "1", "--output", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 12 * TILE
    capsys.readouterr()
    keep(["verify", str(masked), "--reencode", "10"])
    assert "mask: at most 0 from a fresh encoding" in capsys.readouterr().out
    keep(["push", str(masked), str(tmp_path / "copy")])
    assert verify(tmp_path / "copy") == []
    shard = next(path for path in (tmp_path / "copy" / "data.zarr" / "mask" / "c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    (finding,) = verify(tmp_path / "copy")
    assert "is damaged" in finding.problem
    assert finding.unit
    assert finding.unit.kind == "images"


def test_batches_hold_masks_where_they_are_asked_for(masked: Path, cache: Path) -> None:
    """In the shape of the batch; caches of which one has masks cannot both say where the edit is."""
    opened, samples = Cache.open(masked), Samples.of(Cache.open(masked), None)
    table = opened.samples().to_pylist()
    for shape, members in samples.by_shape().items():
        batch = gather(Reader(opened, masks=True), samples, members, torch.device("cpu"))
        assert batch.mask is not None
        assert batch.mask.shape == (len(members), 1, *shape)
        for number, mask in zip(members, batch.mask, strict=True):
            assert np.array_equal(mask.numpy(), latents_of(opened, table[number])["mask"][0])
        assert gather(Reader(opened), samples, members, torch.device("cpu")).mask is None
    assert "mask" not in Reader(Cache.open(cache), masks=True).arrays
    with pytest.raises(CacheMismatch, match=r"has masks .* none: leave out --edit_weight"):
        Reader(opened, Cache.open(cache), masks=True)


def test_batches_of_sdxl_hold_masks(sdxl: Path, masked: Path, tmp_path: Path, encode: Encode) -> None:
    """Beside pooled text and the sizes that SDXL is told; squares lie in the cache as they are."""
    encode(sdxl, masked.parent / "data", tmp_path, max_train_samples=3, **MASKS)
    opened = Cache.open(tmp_path)
    batch = gather(Reader(opened, masks=True), Samples.of(opened, None), np.arange(3), torch.device("cpu"))
    assert batch.pooled is not None
    assert batch.mask is not None
    assert batch.mask.shape == (3, 1, 8, 8)
    assert (batch.mask[0] == 1).all()
    assert batch.mask[1].float().mean().item() == pytest.approx(edit((60, 96), 1).mean(), abs=1e-3)


def test_training_weighs_by_the_masks(sd: Path, data: Path, tmp_path: Path, encode: Encode) -> None:
    """With masks that say all is edited it trains as without --edit_weight, bit for bit; without masks otherwise."""
    found = tiny.pairs(10)
    found["mask_image"] = [None] * 10
    encode(sd, tiny.dataset(tmp_path / "data", found), tmp_path / "masked", **MASKS)
    encode(sd, data, tmp_path / "plain")
    runs = {"off": ("plain", 1), "all": ("masked", 4), "latents": ("plain", 4)}
    for name, (cache, weight) in runs.items():
        main(flags(sd, tmp_path / cache, tmp_path / name, edit_weight=weight, max_train_steps=3))
    weights = {name: load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in runs}
    assert_same(weights["off"], weights["all"])
    with pytest.raises(AssertionError):
        assert_same(weights["off"], weights["latents"])
