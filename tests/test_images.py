"""Tests of encode/geometry.py: what the VAE sees of an image file, and of which part of it."""

import io
import itertools
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

import tiny
from ip2p.encode.cache.format import View, joined_views, view_names
from ip2p.encode.data.pictures import header_size, open_picture
from ip2p.encode.geometry import Geometry, Shape, shapes
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.models.encoders import Encoders

SIDE = 16
SQUASH, CENTER, RANDOM = (Geometry(SIDE, mode, "white") for mode in ("squash", "center_crop", "random_crop"))
PLAIN = View(None, flip=False)
PAIR = "0123456789abcdef" * 2


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(alpha: int | None = None) -> Image.Image:
    """A picture, 24 by 20 pixels; with some opacity in its left half."""
    image = tiny.picture(1)
    if alpha is not None:
        opacity = Image.new("L", image.size, 255)
        opacity.paste(alpha, (0, 0, 12, 20))
        image.putalpha(opacity)
    return image


def deep_png(values: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """A PNG with 16 bits per channel, (height, width, 1 to 4), which Pillow reads but cannot write.

    It claims to be of some other `size`, (width, height), where one is given.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animation(kind: str) -> bytes:
    """Two frames that differ."""
    return file_of(photo(), kind, save_all=True, append_images=[tiny.picture(2)])


def turned(orientation: int) -> bytes:
    """A JPEG that says which way up it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(photo(), "JPEG", exif=exif)


OPAQUE: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: file_of(photo()),
    "JPEG": lambda: file_of(photo(), "JPEG"),
    "WebP": lambda: file_of(photo(), "WEBP"),
    "opaque RGBA": lambda: file_of(photo(255)),
    "gray": lambda: file_of(photo().convert("L")),
    "opaque gray with alpha": lambda: file_of(photo(255).convert("LA")),
    "1 bit": lambda: file_of(photo().convert("1")),
    "CMYK": lambda: file_of(photo().convert("CMYK"), "JPEG"),
    "palette": lambda: file_of(photo().convert("P")),
    "GIF": lambda: file_of(photo(), "GIF"),
    "animated GIF": lambda: animation("GIF"),
    "animated PNG": lambda: animation("PNG"),
    "animated WebP": lambda: animation("WEBP"),
    "16-bit color": lambda: deep_png(np.asarray(photo()).astype(np.uint16) * 256 + 200),
    **{f"EXIF orientation {n}": lambda n=n: turned(n) for n in range(1, 9)},
}


def script(data: bytes, background: str | None = None) -> torch.Tensor:
    """The pixels (3, H, W) that train_instruct_pix2pix.py computes with datasets, Pillow and torch.

    It drops transparency; `background` is laid under it before that.
    """
    image = datasets.Image().decode_example({"bytes": data, "path": None})
    if background:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    values = np.array(image.convert("RGB").resize((SIDE, SIDE))).transpose(2, 0, 1)  # convert_to_np
    return 2 * (torch.tensor(values) / 255) - 1  # preprocess_images


@pytest.fixture(scope="module")
def seen(sd: Path) -> Callable[..., torch.Tensor]:
    """What reaches the VAE of a file in some view, (3, H, W)."""
    encoders = Encoders(Checkpoint(sd), torch.device("cpu"), torch.float32, torch.float32)
    inputs: list[torch.Tensor] = []
    encoders.vae.encoder.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))

    def see(data: bytes, view: View = PLAIN, geometry: Geometry = SQUASH) -> torch.Tensor:
        pixels, _ = geometry.read([data, data], PAIR, [view])
        encoders.moments(torch.from_numpy(pixels[0]))()
        original, edited = inputs.pop()
        assert torch.equal(original, edited)
        return original

    return see


@pytest.mark.parametrize("kind", OPAQUE)
def test_squashed_pixels_are_those_of_diffusers_script(kind: str, seen: Callable[..., torch.Tensor]) -> None:
    """Whatever an opaque file is, the tensor that the VAE gets equals the script's, flipped or not."""
    data = OPAQUE[kind]()
    assert torch.equal(seen(data), script(data))
    assert torch.equal(seen(data, View(None, flip=True)), script(data).flip(-1))


TRANSPARENT: dict[str, Callable[[], bytes]] = {
    "RGBA": lambda: file_of(photo(0)),
    "half transparent": lambda: file_of(photo(100)),
    "gray with alpha": lambda: file_of(photo(0).convert("LA")),
    "palette": lambda: file_of(photo().convert("P"), transparency=photo().convert("P").getpixel((3, 3))),
    "palette with many alphas": lambda: file_of(photo().convert("P"), transparency=bytes(range(256))),
    "GIF": lambda: file_of(photo(0), "GIF"),
    "one color": lambda: file_of(photo(), transparency=photo().getpixel((3, 3))),
    "one gray": lambda: file_of(photo().convert("L"), transparency=photo().convert("L").getpixel((3, 3))),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's advice to the script
@pytest.mark.parametrize("background", ["white", "#204060"])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_background_shows_through_transparent_pixels(
    kind: str, background: str, seen: Callable[..., torch.Tensor]
) -> None:
    """It is as if the picture had been painted on that color; the script shows what lies hidden beneath."""
    data = TRANSPARENT[kind]()
    found = seen(data, PLAIN, Geometry(SIDE, "squash", background))
    assert torch.equal(found, script(data, background))
    assert not torch.equal(found, script(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_to_8_bits(kind: str, seen: Callable[..., torch.Tensor]) -> None:
    """The brightest of 65,536 grays is white, and the middle one gray, where Pillow would turn both white."""
    gray = np.asarray(photo().convert("L"))
    deep = file_of(Image.fromarray(gray.astype(np.uint16) * 257), kind)
    assert torch.equal(seen(deep), script(file_of(Image.fromarray(gray))))


sides = st.integers(1, 80)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(size=st.tuples(sides, sides), crop=st.none() | st.integers(0, 9), flip=st.booleans())
def test_crops_equal_resizing_the_whole_and_cutting_out(size: tuple[int, int], crop: int | None, flip: bool) -> None:
    """The short side fits, the aspect stays, place and pixels are what they say; Pillow may round in another order."""
    image, view = tiny.picture(1, size), View(crop, flip)
    geometry = CENTER if crop is None else RANDOM
    pixels, [(*sizes, top, left)] = geometry.read([file_of(image)] * 2, PAIR, [view])
    width, height = (max(SIDE, round(side * SIDE / min(size))) for side in size)
    whole = np.asarray(image.resize((width, height)))
    whole = whole[:, ::-1] if flip else whole
    expected = whole[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)
    assert sizes == [*size, *size]
    difference = np.abs(pixels[0, 0].astype(int) - expected)
    assert difference.max() <= 4
    assert difference.mean() < 1
    if crop is None:
        assert abs(2 * top + SIDE - height) <= 1
        assert abs(2 * left + SIDE - width) <= 1


@pytest.mark.parametrize(
    ("resolution", "step", "count"), [(256, 64, 3), (256, 32, 5), (512, 64, 5), (768, 64, 7), (1024, 64, 11)]
)
def test_shapes_are_as_large_as_the_square_allows_and_none_fits_into_another(
    resolution: int, step: int, count: int
) -> None:
    """Multiples of the step, at most 2:1, the square among them, each beside its mirror image."""
    found = shapes(resolution, step)
    assert len(found) == count
    assert Shape(resolution, resolution) in found
    assert {(shape.width, shape.height) for shape in found} == set(found)
    for shape in found:
        assert shape.height % step == shape.width % step == 0
        assert shape.height * shape.width <= resolution**2
        assert max(shape) <= 2 * min(shape)
        for larger in ((shape.height + step, shape.width), (shape.height, shape.width + step)):
            assert larger[0] * larger[1] > resolution**2 or max(larger) > 2 * min(larger)
    assert shapes(resolution, resolution) == shapes(resolution, None) == ((resolution, resolution),)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(size=st.tuples(sides, sides), crop=st.none() | st.integers(0, 9), flip=st.booleans())
def test_a_picture_gets_the_nearest_shape_and_covers_it(size: tuple[int, int], crop: int | None, flip: bool) -> None:
    """It is resized until both sides reach, one of them exactly, and the rest is cut off where the sizes say."""
    image, geometry = tiny.picture(1, size), Geometry(32, "center_crop" if crop is None else "random_crop", "white", 4)
    assert len(geometry.shapes) > 3
    shape = geometry.shape(size)
    assert geometry.planned(file_of(image)) == shape
    ratio, ratios = math.log(size[0] / size[1]), [math.log(shape.width / shape.height) for shape in geometry.shapes]
    assert abs(ratio - math.log(shape.width / shape.height)) <= min(abs(ratio - other) for other in ratios) + 1e-9
    pixels, [(*sizes, top, left, tall, wide)] = geometry.read([file_of(image)] * 2, PAIR, [View(crop, flip)])
    assert pixels.shape == (1, 2, 3, *shape)
    assert (tall, wide) == shape
    scale = max(shape.width / size[0], shape.height / size[1])
    width, height = (max(least, round(side * scale)) for side, least in zip(size, shape[::-1], strict=True))
    whole = np.asarray(image.resize((width, height)))
    whole = whole[:, ::-1] if flip else whole
    expected = whole[top : top + shape.height, left : left + shape.width].transpose(2, 0, 1)
    assert sizes == [*size, *size]
    difference = np.abs(pixels[0, 0].astype(int) - expected)
    assert difference.max() <= 6
    assert difference.mean() < 1


def test_the_shape_that_was_planned_is_taken_whatever_the_decoder_finds() -> None:
    """A batch has one shape, so a picture whose header was wrong is cropped to the one of its batch."""
    geometry = Geometry(32, "center_crop", "white", 4)
    tall = geometry.shape((10, 20))
    pixels, _ = geometry.read([file_of(tiny.picture(1, (20, 10)))] * 2, PAIR, [View(None, flip=False)], tall)
    assert pixels.shape[-2:] == tall != geometry.shape((20, 10))


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_header_tells_the_size_of_the_upright_picture(turned: int) -> None:
    """As decoding does; of what is no picture it tells none."""
    image, exif = tiny.picture(1, (30, 20)), Image.Exif()
    exif[0x0112] = turned
    file = file_of(image, "JPEG", exif=exif)
    assert header_size(file) == open_picture(file).size == ((30, 20) if turned < 5 else (20, 30))
    assert header_size(b"") is header_size(file[:20]) is header_size(b"no picture") is None


def test_random_crops_are_a_function_of_the_pair_and_spread_evenly() -> None:
    """Other pairs are cropped elsewhere, later crops leave the earlier where they are, and no gap is wide."""
    size = (SIDE * 100, SIDE)

    def places(pair: str, count: int) -> list[int]:
        return [RANDOM.crop(size, Shape(SIDE, SIDE), pair, View(crop, flip=False)).left for crop in range(count)]

    assert places(PAIR, 4) == places(PAIR, 8)[:4]
    assert places(PAIR, 4) != places(PAIR[::-1], 4)
    spare = 99 * SIDE
    for pair in (PAIR, PAIR[::-1], "f" * 32):
        edges = [0, *sorted(places(pair, 8)), spare]
        assert max(b - a for a, b in itertools.pairwise(edges)) < 0.25 * spare
    starts = [places(f"{n * 2**64 // 500:016x}", 1)[0] for n in range(500)]
    assert 0 <= min(starts) < 0.01 * spare
    assert 0.99 * spare < max(starts) <= spare


@pytest.mark.parametrize("size", [(60, 80), (120, 60), (33, 90)], ids=["twice as large", "other shape", "odd"])
@pytest.mark.parametrize("geometry", [SQUASH, CENTER, RANDOM], ids=["squash", "center_crop", "random_crop"])
def test_an_edited_image_of_another_size_shows_the_same_part(geometry: Geometry, size: tuple[int, int]) -> None:
    """Places that correspond by fractions of the sides stay together, also where the shapes differ."""

    def ramps(size: tuple[int, int]) -> bytes:
        x, y = np.meshgrid(*(np.linspace(0, 255, 2 * side + 1)[1::2] for side in size))
        return file_of(Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8)))

    view = View(2 if geometry is RANDOM else None, flip=False)
    pixels, [(*sizes, _, _)] = geometry.read([ramps((30, 40)), ramps(size)], PAIR, [view])
    assert sizes == [30, 40, *size]
    assert np.abs(pixels[0, 0].astype(int) - pixels[0, 1])[:, 2:-2, 2:-2].max() <= 4


def test_views_are_known_by_name() -> None:
    """The names in a manifest say what each view shows."""
    assert view_names(None, flip=False) == ["plain"]
    assert view_names(None, flip=True) == ["plain", "flip"]
    assert view_names(2, flip=True) == ["crop0", "crop1", "crop0-flip", "crop1-flip"]
    for name in (*view_names(None, flip=True), *view_names(12, flip=True)):
        assert View.parse(name).name == name


def test_views_that_a_cache_has_keep_their_places_and_each_crop_has_its_flip() -> None:
    """Otherwise cached numbers would change their meaning, or some crops be flipped more often than others."""
    assert joined_views(["plain", "flip"], ["plain"]) == ["plain", "flip"]
    assert joined_views(["plain"], ["plain", "flip"]) == ["plain", "flip"]
    assert joined_views(["crop0", "crop0-flip"], ["crop0", "crop1"]) == ["crop0", "crop0-flip", "crop1", "crop1-flip"]
    assert joined_views(view_names(3, flip=False), view_names(2, flip=True)) == view_names(3, flip=True)
