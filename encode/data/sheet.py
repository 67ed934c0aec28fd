"""Draws contact sheets: pictures side by side under their names, with a caption, as strips or as a grid."""

import math
import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels; large enough to judge an edit, small enough for a hundred of them
GAP = 8  # between pictures; twice as much between strips
LINE = 24
CAPTION_LINES = 3


def contact_sheet(
    rows: Iterable[tuple[str, Sequence[Image.Image | None]]], labels: Sequence[str], tile: int = TILE
) -> Image.Image:
    """Draw one strip for each (caption, pictures), the strips in about a square.

    Args:
        rows: as many pictures in each as there are labels; None leaves a place empty. An iterator is read one
            row at a time, so full-size pictures need not be in memory together. At least one row.
        labels: what the pictures of each place are, such as "original", "edited", "target".
        tile: pixels of a picture's longer side on the sheet.

    Returns:
        An RGB picture. Small pictures are enlarged by whole factors, pixel by pixel; large ones are reduced.
    """
    from diffusers.utils import make_image_grid  # here, since it brings torch along

    drawn = [_strip(caption, pictures, labels, tile) for caption, pictures in rows]
    width, height = drawn[0][0].width, max(bottom for _, bottom in drawn)
    strips = [strip.crop((0, 0, width, height)) for strip, _ in drawn]
    columns = max(1, round(math.sqrt(len(strips) * height / width)))
    strips += [Image.new("RGB", (width, height), "white")] * (-len(strips) % columns)
    return make_image_grid(strips, rows=len(strips) // columns, cols=columns)


def grid(
    original: Image.Image,
    caption: str,
    edits: Sequence[Image.Image],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> Image.Image:
    """Draw the edits of one picture over two settings, as the InstructPix2Pix paper shows its guidance scales.

    Args:
        original: stands at the left.
        caption: stands above, such as the prompt.
        edits: of the original's size, row by row, one for each pair of labels.

    Returns:
        An RGB picture, enlarged or reduced as in `contact_sheet`.
    """
    label_font, caption_font = ImageFont.load_default(14), ImageFont.load_default(18)
    first = _fit(original)
    across = max(first.width, *map(math.ceil, map(label_font.getlength, column_labels))) + GAP
    down = first.height + GAP
    left = 5 * GAP + across + math.ceil(max(map(label_font.getlength, row_labels)))
    width = max(left + len(column_labels) * across, TILE) + GAP
    lines = _wrap(caption, caption_font, width - 4 * GAP)
    top = 2 * GAP + len(lines) * LINE + 20
    height = top + len(row_labels) * down + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((2 * GAP, GAP), "\n".join(lines), fill="black", font=caption_font)
    middle = top + (len(row_labels) - 1) * down // 2
    draw.text((2 * GAP, middle - 20), "original", fill="gray", font=label_font)
    sheet.paste(first, (2 * GAP, middle))
    for column, label in enumerate(column_labels):
        draw.text((left + column * across, top - 20), label, fill="gray", font=label_font)
    for row, label in enumerate(row_labels):
        draw.text((left - GAP, top + row * down + first.height // 2), label, "gray", label_font, anchor="rm")
    for index, edit in enumerate(edits):
        row, column = divmod(index, len(column_labels))
        sheet.paste(_fit(edit), (left + column * across, top + row * down))
    return sheet


def _strip(
    caption: str, pictures: Sequence[Image.Image | None], labels: Sequence[str], side: int
) -> tuple[Image.Image, int]:
    """A strip with room for a caption of any length, and where its own ends, in pixels from the top."""
    label_font, caption_font = ImageFont.load_default(14), ImageFont.load_default(18)
    top, bottom = GAP + 20, GAP + 20 + side + GAP // 2
    width = 3 * GAP + len(labels) * (side + GAP)
    strip = Image.new("RGB", (width, bottom + CAPTION_LINES * LINE + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for place, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
        left = 2 * GAP + place * (side + GAP)
        draw.text((left, GAP), label, fill="gray", font=label_font)
        if picture is not None:
            tile = _fit(picture, side)
            strip.paste(tile, (left + (side - tile.width) // 2, top + (side - tile.height) // 2))
    lines = _wrap(caption, caption_font, width - 4 * GAP)
    draw.multiline_text((2 * GAP, bottom), "\n".join(lines), fill="black", font=caption_font)
    return strip, bottom + len(lines) * LINE + GAP


def _wrap(caption: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """At most `CAPTION_LINES` lines that fit into `width` pixels."""
    # Letters per line, from the mean width of this caption's own; a tenth is left for lines of wider ones.
    letters = int(width / 1.1 / max(1.0, font.getlength(caption)) * max(1, len(caption)))
    return textwrap.wrap(caption, max(letters, 8), max_lines=CAPTION_LINES, placeholder=" …")


def _fit(picture: Image.Image, side: int = TILE) -> Image.Image:
    long = max(picture.size)
    if long <= side:
        factor = side // long
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / long)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
