"""The plot of scores against each other: points where they belong, a color for each model."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from ip2p.infer.score.curve import COLORS, FINE, LEFT, RIGHT, draw_curve

FALLING = [(0.24, 0.78, "1.0"), (0.2, 0.83, "1.2"), (0.12, 0.9, "1.4")]


def middle_of_dots(picture: Image.Image, color: str) -> list[np.ndarray]:
    """(x, y) of the discs of a color, from the left: where it fills 5 x 5 pixels, as neither line nor letter does."""
    inside = np.abs(np.asarray(picture, np.int16) - np.array(ImageColor.getrgb(color))).max(axis=2) < 40
    full = np.lib.stride_tricks.sliding_window_view(inside, (5, 5)).all(axis=(2, 3))
    dots: list[list[np.ndarray]] = []
    for point in np.argwhere(full)[:, ::-1] + 2:
        near = [dot for dot in dots if np.abs(dot[0] - point).max() < 12]
        if near:
            near[0].append(point)
        else:
            dots.append([point])
    return sorted((np.mean(dot, axis=0) for dot in dots), key=lambda middle: middle[0])


def test_points_stand_in_proportion_to_their_scores() -> None:
    """Higher likeness is drawn higher, and distances on paper are those of the numbers."""
    dots = middle_of_dots(draw_curve({"out": FALLING}, "x", "y"), COLORS[0])
    (x1, y1), (x2, y2), (x3, y3) = dots
    assert x1 < x2 < x3
    assert y1 < y2 < y3, "pixels count downwards: the left point is the highest"
    assert (x2 - x1) / (x3 - x1) == pytest.approx((0.2 - 0.12) / (0.24 - 0.12), abs=0.01)
    assert (y2 - y1) / (y3 - y1) == pytest.approx((0.9 - 0.83) / (0.9 - 0.78), abs=0.01)


def test_every_model_has_a_line_of_its_own_color() -> None:
    """Two models share the axes, and both are drawn whole; their names stand in their colors."""
    shifted = [(x + 0.03, y, label) for x, y, label in FALLING]
    picture = draw_curve({"one": FALLING, "two": shifted}, "x", "y")
    ones, twos = (middle_of_dots(picture, color) for color in COLORS[:2])
    assert len(ones) == len(twos) == 3
    assert [one[1] for one in ones] == pytest.approx([two[1] for two in twos], abs=1)
    assert all(one[0] < two[0] for one, two in zip(ones, twos, strict=True))


@pytest.mark.parametrize("points", [FALLING[:1], [(0.1, 0.9, "1.0")] * 3, [(-0.2, 0.99999, ""), (-0.21, 0.99998, "")]])
def test_any_scores_lie_inside_the_plot(points: list[tuple[float, float, str]]) -> None:
    """One point, equal ones, negative ones and ones that differ by a hair."""
    dots = middle_of_dots(draw_curve({"out": points}, "x", "y"), COLORS[0])
    assert len(dots) == len(set(points))
    assert all(LEFT / FINE < x < RIGHT / FINE for x, _ in dots)
