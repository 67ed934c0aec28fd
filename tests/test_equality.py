"""Tests of the proof that training from the cache learns what encoding on the fly learns, on a tiny real model."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
SETTINGS = {
    "resolution": 16,
    "pairs": 48,
    "held_out": 48,
    "steps": 20,
    "rounds": 5,
    "learning_rate": 1e-2,
    "precisions": "no",
}
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that predicts velocity, and whose latents are scaled as much as those of Stable Diffusion."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("models") / "velocity", prediction_type="v_prediction")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with pairs to train on and others to measure with."""
    folder = tmp_path_factory.mktemp("data")
    tiny.dataset(folder, tiny.pairs(48, first=48)).joinpath("train-00000-of-00001.parquet").rename(
        folder / "test-00000-of-00001.parquet"
    )
    return tiny.dataset(folder, tiny.pairs(48))


@pytest.mark.slow  # twenty short trainings
@pytest.mark.parametrize(("scaling_factor", "same"), [(None, True), (1.0, False)])
def test_training_from_the_cache_learns_what_encoding_on_the_fly_learns(
    scaling_factor: float | None,
    same: bool,
    model: Path,
    splits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the spread of a few seeds; an online training that forgets the scaling factor is refused."""
    paths = {"model": model, "data": splits, "results": tmp_path, "scaling_factor": scaling_factor}
    monkeypatch.setattr(sys, "argv", ["equality", *tiny.arguments(SETTINGS | paths)])
    importlib.import_module("equality").main()
    rows: Rows = json.loads((tmp_path / "equality.jsonl").read_text())["rows"]
    assert rows["from the cache, mean"]["value"] < 0.9 * rows["loss on held-out pairs before training"]["value"]
    assert rows["difference of the means"]["holds"] is same
    assert 0 < rows["error of the posterior's mean"]["value"] < 0.01  # of half precision on the disk
