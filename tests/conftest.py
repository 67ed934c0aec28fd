"""Fixtures that many tests share: tiny checkpoints, a tiny dataset, a finished cache."""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with more, and some tests start processes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # readline sets it where there is no terminal, and bars would be cut

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # libraries that diffusers imports where they are installed, in whatever version
    import tiny

if TYPE_CHECKING:
    from ip2p.infer import Editor

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the datasets library's cache out of the user's home."""
    import datasets
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """accelerate keeps its settings for a whole process; each test stands for a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _messages() -> None:
    """Print what is said, as commands do, also where a test calls a part of them."""
    from ip2p.encode.base.console import show_messages

    show_messages()


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x checkpoint."""
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 2.x checkpoint."""
    return tiny.checkpoint_2(tmp_path_factory.mktemp("models") / "sd2")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL checkpoint."""
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "sdxl", sdxl=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of ten pairs with seven different instructions."""
    return tiny.dataset(tmp_path_factory.mktemp("data") / "pairs", tiny.pairs(10))


@pytest.fixture(scope="session")
def encode() -> Callable[..., None]:
    """Run `ip2p-encode` in this process; flags are keyword arguments."""
    from ip2p.encode.__main__ import main

    def run(model: Path, dataset: Path, cache: Path, **flags: object) -> None:
        options = {
            "pretrained_model_name_or_path": model,
            "dataset_name": dataset,
            "cache": cache,
            "resolution": 16,
            "dataloader_num_workers": 0,
        }
        main(tiny.arguments(options | flags))

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, sd: Path, data: Path, encode: Callable[..., None]) -> Path:
    """A finished cache of the ten pairs with both views; copy it before changing it."""
    folder = tmp_path_factory.mktemp("caches") / "sd"
    encode(sd, data, folder, random_flip=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny InstructPix2Pix pipeline, as `ip2p-infer --model` takes it."""
    return str(tiny.pipeline(tmp_path_factory.mktemp("models") / "sd"))


@pytest.fixture(scope="module")
def editor(model: str) -> "Editor":
    """An `Editor` of `model` that shows no progress."""
    from ip2p.infer import Editor

    editor = Editor(model)
    editor.pipeline.set_progress_bar_config(disable=True)
    return editor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures of two sizes, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(["a.png", "b.png", "b.bmp"]):
        tiny.picture(number, (16, 8 + 4 * (number % 2))).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder
