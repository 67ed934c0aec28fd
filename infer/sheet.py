"""Draws contact sheets: pictures side by side under their names, with a caption below."""

import math
import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels; large enough to judge an edit, small enough for a hundred of them
GAP = 8  # between pictures; twice as much between strips
LINE = 24
CAPTION_LINES = 3


def contact_sheet(rows: Iterable[tuple[str, Sequence[Image.Image | None]]], labels: Sequence[str]) -> Image.Image:
    """Draw one strip for each (caption, pictures), the strips in about a square.

    Args:
        rows: as many pictures in each as there are labels; None leaves a place empty. An iterator is read one
            row at a time, so full-size pictures need not be in memory together. At least one row.
        labels: what the pictures of each place are, such as "original", "edited", "target".

    Returns:
        An RGB picture. Small pictures are enlarged by whole factors, pixel by pixel; large ones are reduced.
    """
    from diffusers.utils import make_image_grid  # here, since it brings torch along

    drawn = [_strip(caption, pictures, labels) for caption, pictures in rows]
    width, height = drawn[0][0].width, max(bottom for _, bottom in drawn)
    strips = [strip.crop((0, 0, width, height)) for strip, _ in drawn]
    columns = max(1, round(math.sqrt(len(strips) * height / width)))
    strips += [Image.new("RGB", (width, height), "white")] * (-len(strips) % columns)
    return make_image_grid(strips, rows=len(strips) // columns, cols=columns)


def _strip(caption: str, pictures: Sequence[Image.Image | None], labels: Sequence[str]) -> tuple[Image.Image, int]:
    """A strip with room for a caption of any length, and where its own ends, in pixels from the top."""
    label_font, caption_font = ImageFont.load_default(14), ImageFont.load_default(18)
    top, bottom = GAP + 20, GAP + 20 + TILE + GAP // 2
    width = 3 * GAP + len(labels) * (TILE + GAP)
    strip = Image.new("RGB", (width, bottom + CAPTION_LINES * LINE + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for place, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
        left = 2 * GAP + place * (TILE + GAP)
        draw.text((left, GAP), label, fill="gray", font=label_font)
        if picture is not None:
            tile = _fit(picture)
            strip.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    # Letters per line, from the mean width of this caption's own; a tenth is left for lines of wider ones.
    letters = int((width - 4 * GAP) / 1.1 / max(1.0, caption_font.getlength(caption)) * max(1, len(caption)))
    lines = textwrap.wrap(caption, max(letters, 8), max_lines=CAPTION_LINES, placeholder=" …")
    draw.multiline_text((2 * GAP, bottom), "\n".join(lines), fill="black", font=caption_font)
    return strip, bottom + len(lines) * LINE + GAP


def _fit(picture: Image.Image) -> Image.Image:
    long = max(picture.size)
    if long <= TILE:
        factor = TILE // long
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * TILE / long)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
