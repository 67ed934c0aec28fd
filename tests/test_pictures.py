"""Tests of encode/data/pictures.py: of every kind of picture, encoding and editing see the same, right pixels."""

import colorsys
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageCms

from ip2p.encode.base.errors import ImageError
from ip2p.encode.data.pictures import open_picture
from ip2p.infer import EditError, Editor
from test_images import deep_png, file_of


def squares(values: Any) -> np.ndarray:
    """Flat squares of 8 pixels, in which JPEG loses nothing."""
    return np.array(values, np.uint8).repeat(8, 0).repeat(8, 1)


# Each of another color, so that every turn shows.
SIX = [[[200, 30, 40], [20, 180, 60], [30, 50, 210]], [[250, 240, 90], [90, 20, 120], [10, 220, 230]]]
COLORS = squares(SIX)  # (16, 24, 3)
GRAYS = squares([[0, 51, 102], [153, 204, 255]])  # (16, 24)
DEEP = GRAYS.astype(np.uint16) * 256 + 130
DARK = GRAYS.astype(np.uint16)  # of 16 bits, with nothing in the upper ones
OPACITY = squares([[0, 255, 128], [255, 64, 255]])
INDICES = squares([[0, 1, 2], [3, 4, 5]])
OTHER = Image.new("RGB", (24, 16), "white")  # another frame


def gray(values: np.ndarray) -> np.ndarray:
    return np.dstack([values] * 3)


def over_white(colors: np.ndarray, opacity: np.ndarray = OPACITY) -> np.ndarray:
    """The pixels of RGB colors in front of a white wall."""
    part = opacity[..., None] / 255
    return (colors * part + 255 * (1 - part)).round().astype(np.uint8)


def stored(mode: str, values: np.ndarray) -> Image.Image:
    """A picture in memory whose pixels hold these very numbers."""
    return Image.frombytes(mode, values.shape[1::-1], values.tobytes())


def palette(**info: Any) -> Image.Image:
    picture = Image.fromarray(INDICES)
    picture.putpalette(np.array(SIX, np.uint8).tobytes())  # which makes it a P
    picture.info |= info
    return picture


def swapped_profile() -> bytes:
    """A profile in which red and blue have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"none").replace(b"bXYZ", b"rXYZ").replace(b"none", b"bXYZ")


def oriented(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(RGB, kind, exif=exif, **LOSSLESS[kind])


def tagged(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A JPEG whose EXIF is these entries as they are: tag, type, count, and the value or its offset."""
    lines = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + lines + bytes(4)
    return file_of(RGB, "JPEG", exif=exif, **LOSSLESS["JPEG"])


def premultiplied() -> bytes:
    """A TIFF whose colors are dimmed by their opacity, and which says so."""
    dimmed = (COLORS * (OPACITY[..., None] / 255)).round().astype(np.uint8)
    data = file_of(stored("RGBA", np.dstack([dimmed, OPACITY])), "TIFF")
    unassociated, associated = (struct.pack("<HHII", 338, 3, 1, kind) for kind in (2, 1))
    assert unassociated in data
    return data.replace(unassociated, associated)


LOSSLESS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "TIFF": {}}
TURN = (0x0112, 3, 1, b"\6\0\0\0")  # clockwise
RGB, L, P = stored("RGB", COLORS), stored("L", GRAYS), palette()
RGBA, LA = stored("RGBA", np.dstack([COLORS, OPACITY])), stored("LA", np.dstack([GRAYS, OPACITY]))
BIT = Image.fromarray(GRAYS > 128)
BLACK_AND_WHITE = gray(np.where(GRAYS > 128, 255, 0))
CMYK = stored("CMYK", np.dstack([255 - COLORS, np.full_like(GRAYS, 51)]))  # a fifth of black ink
INKED = (COLORS * 0.8).round()
LAB = stored("LAB", squares([[[255, 0, 0], [0, 0, 0], [137, 0, 0], [138, 81, 70]]]))
LAB_COLORS = squares([[[255] * 3, [0] * 3, [128] * 3, [255, 0, 0]]])
YCBCR = COLORS @ np.array([[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]])
HSV = [[[255 * part for part in colorsys.rgb_to_hsv(*(np.array(color) / 255))] for color in row] for row in SIX]
LINE = np.arange(3000 * 3, dtype=np.uint32).reshape(1, 3000, 3).astype(np.uint8)


class Kind(NamedTuple):
    """A picture, the pixels (H, W, 3) that people see, and by how many levels those may be off."""

    picture: Any
    right: np.ndarray
    off: int = 0


FILES = {
    "PNG, 1 bit": Kind(file_of(BIT), BLACK_AND_WHITE),
    "PNG, gray": Kind(file_of(L), gray(GRAYS)),
    "PNG, gray with alpha": Kind(file_of(LA), over_white(gray(GRAYS)), 1),
    "PNG, a transparent gray": Kind(file_of(L, transparency=51), over_white(gray(GRAYS), (GRAYS != 51) * 255)),
    "PNG, palette": Kind(file_of(P), COLORS),
    "PNG, palette with a transparent color": Kind(file_of(P, transparency=4), over_white(COLORS, (INDICES != 4) * 255)),
    "PNG, palette with alphas": Kind(
        file_of(P, transparency=bytes([0, 255, 128, 255, 64, 255])), over_white(COLORS), 1
    ),
    "PNG, color": Kind(file_of(RGB), COLORS),
    "PNG, a transparent color": Kind(
        file_of(RGB, transparency=(30, 50, 210)), over_white(COLORS, (INDICES != 2) * 255)
    ),
    "PNG, color with alpha": Kind(file_of(RGBA), over_white(COLORS), 1),
    "PNG, 16-bit gray": Kind(file_of(Image.fromarray(DEEP)), gray(GRAYS)),
    "PNG, 16-bit gray, one transparent": Kind(
        file_of(Image.fromarray(DEEP), transparency=51 * 256 + 130), over_white(gray(GRAYS), (GRAYS != 51) * 255)
    ),
    "PNG, 16-bit gray, a near one transparent": Kind(
        file_of(Image.fromarray(DEEP), transparency=51 * 256 + 131), gray(GRAYS)
    ),
    "PNG, 16-bit gray with alpha": Kind(
        deep_png(np.dstack([DEEP, OPACITY.astype(np.uint16) * 257])), over_white(gray(GRAYS)), 1
    ),
    "PNG, 16-bit color": Kind(deep_png(COLORS.astype(np.uint16) * 257), COLORS),
    "PNG, 16-bit color with alpha": Kind(
        deep_png(np.dstack([COLORS, OPACITY]).astype(np.uint16) * 257), over_white(COLORS), 1
    ),
    "PNG, animated": Kind(file_of(RGB, save_all=True, append_images=[OTHER]), COLORS),
    "PNG, a profile": Kind(file_of(RGB, icc_profile=swapped_profile()), COLORS),  # which nobody looks at
    "PNG, on its side": Kind(oriented(6, "PNG"), np.rot90(COLORS, -1)),
    "PNG, 1 pixel": Kind(file_of(stored("RGB", COLORS[:1, :1])), COLORS[:1, :1]),
    "PNG, 1 pixel high": Kind(file_of(stored("RGB", LINE)), LINE),
    "PNG, 1 pixel wide": Kind(file_of(stored("RGB", LINE.swapaxes(0, 1))), LINE.swapaxes(0, 1)),
    "JPEG, color": Kind(file_of(RGB, "JPEG", **LOSSLESS["JPEG"]), COLORS, 3),
    "JPEG, progressive": Kind(file_of(RGB, "JPEG", progressive=True, **LOSSLESS["JPEG"]), COLORS, 3),
    "JPEG, gray": Kind(file_of(L, "JPEG", quality=100), gray(GRAYS), 1),
    "JPEG, CMYK": Kind(file_of(CMYK, "JPEG", quality=100), INKED, 3),
    "JPEG, a profile": Kind(file_of(RGB, "JPEG", icc_profile=swapped_profile(), **LOSSLESS["JPEG"]), COLORS, 3),
    "JPEG, upright": Kind(oriented(1), COLORS, 3),
    "JPEG, mirrored": Kind(oriented(2), COLORS[:, ::-1], 3),
    "JPEG, upside down": Kind(oriented(3), COLORS[::-1, ::-1], 3),
    "JPEG, mirrored upside down": Kind(oriented(4), COLORS[::-1], 3),
    "JPEG, mirrored on its left side": Kind(oriented(5), COLORS.swapaxes(0, 1), 3),
    "JPEG, to be turned clockwise": Kind(oriented(6), np.rot90(COLORS, -1), 3),
    "JPEG, mirrored on its right side": Kind(oriented(7), COLORS[::-1, ::-1].swapaxes(0, 1), 3),
    "JPEG, to be turned counterclockwise": Kind(oriented(8), np.rot90(COLORS), 3),
    "JPEG, unreadable EXIF": Kind(file_of(RGB, "JPEG", exif=b"Exif\0\0junkjunk", **LOSSLESS["JPEG"]), COLORS, 3),
    "JPEG, an orientation that is none": Kind(tagged((0x0112, 2, 4, b"up\0\0")), COLORS, 3),
    "JPEG, to be turned, with a software that is a number": Kind(
        tagged(TURN, (0x0131, 3, 1, b"\1\0\0\0")), np.rot90(COLORS, -1), 3
    ),
    "JPEG, to be turned, with a resolution that is text": Kind(
        tagged(TURN, (0x011A, 2, 4, b"abc\0")), np.rot90(COLORS, -1), 3
    ),
    "JPEG, to be turned, with a maker beyond the end": Kind(
        tagged((0x010F, 2, 100, b"\xff\xff\xff\x7f"), TURN), np.rot90(COLORS, -1), 3
    ),
    "JPEG, to be turned, with a directory that is text": Kind(
        tagged(TURN, (0x8769, 2, 4, b"abc\0")), np.rot90(COLORS, -1), 3
    ),
    "WebP, color": Kind(file_of(RGB, "WEBP", lossless=True), COLORS),
    "WebP, color with alpha": Kind(file_of(RGBA, "WEBP", lossless=True, exact=True), over_white(COLORS), 1),
    "WebP, animated": Kind(file_of(RGB, "WEBP", lossless=True, save_all=True, append_images=[OTHER]), COLORS),
    "GIF": Kind(file_of(P, "GIF"), COLORS),
    "GIF, a transparent color": Kind(file_of(P, "GIF", transparency=1), over_white(COLORS, (INDICES != 1) * 255)),
    "GIF, animated": Kind(file_of(P, "GIF", save_all=True, append_images=[OTHER]), COLORS),
    "BMP, 1 bit": Kind(file_of(BIT, "BMP"), BLACK_AND_WHITE),
    "BMP, palette": Kind(file_of(P, "BMP"), COLORS),
    "BMP, color": Kind(file_of(RGB, "BMP"), COLORS),
    "TIFF, 1 bit": Kind(file_of(BIT, "TIFF"), BLACK_AND_WHITE),
    "TIFF, gray": Kind(file_of(L, "TIFF"), gray(GRAYS)),
    "TIFF, palette": Kind(file_of(P, "TIFF"), COLORS),
    "TIFF, color": Kind(file_of(RGB, "TIFF"), COLORS),
    "TIFF, color with alpha": Kind(file_of(RGBA, "TIFF"), over_white(COLORS), 1),
    "TIFF, color dimmed by alpha": Kind(premultiplied(), over_white(COLORS), 2),
    "TIFF, CMYK": Kind(file_of(CMYK, "TIFF"), INKED, 1),
    "TIFF, LAB": Kind(file_of(LAB, "TIFF"), LAB_COLORS, 6),
    "TIFF, YCbCr": Kind(file_of(RGB, "TIFF", compression="jpeg", quality=100), COLORS, 3),
    "TIFF, 16-bit gray": Kind(file_of(Image.fromarray(DEEP), "TIFF"), gray(GRAYS)),
    "TIFF, 16-bit gray, high byte first": Kind(file_of(stored("I;16B", DEEP.astype(">u2")), "TIFF"), gray(GRAYS)),
    "TIFF, 16-bit gray in 32 bits": Kind(file_of(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), gray(GRAYS)),
    "TIFF, 8-bit gray in 32 bits": Kind(file_of(Image.fromarray(GRAYS.astype(np.int32)), "TIFF"), gray(GRAYS)),
    "TIFF, 16-bit gray, all of it dark": Kind(file_of(Image.fromarray(DARK), "TIFF"), gray(GRAYS) * 0),
    "TIFF, on its side": Kind(oriented(8, "TIFF"), np.rot90(COLORS)),
    "PBM": Kind(file_of(BIT, "PPM"), BLACK_AND_WHITE),
    "PGM": Kind(file_of(L, "PPM"), gray(GRAYS)),
    "PGM, 16 bits": Kind(file_of(Image.fromarray(DEEP), "PPM"), gray(GRAYS)),
    "PGM, 16 bits, all of it dark": Kind(file_of(Image.fromarray(DARK), "PPM"), gray(GRAYS) * 0),
    "PPM": Kind(file_of(RGB, "PPM"), COLORS),
    "TGA": Kind(file_of(RGB, "TGA"), COLORS),
}

MEMORY = {
    "1": Kind(BIT, BLACK_AND_WHITE),
    "L": Kind(L, gray(GRAYS)),
    "LA": Kind(LA, over_white(gray(GRAYS)), 1),
    "P": Kind(P, COLORS),
    "P, a transparent color": Kind(palette(transparency=3), over_white(COLORS, (INDICES != 3) * 255)),
    "PA": Kind(palette().convert("PA"), COLORS),
    "RGB": Kind(RGB, COLORS),
    "RGBX": Kind(stored("RGBX", np.dstack([COLORS, OPACITY])), COLORS),
    "RGBA": Kind(RGBA, over_white(COLORS), 1),
    "RGBa": Kind(RGBA.convert("RGBa"), over_white(COLORS), 2),
    "CMYK": Kind(CMYK, INKED, 1),
    "YCbCr": Kind(stored("YCbCr", (YCBCR + np.array([0, 128, 128])).round().astype(np.uint8)), COLORS, 2),
    "HSV": Kind(stored("HSV", squares(np.round(HSV))), COLORS, 4),
    "LAB": Kind(LAB, LAB_COLORS, 6),
    "I;16": Kind(Image.fromarray(DEEP), gray(GRAYS)),
    "I, 8 bits": Kind(Image.fromarray(GRAYS.astype(np.int32)), gray(GRAYS)),
    "I": Kind(Image.fromarray(DEEP.astype(np.int32)), gray(GRAYS)),
}


def truncated(kind: str) -> bytes:
    """A file of noise, without its second half."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    return data[: len(data) // 2]


REFUSED = {
    "nothing": (b"", "the image is empty"),
    "a page of text": (b"<html>no picture</html>", "not an image file"),
    "a PNG without its second half": (truncated("PNG"), "truncated"),
    "a JPEG without its second half": (truncated("JPEG"), "truncated"),
    "a WebP without its second half": (truncated("WEBP"), "cannot be decoded"),
    "a BMP without its second half": (truncated("BMP"), "truncated"),
    "a GIF of 20 bytes": (file_of(P, "GIF")[:20], "cannot be decoded"),
    "a TIFF of floating point numbers": (file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating"),
    "a TIFF of 32 bits": (file_of(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "32-bit pixels"),
    "a TIFF of negative numbers": (file_of(Image.fromarray(np.full((2, 2), -1, np.int32)), "TIFF"), "32-bit pixels"),
    "90 million pixels in a few bytes": (deep_png(DEEP[..., None], (10_000, 9_000)), "decompression bomb"),
    "400 million pixels in a few bytes": (deep_png(DEEP[..., None], (20_000, 20_000)), "decompression bomb"),
}


@pytest.fixture(scope="module")
def mirror(model: str) -> Iterator[Editor]:
    """Gives back what it sees of a picture that it is to edit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.infer.edit.draw", lambda _, tasks, *rest: [task.picture for task in tasks])
        yield Editor(model)


def check(seen: Image.Image, kind: Kind) -> None:
    assert seen.mode == "RGB"
    pixels = np.asarray(seen).astype(int)
    assert pixels.shape == kind.right.shape
    assert np.abs(pixels - kind.right).max() <= kind.off


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's, where this test opens a file by it
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_seen_alike_by_encoding_and_editing_and_as_people_see_it(
    kind: str, mirror: Editor, tmp_path: Path
) -> None:
    """The right pixels are those that the file was made of, whichever way it is read."""
    data = FILES[kind].picture
    (tmp_path / "picture").write_bytes(data)
    check(open_picture(data), FILES[kind])
    check(open_picture(open_picture(data)), FILES[kind])  # as a batch and then its editor do
    for seen in mirror.edit([data, tmp_path / "picture", Image.open(io.BytesIO(data))], "make it red"):
        check(seen, FILES[kind])


@pytest.mark.parametrize("kind", MEMORY)
def test_a_picture_in_memory_is_seen_as_people_see_it(kind: str, mirror: Editor) -> None:
    """Editing takes pictures in all modes of Pillow, those among them that no file has."""
    check(mirror.edit(MEMORY[kind].picture, "make it red")[0], MEMORY[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_seen_rightly_is_refused_with_the_same_words_each_time(
    kind: str, mirror: Editor, tmp_path: Path
) -> None:
    """No guess is made. Reasons are counted by their text, so no address of an object may stand in them."""
    data, reason = REFUSED[kind]
    (tmp_path / "picture").write_bytes(data)
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError, match=reason) as refused:
            open_picture(data)
        messages.add(str(refused.value))
    for picture in (data, tmp_path / "picture"):
        with pytest.raises(EditError, match=reason) as unedited:
            mirror.edit(picture, "make it red")
        messages.add(str(unedited.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


def test_what_is_damaged_unknown_or_missing_is_refused(mirror: Editor, tmp_path: Path) -> None:
    """One that Pillow has opened but not read yet, one of floating point numbers, and a file that is not there."""
    with pytest.raises(EditError, match="truncated"):
        mirror.edit(Image.open(io.BytesIO(truncated("PNG"))), "make it red")
    with pytest.raises(EditError, match="floating point pixels, expected 8 or 16 bits"):
        mirror.edit(Image.new("F", (2, 2)), "make it red")
    with pytest.raises(EditError, match="the image has no pixels"):
        mirror.edit(Image.new("RGB", (0, 2)), "make it red")
    with pytest.raises(EditError, match="cannot be read: embedded null byte"):
        mirror.edit("a\0.png", "make it red")
    with pytest.raises(EditError, match=r"gone\.png cannot be read: No such file"):
        mirror.edit(tmp_path / "gone.png", "make it red")
