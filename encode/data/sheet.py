"""Draws contact sheets: pictures side by side under their names, with a caption, as strips or as a grid."""

import math
import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels; large enough to judge an edit, small enough for a hundred of them
GAP = 8  # between pictures; twice as much between strips
LINE = 24
HEADING = 20  # height of a label's line
CAPTION_LINES = 3
LABEL_FONT, CAPTION_FONT = ImageFont.load_default(14), ImageFont.load_default(18)


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
    width = 3 * GAP + len(labels) * (tile + GAP)
    strips = [
        (_wrap(caption, width), [picture and _fit(picture, tile) for picture in pictures]) for caption, pictures in rows
    ]
    below = HEADING + tile + GAP // 2
    height = below + LINE * max(len(lines) for lines, _ in strips) + 2 * GAP
    columns = max(1, round(math.sqrt(len(strips) * height / width)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(strips) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (lines, pictures) in enumerate(strips):
        left, top = index % columns * width + 2 * GAP, index // columns * height + GAP
        draw.multiline_text((left, top + below), "\n".join(lines), "black", CAPTION_FONT)
        for label, picture in zip(labels, pictures, strict=True):
            draw.text((left, top), label, "gray", LABEL_FONT)
            if picture:
                middle = left + (tile - picture.width) // 2, top + HEADING + (tile - picture.height) // 2
                sheet.paste(picture, middle)
            left += tile + GAP
    return sheet


def grid(
    original: Image.Image, caption: str, edits: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Draw the edits of one picture over two settings, as the InstructPix2Pix paper shows its guidance scales.

    Args:
        original: stands at the left.
        caption: stands above, such as the prompt.
        edits: of the original's size, row by row, one for each pair of labels.
        rows, columns: their labels.

    Returns:
        An RGB picture, enlarged or reduced as in `contact_sheet`.
    """
    first = _fit(original)
    across = max(first.width, *map(math.ceil, map(LABEL_FONT.getlength, columns))) + GAP
    down = first.height + GAP
    left = 5 * GAP + across + math.ceil(max(map(LABEL_FONT.getlength, rows)))
    width = max(left + len(columns) * across, TILE) + GAP
    lines = _wrap(caption, width)
    top = 2 * GAP + len(lines) * LINE + HEADING
    sheet = Image.new("RGB", (width, top + len(rows) * down + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((2 * GAP, GAP), "\n".join(lines), "black", CAPTION_FONT)
    middle = top + (len(rows) - 1) * down // 2
    draw.text((2 * GAP, middle - HEADING), "original", "gray", LABEL_FONT)
    sheet.paste(first, (2 * GAP, middle))
    for column, label in enumerate(columns):
        draw.text((left + column * across, top - HEADING), label, "gray", LABEL_FONT)
    for row, label in enumerate(rows):
        draw.text((left - GAP, top + row * down + first.height // 2), label, "gray", LABEL_FONT, anchor="rm")
    for index, edit in enumerate(edits):
        row, column = divmod(index, len(columns))
        sheet.paste(_fit(edit), (left + column * across, top + row * down))
    return sheet


def _wrap(caption: str, width: int) -> list[str]:
    """At most `CAPTION_LINES` lines that fit into `width` pixels, with margins."""
    # Letters per line, from the mean width of this caption's own; a tenth is left for lines of wider ones.
    letters = int((width - 4 * GAP) / 1.1 / max(1.0, CAPTION_FONT.getlength(caption)) * max(1, len(caption)))
    return textwrap.wrap(caption, max(letters, 8), max_lines=CAPTION_LINES, placeholder=" …")


def _fit(picture: Image.Image, side: int = TILE) -> Image.Image:
    long = max(picture.size)
    if long <= side:
        factor = side // long
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / long)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
