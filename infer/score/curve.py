"""Draws scores against each other, a line for each model."""

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

FINE = 3  # drawn this much larger, and then reduced, since Pillow does not smooth lines
WIDTH, HEIGHT = 960 * FINE, 640 * FINE
LEFT, TOP, RIGHT, BOTTOM = 90 * FINE, 30 * FINE, WIDTH - 30 * FINE, HEIGHT - 80 * FINE  # the plot itself
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()  # the color-blind can tell them apart


def draw_curve(lines: Mapping[str, Sequence[tuple[float, float, str]]], x_title: str, y_title: str) -> Image.Image:
    """Draw points (x, y, label), joined in their order, for each name in the legend: RGB, 960 x 640 pixels."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(16 * FINE), ImageFont.load_default(13 * FINE)
    all_x, all_y, _ = zip(*itertools.chain(*lines.values()), strict=True)
    x_ticks, y_ticks = _ticks(all_x), _ticks(all_y)

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = ((value - ends[0]) / (ends[-1] - ends[0]) for value, ends in ((x, x_ticks), (y, y_ticks)))
        return LEFT + right * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    for x in x_ticks:
        draw.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], "#dddddd", FINE)
        draw.text((place(x, 0)[0], BOTTOM + 8 * FINE), f"{x:g}", "black", small, anchor="mt")
    for y in y_ticks:
        draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], "#dddddd", FINE)
        draw.text((LEFT - 8 * FINE, place(0, y)[1]), f"{y:g}", "black", small, anchor="rm")
    draw.text(((LEFT + RIGHT) / 2, BOTTOM + 40 * FINE), x_title, "black", font, anchor="mt")
    upwards = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)  # which knows no anchors
    _, _, width, height = upwards.getbbox(y_title)
    draw.text((20 * FINE - width // 2, (TOP + BOTTOM - height) // 2), y_title, "black", upwards)

    for row, ((name, points), color) in enumerate(zip(lines.items(), itertools.cycle(COLORS), strict=False)):
        draw.line([place(x, y) for x, y, _ in points], color, 2 * FINE, joint="curve")
        for x, y, label in points:
            across, down = place(x, y)
            draw.circle((across, down), 4 * FINE, color)
            draw.text((across + 7 * FINE, down - 7 * FINE), label, color, small, anchor="lb")
        # The upper right is free: what keeps more of the picture follows the edit less.
        draw.text((RIGHT - 12 * FINE, TOP + (12 + 24 * row) * FINE), name, color, font, anchor="rt")
    return picture.reduce(FINE)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, four to nine or so, the first below all values and the last above them."""
    low, high = min(values), max(values)
    rough = max(high - low, 1e-3) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    first, last = math.floor(low / step - 0.2), math.ceil(high / step + 0.2)
    return [round(number * step, 10) for number in range(first, last + 1)]
