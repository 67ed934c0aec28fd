"""Says in English what the pictures show and how some turn into others: what the starter is trained on."""

from __future__ import annotations

from collections import defaultdict

from edits import families
from openmoji import hexcodes, is_held_out, name_of

PHRASES = {"hair": "{} hair", "direction": "facing {}", "color": "in {}"}  # what the names do not say already


def captions(held_out: bool = False) -> dict[str, list[str]]:
    """Key to texts of every emoji and derived picture on one side of the split.

    The first text is the name, with what an edit may have changed: `man, graduation cap, dark skin tone`. The
    others are the instructions that the picture answers, `give them dark skin`: so the text encoder learns the
    words in which people will ask. Pictures that neither Unicode nor an edit can name are left out.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for code in hexcodes():
        if name_of(code):
            names[code].append(name_of(code))
    for family in families():
        for value, key in family.members.items() if family.kind != "mirror" else ():  # that any picture answers
            if "~" in key and not names[key] and name_of(key):
                names[key].append(name_of(key))
            if family.kind in PHRASES and not (value in " ".join(names[key]) or value == "bald"):
                names[key].append(PHRASES[family.kind].format(value))
            answers[key] += family.instructions(value)
    return {
        key: [", ".join(words), *answers[key]]
        for key, words in sorted(names.items())
        if words and is_held_out(key) == held_out
    }


def edits(held_out: bool = False) -> dict[str, list[tuple[str, str, list[str]]]]:
    """Key before, key after and instructions, by kind, on one side of the split: what the demo does not teach."""
    found: dict[str, list[tuple[str, str, list[str]]]] = {kind: [] for kind in ("mirror", "gender", "direction")}
    for family in families():
        if family.kind in found and is_held_out(family.base) == held_out:
            found[family.kind] += [
                (key, family.members[value], family.instructions(value)) for key, value in family.edits()
            ]
    return found
