"""Tests of the OpenMoji example: the pairs, the split by character and the scores."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import captions
import dataset
import edits
import evaluate
import openmoji
from ip2p.infer.score.metrics import EQUAL

FEW = {"skin tone": 12, "gender": 6, "hair": 8, "direction": 6, "mirror": 6, "color": 12}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, so that a split is built in a second."""
    monkeypatch.setattr(dataset, "TRAIN", FEW)
    monkeypatch.setattr(dataset, "MOVED", FEW)
    monkeypatch.setattr(dataset, "TEST", FEW)


def test_no_character_is_on_both_sides_of_the_split() -> None:
    """Every variant of a character, derived ones included, is held out or none is, and each kind of edit has both."""
    sides: dict[str, set[bool]] = {}
    kinds: dict[str, set[bool]] = {}
    for family in edits.families():
        for key in [*family.members.values(), *([family.default] if family.default else [])]:
            sides.setdefault(openmoji.base_of(key), set()).add(openmoji.is_held_out(key))
        kinds.setdefault(family.kind, set()).add(openmoji.is_held_out(family.base))
        assert len({openmoji.base_of(key) for key in family.members.values()}) == 1
    assert all(len(side) == 1 for side in sides.values())
    assert kinds == {kind: {True, False} for kind in dataset.TRAIN}
    assert not set(captions.captions(held_out=False)) & set(captions.captions(held_out=True))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("1F44B-1F3FD", "waving hand sign, medium skin tone"),
        ("1F44B-1F3FD~skin:dark", "waving hand sign, dark skin tone"),
        ("1F44B-1F3FD~skin:medium-light~red:blue+blue:red", "waving hand sign, medium-light skin tone"),
        ("1F44B-1F3FD~skin:yellow", "waving hand sign"),
        ("1F468-200D-1F9B3~hair:red", "man"),
        ("1F468-200D-1F9B1~hair:red", "man, curly hair"),
        ("1F40E~mirror", "horse"),
    ],
)
def test_names_say_what_is_drawn(key: str, name: str) -> None:
    """Not what was there before something was filled in."""
    assert openmoji.name_of(key) == name


@pytest.mark.parametrize(
    ("code", "other"),
    [
        ("1F469-1F3FD-200D-1F393", "1F9D1-200D-1F393"),
        ("1F3C3-1F3FF-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F468-200D-1F9B0", "1F471-1F3FB"),
        ("1F449-1F3FB", "1F448"),
        ("1F49C", "2764"),
        ("1F468-1F3FB-200D-1F91D-200D-1F468-1F3FF", "1F46B"),
        ("1FAD9-200D-1F7E6~blue:red", "1FAD9"),
    ],
)
def test_variants_of_a_character_have_one_base(code: str, other: str) -> None:
    """Tone, gender, hair, direction and color do not make another character."""
    assert openmoji.base_of(code) == openmoji.base_of(other)


@pytest.mark.parametrize(
    ("derived", "shipped"),
    [
        ("1F3C3~mirror", "1F3C3-200D-27A1-FE0F"),
        ("1FAD9-200D-1F7E5~red:blue", "1FAD9-200D-1F7E6"),
        ("1F44B-1F3FB~skin:dark", "1F44B-1F3FF"),
        ("1F9D1-1F3FF-200D-1F3EB~skin:dark", "1F9D1-1F3FF-200D-1F3EB"),
    ],
)
def test_derived_pictures_are_what_openmoji_draws_itself(derived: str, shipped: str) -> None:
    """Mirroring and recoloring give OpenMoji's own variants, where it ships them."""
    assert openmoji.render(derived).tobytes() == openmoji.render(shipped).tobytes()


def test_a_thing_of_one_shade_is_filled_as_openmoji_fills_hearts_circles_and_squares() -> None:
    """Whatever shade it was drawn in; not in black or white if that would swallow a part of it."""
    for noun in ("heart", "circle", "square"):
        members = dict(member.split(":") for member in edits.COLORED[noun].split())
        for color, key in members.items():
            assert openmoji.fills(f"{members['red']}~fill:{color}") == openmoji.fills(key), (noun, color)
    colors = {family.base: family.members for family in edits.families() if family.kind == "color"}
    assert colors["1F433"] == {color: f"1F433~fill:{color}" for color in openmoji.FLAT}
    assert colors["1F961"]["red"] == "1F961"
    assert "white" not in colors["1F961"]


def test_another_skin_tone_leaves_the_hair_as_it_is() -> None:
    """OpenMoji gives the dark ones black hair and the fairer ones blond, for which no instruction asks."""
    for family in edits.skin_tones():
        keys = filter(None, (*family.members.values(), family.default))
        assert len({openmoji.SKIN_LAYER.sub("", openmoji.svg(key)) for key in keys}) == 1, family.base


@pytest.mark.usefixtures("few")
def test_rows_are_true_pairs_of_one_character() -> None:
    """Both pictures are renders of one family's members, and the instruction asks for the second."""
    families = {(family.kind, key): family for family in edits.families() for key in family.members.values()}
    for held_out in (False, True):
        for row in dataset.rows(held_out, 64, seed=3):
            family = families[row["kind"], row["target"]]
            (value,) = [value for value, key in family.members.items() if key == row["target"]]
            assert row["source"] in {family.default, *family.members.values()}
            assert row["edit_prompt"] in family.instructions(value)
            assert row["input_image"]["bytes"] == dataset.png(row["source"], 64, row["moved"])
            assert row["edited_image"]["bytes"] == dataset.png(row["target"], 64, row["moved"])
            assert row["target"] in row["candidates"]
            assert openmoji.is_held_out(row["base"]) == held_out


@pytest.mark.usefixtures("few")
def test_the_seed_decides_the_rows() -> None:
    """The same seed gives the same rows in the same order, another seed gives others."""
    assert dataset.rows(True, 32, seed=1) == dataset.rows(True, 32, seed=1)
    assert dataset.rows(True, 32, seed=1) != dataset.rows(True, 32, seed=2)


@pytest.mark.usefixtures("few")
def test_datasets_loads_the_folder(tmp_path: Path) -> None:
    """`datasets` finds both splits, decodes both pictures, and the attribution lies beside them."""
    dataset.build(tmp_path, size=32)
    loaded: Any = load_dataset(str(tmp_path))
    assert set(loaded) == {"train", "test"}
    row = loaded["train"][0]
    assert row["input_image"].size == row["edited_image"].size == (32, 32)
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.md").read_text()


@pytest.mark.usefixtures("few")
def test_pairs_that_are_there_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for the same pairs, a folder is kept; for others, or where it was not finished, it is drawn anew."""
    counts = dataset.build(tmp_path, size=32, kinds=["hair"])
    assert counts == {"train": Counter(hair=8), "test": Counter(hair=8)}
    drawn: list[bool] = []
    rows = dataset.rows
    monkeypatch.setattr(dataset, "rows", lambda *args, **options: drawn.append(args[0]) or rows(*args, **options))
    assert dataset.build(tmp_path, size=32, kinds=["hair"]) == counts
    assert drawn == []
    assert dataset.build(tmp_path, size=32, kinds=["color", "hair"])["test"] == Counter(color=12, hair=8)
    assert drawn == [False, True]
    (tmp_path / ".made.json").unlink()
    dataset.build(tmp_path, size=32, kinds=["color", "hair"])
    assert drawn == [False, True] * 2


def test_a_variant_that_looks_like_the_target_is_no_candidate() -> None:
    """OpenMoji draws this worker the same as a man and as nobody in particular, and the woman with other hair."""
    person, members = "1F9D1-200D-1F3ED", {"man": "1F468-200D-1F3ED", "woman": "1F469-200D-1F3ED"}
    family = edits.Family("gender", members, default=person)
    assert dataset.candidates(family, person, members["man"]) == [members["man"], members["woman"]]
    assert dataset.candidates(family, person, members["woman"]) == [members["man"], members["woman"], person]


def test_nobody_in_particular_can_be_edited_and_is_never_asked_for() -> None:
    """What OpenMoji draws as a person looks like the man here, like the woman there: an instruction cannot tell."""
    genders = [family for family in edits.families() if family.kind == "gender"]
    asked = {value for family in genders for value in family.members}
    assert asked == {"man", "woman", "boy", "girl", "old man", "old woman"}
    defaults = {openmoji.parse(family.default).gender for family in genders}
    assert defaults == {"person", "child", "older person"}


def test_nothing_is_mirrored_already() -> None:
    """Whatever a picture shows, "mirror it" asks for another one; what faces left may be asked to face left."""
    found: dict[str, list[bool]] = {"mirror": [], "direction": []}
    for family in edits.families():
        if family.kind in found:
            found[family.kind] += [source == family.members[value] for source, value in family.edits()]
    assert len(found["mirror"]) == len(openmoji.hexcodes())
    assert not any(found["mirror"])
    assert any(found["direction"])


@pytest.mark.parametrize(("code", "turns"), [("1F1E7-1F1EC", False), ("1F1F3-1F1EA", False), ("1F40E", True)])
def test_what_is_its_own_mirror_image_is_no_pair(code: str, turns: bool) -> None:
    """The flags of Bulgaria and Niger stay what they are, however their edges are rounded; a horse turns around."""
    assert dataset.visible("mirror", code, f"{code}~mirror") == turns


@pytest.mark.parametrize(
    ("man", "woman", "pair"),
    [
        ("1F468-200D-1F393", "1F469-200D-1F393", True),  # a student, with other hair
        ("1F3C3-200D-2642-FE0F", "1F3C3-200D-2640-FE0F", False),  # a runner, with a ponytail of three pixels
        ("1F6B5", "1F6B5-200D-2640-FE0F", False),  # a cyclist, on another road
        ("1F468-200D-1F3EB", "1F469-200D-1F3EB", False),  # a teacher, in a cardigan of another color
    ],
)
def test_a_man_and_a_woman_are_a_pair_if_it_shows_and_nothing_else_differs(man: str, woman: str, pair: bool) -> None:
    """An instruction says neither how the other one stands nor what they wear."""
    assert dataset.visible("gender", man, woman) == pair


@pytest.mark.usefixtures("few")
def test_pairs_are_moved_where_told_and_those_to_test_with_never() -> None:
    """Each kind has its rows as they are drawn, then its moved ones; no two of these stand in the same place."""
    drawn, more = dataset.rows(False, 64, 0), dataset.rows(False, 64, 0, moved=2)
    moved = [row for row in more if row["moved"]]
    assert Counter(row["kind"] for row in drawn) == FEW
    assert not any(row["moved"] for row in drawn)
    assert Counter(row["kind"] for row in moved) == {kind: 2 * count for kind, count in FEW.items()}
    assert len({row["moved"] for row in moved}) == len(moved)
    mirrored = {kind: {"scale(-" in row["moved"] for row in moved if row["kind"] == kind} for kind in FEW}
    assert mirrored == {kind: {False} if kind in {"direction", "mirror"} else {False, True} for kind in FEW}
    assert dataset.rows(True, 64, 0, moved=2) == dataset.rows(True, 64, 0)


@pytest.mark.usefixtures("few")
def test_moved_pairs_are_dressed_anew_and_alike() -> None:
    """The colors of clothes trade places in both pictures, skin and hair keep theirs; an edit of color has none."""
    blue = {*openmoji.PALETTE["blue"]}
    plain = openmoji.fills("1F9D1-1F3FD-200D-1F9B0")
    dressed = openmoji.fills("1F9D1-1F3FD-200D-1F9B0~red:blue+blue:red")
    assert plain - dressed == plain & blue
    assert dressed - plain <= {*openmoji.PALETTE["red"]}
    assert openmoji.render("1F697~red:blue+blue:red~red:blue+blue:red").tobytes() == openmoji.render("1F697").tobytes()
    for row in dataset.rows(False, 64, 0, moved=2):
        _, dash, clothes = row["target"].rpartition("~red:")
        assert (dash and "pink:" in clothes) if row["moved"] and row["kind"] != "color" else "+" not in row["target"]
        assert not row["moved"] or row["kind"] == "color" or row["source"].endswith(dash + clothes)
        assert row["target"] in row["candidates"]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", ["direction", "mirror"])
def test_a_mirror_image_stays_one_wherever_it_stands(kind: str) -> None:
    """However such a pair is moved, one picture is the other one mirrored about the middle."""
    moved = [row for row in dataset.rows(False, 64, 0, moved=2) if row["kind"] == kind and row["moved"]]
    mirrored = [row for row in moved if ("mirror" in row["source"]) != ("mirror" in row["target"])]
    assert mirrored
    for row in mirrored:
        pictures = (Image.open(io.BytesIO(row[name]["bytes"])) for name in ("input_image", "edited_image"))
        one, other = (np.asarray(picture, np.float64) for picture in pictures)
        assert np.abs(one[:, ::-1] - other).mean() < 1


def test_a_picture_moved_is_the_picture_moved() -> None:
    """The transform is SVG's, of the whole drawing: here by a quarter, and mirrored as OpenMoji mirrors."""
    still, shifted = (np.asarray(openmoji.render("1F3C3", 72, moved)) for moved in ("", "translate(18, 0)"))
    np.testing.assert_allclose(shifted[:, 18:], still[:, :-18].astype(float), atol=16)  # edges are drawn anew
    assert openmoji.render("1F3C3", 64, openmoji.MIRROR).tobytes() == openmoji.render("1F3C3~mirror").tobytes()


@pytest.mark.usefixtures("few")
def test_a_perfect_edit_scores_one_and_an_untouched_one_nothing() -> None:
    """The target itself is the nearest candidate; the original is not, and its likeness is the one to beat."""
    rows = [row for row in dataset.rows(True, 64, seed=0) if row["source"] != row["target"]]
    for row in rows:
        row |= {"input_image": openmoji.render(row["source"]), "edited_image": openmoji.render(row["target"])}
    perfect = evaluate.scores(rows, [row["edited_image"] for row in rows])["all"]
    untouched = evaluate.scores(rows, [row["input_image"] for row in rows])["all"]
    assert perfect["accuracy"] == 1
    assert perfect["distance"] == pytest.approx(0)
    assert untouched["accuracy"] == 0
    assert untouched["psnr"] == untouched["psnr_original"] < perfect["psnr"]
    assert untouched["inside"] < untouched["psnr"] < 40 < untouched["outside"]
    assert perfect["inside"] == perfect["outside"] == EQUAL


def test_inside_and_outside_are_told_apart_by_what_the_true_edit_changes() -> None:
    """An error inside costs nothing outside, and a region without pixels has no number."""
    before, target = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    target[:2] = 200
    edited = target.copy()
    edited[0] -= 128
    pictures = [Image.fromarray(pixels) for pixels in (before, target, edited)]
    error = (128 / 255) ** 2 / 2
    assert evaluate.apart(*pictures) == {"inside": pytest.approx(-10 * np.log10(error)), "outside": EQUAL}
    assert evaluate.apart(pictures[0], pictures[0], pictures[2]).keys() == {"outside"}
