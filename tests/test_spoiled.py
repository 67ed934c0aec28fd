"""Tests of the OpenMoji example's spoiled pairs: what is spoiled how, and which threshold finds how much of it."""

from pathlib import Path

import pytest

import dataset
import edits
import spoiled
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.writer import write_state

SOME = {"skin tone": 20, "gender": 0, "hair": 10, "direction": 0, "mirror": 0, "color": 10}


def test_a_tenth_is_spoiled_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of one half is another character's; the texts of the other ask for what is not shown."""
    monkeypatch.setattr(dataset, "TRAIN", SOME)
    monkeypatch.setattr(dataset, "MOVED", SOME)
    rows = dataset.rows(False, 32, seed=0, moved=0.5, kinds=["skin tone", "hair", "color"])
    made = spoiled.spoil(rows, 0)
    counts = [[row["spoiled"] for row in made].count(way) for way in spoiled.WAYS]
    assert sum(counts) == round(len(rows) / 10)
    assert counts[0] - counts[1] in (0, 1)
    pictures = {row["edited_image"]["bytes"]: row["base"] for row in rows}
    for row, now in zip(rows, made, strict=True):
        same = {name for name in row if row[name] == now[name]}
        assert row.keys() - same == {"": set(), "wrong target": {"edited_image"}}.get(now["spoiled"], {"edit_prompt"})
        assert now["original_prompt"]
        if now["spoiled"] == "wrong target":
            assert pictures[now["edited_image"]["bytes"]] != row["base"]
        elif now["spoiled"]:
            families = [family for family in edits.families() if row["target"] in family.members.values()]
            asked = [value for f in families for value in f.members if now["edit_prompt"] in f.instructions(value)]
            assert all(family.members[value] != row["target"] for family in families for value in asked)
    assert spoiled.spoil(rows, 0) == made
    assert spoiled.spoil(rows, 1) != made


def test_a_threshold_leaves_nine_tenths_of_the_good_ones(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight good pairs and two bad ones, a score finds what is below all of the good ones but one."""
    whole = Cache.open(cache)
    samples = whole.samples().slice(0, 10)
    columns = {"spoiled": [*[""] * 10], "planted": [float(n) for n in range(10)]}
    columns["spoiled"][0], columns["spoiled"][5] = spoiled.WAYS
    for name, values in columns.items():
        samples = samples.append_column(name, [values])
    write_state(tmp_path, whole.manifest, samples, {})
    monkeypatch.setattr(spoiled, "CONDITIONS", {"planted": "planted >= {}"})
    monkeypatch.setattr(spoiled, "GOOD", 7 / 8)
    result = spoiled.found(Cache.open(tmp_path))["planted"]
    assert (result["good"], result["all"]) == (7 / 8, 0.5)
    assert [result[way] for way in spoiled.WAYS] == [1, 0]
    assert 1 < float(result["condition"].removeprefix("planted >= ")) <= 2
