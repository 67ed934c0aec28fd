"""The edits that OpenMoji allows: families of variants of one character, and instructions that ask for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product

from openmoji import (
    COLOR_SIGNS,
    FLAT,
    HAIR_COLORS,
    HAIR_FILL,
    HAIR_LAYER,
    PALETTE,
    SHADES,
    SKIN_LAYER,
    TONES,
    Variant,
    base_of,
    fills,
    hexcodes,
    name_of,
    parse,
    svg,
)

WORDINGS = {
    "skin tone": (
        "make the skin tone {}",
        "change the skin tone to {}",
        "give them {} skin",
        "turn the skin {}",
        "use a {} skin tone",
        "with {} skin",
        "set the skin tone to {}",
    ),
    "gender": (
        "make it {}",
        "turn them into {}",
        "change the person to {}",
        "show {} instead",
        "draw {} here",
        "replace them with {}",
    ),
    "hair": (
        "give them {} hair",
        "make the hair {}",
        "change the hair to {}",
        "turn the hair {}",
        "{} hair, please",
        "with {} hair",
    ),
    "bald": ("make them bald", "shave the head", "remove the hair", "take the hair off", "no hair, please"),
    "direction": (
        "make it face {}",
        "turn it to the {}",
        "face {}",
        "have it look {}",
        "point it to the {}",
        "flip it so that it faces {}",
    ),
    "mirror": (
        "mirror it",
        "flip it",
        "turn it around",
        "make it face the other way",
        "have it look the other way",
        "swap left and right",
    ),
    "color": (
        "make it {}",
        "change the color to {}",
        "paint it {}",
        "turn it {}",
        "color it {}",
        "recolor it in {}",
    ),
    "named color": ("make the {noun} {}", "turn the {noun} {}", "paint the {noun} {}"),
}
GENDERS = {"man": "person", "woman": "person", "boy": "child", "girl": "child"} | dict.fromkeys(
    ("old man", "old woman"), "older person"
)  # and who is nobody in particular
COLORED = {  # one thing that OpenMoji itself draws in several colors
    "heart": "red:2764 orange:1F9E1 yellow:1F49B green:1F49A blue:1FA75 purple:1F49C brown:1F90E pink:1FA77 "
    "black:1F5A4 white:1F90D",
    "circle": "red:1F534 orange:1F7E0 yellow:1F7E1 green:1F7E2 blue:1F535 purple:1F7E3 brown:1F7E4 "
    "black:26AB white:26AA",
    "square": "red:1F7E5 orange:1F7E7 yellow:1F7E8 green:1F7E9 blue:1F7E6 purple:1F7EA brown:1F7EB "
    "black:2B1B white:2B1C",
    "jar": " ".join(f"{color}:1FAD9-200D-{sign}" for sign, color in COLOR_SIGNS.items()),
    "hexagon": " ".join(f"{color}:2B21-FE0F-200D-{sign}" for sign, color in COLOR_SIGNS.items()),
    "flag": " ".join(f"{color}:1F3F3-FE0F-200D-{sign}" for sign, color in COLOR_SIGNS.items()),
}
# Seen from the side, and which way they look. OpenMoji ships both directions of six characters and of four hands;
# the others are mirrored here, as OpenMoji's own right-facing characters are.
FACING_LEFT = (
    "1F400 1F401 1F402 1F403 1F404 1F405 1F406 1F407 1F408 1F40E 1F40F 1F410 1F411 1F412 1F413 1F415 1F416 1F417 "
    "1F418 1F421 1F422 1F429 1F42A 1F42B 1F42C 1F434 1F43F 1F692 1F693 1F695 1F697 1F69B 1F69C 1F6F5 1F6FB 1F930 "
    "1F93A 1F983 1F984 1F986 1F988 1F98C 1F98D 1F98F 1F992 1F993 1F994 1F999 1F99C 1F9A1 1F9A2 1F9A3 1F9A4 1F9A8 "
    "1F9A9 1F9AB 1F9AE 1F9BC 1F9BD 1FABF 1FACF"
).split()
FACING_RIGHT = "1F40C 1F40D 1F41D 1F426 1F691 1F995 1F996 1F99B 1F99D 1F9AC".split()
POINTING = {"1F448": "1F449", "1F91C": "1F91B", "1FAF2": "1FAF1", "1FAF8": "1FAF7"}  # left to right
SKIN = '<g id="skin'
GRAYS = {"#000000", "#3F3F3F", "#9B9B9A", "#D0CFCE", "#FFFFFF"}


@dataclass(frozen=True)
class Family:
    """Variants of one character along one axis of editing."""

    kind: str
    members: dict[str, str]
    """What to ask for (`dark`, `woman`, `left`, …) to the key of the picture that shows it."""
    default: str = ""
    """A variant that can be edited but that no instruction asks for, such as the yellow one; or none."""
    noun: str = ""
    """What instructions about color may call the thing."""

    @property
    def base(self) -> str:
        """The character, by which the data is split."""
        return base_of(next(iter(self.members.values())))

    def edits(self) -> Iterator[tuple[str, str]]:
        """All (key before, what to ask for), also for what is there already; no picture is mirrored already."""
        pairs = product([self.default] * bool(self.default) + list(self.members.values()), self.members)
        return (pair for pair in pairs if self.kind != "mirror" or pair[0] == self.default)

    def instructions(self, value: str) -> list[str]:
        """Every wording that asks for `value`."""
        kind = "bald" if value == "bald" else self.kind
        phrase = value if self.kind != "gender" else f"an {value}" if value.startswith("o") else f"a {value}"
        named = WORDINGS["named color"] if self.noun else ()
        return [wording.format(phrase, noun=self.noun) for wording in (*WORDINGS[kind], *named)]


def _along(axis: str) -> Iterator[tuple[Variant, dict[str, str]]]:
    """Sequences that differ in nothing but `axis`: how they agree, and value of the axis to sequence."""
    groups: defaultdict[Variant, dict[str, str]] = defaultdict(dict)
    for code in hexcodes():
        variant = parse(code)
        groups[variant._replace(**{axis: ""})][getattr(variant, axis)] = code
    return iter(groups.items())


def skin_tones() -> Iterator[Family]:
    """Every sequence of one person, or hand, in the five tones.

    OpenMoji draws people of another tone with hair of another color, which no instruction tells. So all tones are
    filled into the drawing of one of them, in each family the next one: hands are as OpenMoji has them, and hair stays.
    """
    turns = cycle(TONES.values())
    for _, codes in _along("tone"):
        if set(TONES.values()) <= set(codes) and SKIN_LAYER.search(svg(codes["light"])):
            one = codes[next(turns)]
            members = {tone: f"{one}~skin:{tone}" for tone in TONES.values()}
            yield Family("skin tone", members, default=f"{one}~skin:yellow" if "" in codes else "")


def genders() -> Iterator[Family]:
    """Characters drawn as a man and as a woman, in each tone.

    No instruction asks for nobody in particular: that one is drawn like the man here, like the woman there.
    """
    for _, codes in _along("gender"):
        members = {gender: code for gender, code in codes.items() if gender in GENDERS}
        if len(members) > 1:
            yield Family("gender", members, default=codes.get(GENDERS[next(iter(members))], ""))


def hair() -> Iterator[Family]:
    """The hair styles that OpenMoji draws, and five colors filled into the hair layer of single people."""
    for _, codes in _along("hair"):
        if len(codes) > 1:
            members = {style: code for style, code in codes.items() if style}
            yield Family("hair", members, default=codes.get("", ""))
    for code in hexcodes():
        layers = HAIR_LAYER.findall(svg(code))
        if layers and HAIR_FILL.search("".join(layers)) and "+" not in parse(code).tone + parse(code).gender:
            yield Family("hair", {color: f"{code}~hair:{color}" for color in HAIR_COLORS}, default=code)


def directions() -> Iterator[Family]:
    """Characters and things that face left or right."""
    for variant, codes in _along("facing"):
        mirrored = f"{codes['left']}~mirror" if "left" in codes else ""
        if len(codes) > 1:
            yield Family("direction", codes)
        elif variant.stem in FACING_LEFT:
            yield Family("direction", {"left": codes["left"], "right": mirrored})
        elif variant.stem in FACING_RIGHT:
            yield Family("direction", {"left": mirrored, "right": codes["left"]})
        elif variant.stem in POINTING:
            right = codes["left"].replace(variant.stem, POINTING[variant.stem])
            yield Family("direction", {"left": codes["left"], "right": right})


def mirrors() -> Iterator[Family]:
    """Every picture and its mirror image: what turning around is, learned from more than the few that face a side."""
    for code in hexcodes():
        yield Family("mirror", {"mirrored": f"{code}~mirror"}, default=code)


def colors() -> Iterator[Family]:
    """Things that OpenMoji draws in several colors, and all others of one color, redrawn in its palette.

    What is drawn in one shade gets the one that hearts, circles and squares have in each color, so that the shade that
    is asked for does not depend on the one before.
    """
    for noun, members in COLORED.items():
        yield Family("color", dict(member.split(":") for member in members.split()), noun=noun)
    shipped = {member.partition(":")[2] for members in COLORED.values() for member in members.split()}
    for code in hexcodes():
        drawn = fills(code) & {*SHADES}
        others = fills(code) - drawn
        used = {SHADES[shade] for shade in drawn}
        flag = code.startswith(("1F1", "1F3F4-E"))  # letters and countries
        if code in shipped or flag or len(used) != 1 or not others <= GRAYS or SKIN in svg(code):
            continue
        if len(drawn) == 1:
            # In black or white that is there already, it would melt into the rest and could not be told apart again.
            members = {
                color: code if fill in drawn else f"{code}~fill:{color}"
                for color, fill in FLAT.items()
                if fill not in others
            }
        else:
            (own,) = used
            members = {color: code if color == own else f"{code}~{own}:{color}" for color in PALETTE}
        noun = name_of(code)
        simple = noun and noun.count(" ") < 2 and not set(noun.split()) & {*FLAT}
        yield Family("color", members, noun=noun if simple and noun.replace(" ", "").isalpha() else "")


@cache
def families() -> tuple[Family, ...]:
    """All of them, in a fixed order."""
    return (*skin_tones(), *genders(), *hair(), *directions(), *mirrors(), *colors())
