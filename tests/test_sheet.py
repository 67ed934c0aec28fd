"""Tests of encode/data/sheet.py: contact sheets and grids of pictures of any size."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ip2p.encode.data.sheet import TILE, contact_sheet, grid
from test_infer import apart, picture


def test_a_contact_sheet_shows_small_pictures_enlarged_pixel_by_pixel() -> None:
    """A 64-pixel picture fills its tile with blocks of its own colors; an empty place stays white."""
    small = picture(10, (64, 64))
    sheet = contact_sheet([("make it red", [small, None])], ["original", "target"])
    enlarged = small.resize((TILE, TILE), Image.Resampling.NEAREST)
    top = next(y for y in range(sheet.height) if sheet.getpixel((16, y)) == enlarged.getpixel((0, 0)))
    assert apart(sheet.crop((16, top, 16 + TILE, top + TILE)), enlarged) == 0
    assert np.asarray(sheet.crop((TILE + 24, top, sheet.width, top + TILE))).min() == 255
    assert np.asarray(sheet.crop((0, top + TILE, sheet.width, sheet.height))).min() < 128, "no caption"


def test_a_contact_sheet_is_about_square_and_takes_any_sizes() -> None:
    """Many strips stand in columns, pictures of all shapes fit, and captions of any length stay inside."""
    rows: Sequence = [
        ("make it red " * (n + 1), [picture(n, (40 * n + 1, 300)), picture(n, (500, n + 1))]) for n in range(9)
    ]
    sheet = contact_sheet(iter(rows), ["original", "edited"])
    assert 0.5 < sheet.width / sheet.height < 2


def test_a_grid_has_room_for_its_labels() -> None:
    """Narrow pictures stand apart as far as their labels need; caption, original and labels are drawn."""
    narrow = picture(2, (4, 64))
    edits = [picture(n, (4, 64)) for n in range(3, 7)]
    sheet = grid(narrow, "make it red", edits, ["image guidance 1", "image guidance 2"], ["text guidance 3", "x"])
    pixels = np.asarray(sheet.convert("L"))
    lowest = pixels[-8 - TILE : -8]  # the last row of edits, with white between them
    edges = np.flatnonzero(np.diff((lowest.min(axis=0) < 250).astype(int)))  # (…, start, end, start, end)
    assert edges[-2] - edges[-4] > 90, "the labels of the columns would overlap"
    assert (pixels[:20] < 100).any(), "no caption"
