"""Runs docs/python.md, and holds its training loop against `ip2p-train`."""

import itertools
import logging
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import compare
import dataset
import tiny
from ip2p.encode import EncodeConfig, encode
from ip2p.infer import Editor
from ip2p.train import TrainConfig, train

TEXT = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = {
    title: code
    for section in TEXT.split("\n## ")[1:]
    for title, code in [(section.splitlines()[0], re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))]
}
LOOP = "A loop of one's own"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
IN_THIS_PROCESS = {"num_workers=2": "num_workers=0"}
SMALLER = {
    "resolution=256": "resolution=16, dataloader_num_workers=0",
    "5000, 16, 0": "3, 4, 0",
    "max_train_steps=5000": "max_train_steps=2, train_batch_size=2, report_to='none'",
    "num_inference_steps=20": "num_inference_steps=2",
}


def run(code: str, changes: Mapping[str, str]) -> None:
    """Run code of the page; each of the `changes` is to something that it holds."""
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/python.md", "exec"), {})


@pytest.fixture
def world(tmp_path: Path, sd: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with everything that the page names, where the process is; and loggers as they were before."""
    shutil.copytree(sd, tmp_path / BASE)
    tiny.dataset(tmp_path / "fusing" / "instructpix2pix-1000-samples", tiny.pairs(6))
    tiny.picture(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    yield tmp_path
    root.handlers = handlers


def test_the_page_runs_from_top_to_bottom(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With smaller pictures and fewer steps: both pipelines edit, the error is the one that the page tells."""
    for code in itertools.chain(*BLOCKS.values()):
        run(code, {old: new for old, new in (SMALLER | IN_THIS_PROCESS).items() if old in code})
    assert (world / "snowy.png").is_file()
    assert Editor(world / "own").edit(world / "photo.jpg", "make it red", num_inference_steps=1)
    (told,) = re.findall(r"print\(error\)  # (.*)", TEXT)
    assert f"{told}\n" in capsys.readouterr().out


def test_everything_that_the_test_changes_is_on_the_page() -> None:
    """A number that the page has no more would make the run above a long one."""
    for old in SMALLER | IN_THIS_PROCESS:
        assert TEXT.count(old) == 1


def test_the_loop_has_forty_lines_at_most() -> None:
    """Those that hold something."""
    (code,) = BLOCKS[LOOP]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40


@pytest.mark.slow  # six trainings of 100 steps
@pytest.mark.timeout(3600)
def test_the_loop_trains_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The starter, 100 steps, three seeds each: held-out losses differ by less than seeds do, and have come down."""
    monkeypatch.setattr(dataset, "TRAIN", {"skin tone": 120, "hair": 80, "color": 120})
    monkeypatch.setattr(dataset, "TEST", {"skin tone": 24, "hair": 16, "color": 24})
    monkeypatch.chdir(tmp_path)
    dataset.build(tmp_path / "data")
    model = {"pretrained_model_name_or_path": compare.STARTER}
    for split, cache in (("train", "cache"), ("test", "held-out")):
        options = {"dataset_name": tmp_path / "data", "split": split, "resolution": 64, "dataloader_num_workers": 0}
        encode(EncodeConfig.of(**model, **options, cache=cache))
    rate, (code,) = "5e-4", BLOCKS[LOOP]  # at which much is learnt within so few steps
    losses: dict[str, list[float]] = {"own": [], "out": []}
    for seed in range(3):
        run(code, IN_THIS_PROCESS | {f'"{BASE}", 5000, 16, 0': f'"{compare.STARTER}", 100, 8, {seed}', "1e-4": rate})
        options = {"train_batch_size": 8, "max_train_steps": 100, "learning_rate": rate, "seed": seed}
        train(TrainConfig.of(**model, **options, cache="cache", output_dir=f"out-{seed}", report_to="none"))
        for name, folder in (("own", "own"), ("out", f"out-{seed}")):
            losses[name].append(compare.loss(tmp_path / folder, tmp_path / "held-out"))
    own, out = (statistics.fmean(some) for some in losses.values())
    assert abs(own - out) <= max(max(some) - min(some) for some in losses.values()), losses
    options |= {"max_train_steps": 1, "learning_rate": 1e-9}
    train(TrainConfig.of(**model, **options, cache="cache", output_dir="before", report_to="none"))
    assert compare.loss(tmp_path / "before", tmp_path / "held-out") - own > 4 * abs(own - out), losses
