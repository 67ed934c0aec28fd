"""`examples/openmoji/settings.py`: which edits it asks for, with which masks, and the table that it makes of them."""

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import settings


def test_masks_cover_what_the_true_edit_changes_and_a_little_around(tmp_path: Path) -> None:
    """Where nothing changes all of the picture may, so that what is left alone is known."""
    before = Image.new("RGB", (16, 12), "white")
    after = before.copy()
    after.paste("red", (4, 4, 6, 7))
    pair = {"input_image": [before, before], "edited_image": [after, before]}
    features = datasets.Features(dict.fromkeys(pair, datasets.Image()))
    datasets.Dataset.from_dict(pair, features).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    settings.with_masks(tmp_path / "data", tmp_path / "masked")
    masked: Any = load_dataset(str(tmp_path / "masked"), split="test")
    first, second = (np.asarray(row["mask_image"]) for row in masked)
    expected = np.zeros((12, 16), np.uint8)
    expected[2:9, 2:8] = 255
    assert np.array_equal(first, expected)
    assert (second == 255).all()


def test_the_table_has_a_line_for_each_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many passes as it takes, and means over the seeds."""
    asked: list[str] = []
    found = iter(range(100))
    monkeypatch.setattr(settings, "with_masks", lambda *_: None)
    monkeypatch.setattr(settings, "edit", lambda _model, _data, _edits, _seed, *flags: asked.append(" ".join(flags)))
    monkeypatch.setattr(settings, "score", lambda *_: {"all": dict.fromkeys(settings.MEASURES, next(found))})
    monkeypatch.setattr(sys, "argv", ["settings.py", "--output", str(tmp_path), "--seeds", "3", "4"])
    settings.main()
    lines = capsys.readouterr().out.split("\n")[1:-1]
    assert len(lines) == 2 + len(asked) / 2
    assert lines[2] == "| guidance from 0 to 1 | 30 | 0.500 | 0.50 | 0.50 | 0.50 | 0.50 |"
    assert lines[7].startswith("| guidance from 0.2 to 0.8 | 22 | 10.500 |")
    assert lines[8].startswith("| guidance in no step | 10 |")
    assert asked[-1] == "--num_inference_steps 10 --mask_column mask_image"
