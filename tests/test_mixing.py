"""Tests of training on several caches at once, through the command."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

import tiny
from ip2p.train.__main__ import main
from ip2p.train.objective import Batch, Draws, Objective
from test_train import assert_same, flags, states

Encode = Callable[..., None]


@pytest.fixture(scope="module")
def other(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """A cache of six other pairs in one view."""
    folder = tmp_path_factory.mktemp("other")
    encode(sd, tiny.dataset(folder / "data", tiny.pairs(6, first=20)), folder / "cache")
    return folder / "cache"


def seen(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The originals that a run trains on, in order."""
    AcceleratorState._reset_state(reset_partial_state=True)
    batches: list[torch.Tensor] = []

    def spy(self: Objective, batch: Batch, *position: int, draw: Callable[..., Draws] = Objective.draw) -> Draws:
        if position[0] == 1:  # the seed of training, not that of validation
            batches.append(batch.original.clone())
        return draw(self, batch, *position)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "draw", spy)
        main(arguments)
    return torch.cat(batches)


def originals(cache: Path) -> np.ndarray:
    """All original latents of a cache in all views, (N, 256)."""
    import zarr

    array = np.asarray(zarr.open_group(cache / "data.zarr", mode="r")["original"][:])  # type: ignore[index]
    return array[np.isfinite(array).all(axis=(1, 2, 3, 4))].reshape(-1, 4 * 8 * 8)


def come_from(batches: torch.Tensor, cache: Path) -> np.ndarray:
    """Which of the samples of a run are those of a cache, (N,)."""
    known = {row.tobytes() for row in originals(cache)}
    return np.array([row.tobytes() in known for row in batches.numpy()])


def test_an_epoch_of_two_caches_is_every_sample_of_both_once(
    sd: Path, cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights two caches are one larger dataset; card and settings name both."""
    batches = seen(flags(sd, (cache, other), tmp_path, max_train_steps=8), monkeypatch)
    assert len(batches) == 16
    assert come_from(batches, cache).sum() == 10
    assert come_from(batches, other).sum() == 6
    assert len(np.unique(batches[come_from(batches, other)].flatten(1).numpy(), axis=0)) == 6
    assert yaml.safe_load((tmp_path / "train.yaml").read_text())["cache"] == [str(cache), str(other)]
    places = [json.loads((folder / "manifest.json").read_text())["dataset"]["name"] for folder in (cache, other)]
    names = [Path(place).name for place in places]
    card = (tmp_path / "README.md").read_text()
    assert f"| {names[0]} (a local dataset) | 10 | 0 |" in card
    assert f"| {names[1]} (a local dataset) | 6 | 0 |" in card


def test_a_run_by_weights_goes_on_exactly(
    sd: Path, cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters of the samples come from the lighter dataset; resumed with the saved settings, bit for bit."""
    mixed = {"checkpoints_total_limit": 0, "cache_weights": (1, 3), "max_train_steps": 16, "checkpointing_steps": 5}
    arguments = flags(sd, (cache, other), tmp_path / "straight", **mixed)
    batches = seen(arguments, monkeypatch)
    assert come_from(batches[:16], other).sum() == come_from(batches[16:], other).sum() == 12
    shutil.copytree(tmp_path / "straight" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    resumed = ["--config", str(tmp_path / "straight" / "train.yaml"), "--resume_from_checkpoint", "latest"]
    assert torch.equal(seen([*resumed, "--output_dir", str(tmp_path / "again")], monkeypatch), batches[10:])
    assert_same(states(tmp_path / "again" / "checkpoint-16"), states(tmp_path / "straight" / "checkpoint-16"))


def test_a_single_cache_is_written_as_one_value_and_a_checkpoint_goes_on_with_more(
    sd: Path, cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint records is how its caches were encoded, in which they all agree."""
    seen(flags(sd, cache, tmp_path, max_train_steps=2), monkeypatch)
    assert yaml.safe_load((tmp_path / "train.yaml").read_text())["cache"] == str(cache)
    more = {"max_train_steps": 8, "resume_from_checkpoint": "latest"}
    assert come_from(seen(flags(sd, (cache, other), tmp_path, **more), monkeypatch), other).any()


def test_pairs_are_held_out_of_every_cache_that_has_them(
    sd: Path, cache: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair that is validated on in one cache is not trained on from another; its picture comes with its words."""
    encode(sd, tiny.dataset(tmp_path / "data", tiny.pairs(12)), tmp_path / "larger")
    changed = {"num_validation_samples": 6, "num_validation_images": 6}
    words: list[str] = []

    def editor(_: object, picture: object, prompt: str, **__: object) -> list[object]:
        words.append(prompt)
        return [picture] * 6

    monkeypatch.setattr("ip2p.train.watch.validate.Editor.edit", editor)
    batches = seen(
        flags(sd, (cache, tmp_path / "larger"), tmp_path / "out", **changed, max_train_steps=16), monkeypatch
    )
    apart = {row.tobytes() for row in originals(tmp_path / "larger")} - {row.numpy().tobytes() for row in batches}
    assert 3 <= len(apart) <= 6
    assert len(words) == 6
    assert set(words) <= {f"make it {word}" for word in tiny.WORDS}


def test_caches_of_different_models_are_refused_field_by_field(
    sd: Path, cache: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both caches are named with what each holds, before any step."""
    encode(tiny.checkpoint(tmp_path / "model", seed=1), data, tmp_path / "cache", resolution=32)
    with pytest.raises(SystemExit) as stopped:
        main(flags(sd, (cache, tmp_path / "cache"), tmp_path / "out"))
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert f"{tmp_path / 'cache'} was encoded otherwise than {cache}" in text
    assert f"  resolution: 16 in {cache}, 32 in {tmp_path / 'cache'}" in text
    assert re.findall(r"^  (\w+):", text, re.MULTILINE) == ["vae", "text_encoder", "resolution"]
