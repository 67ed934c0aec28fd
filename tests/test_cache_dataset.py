"""Tests of encode/dataset.py: a cache as a dataset of PyTorch holds what training reads, in whatever process."""

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tiny
from ip2p.encode import Cache, CacheDataset, Ip2pError
from ip2p.encode.cache.shapes import latents_of
from ip2p.encode.cached import Samples
from ip2p.train.data.batches import gather, null_conditioning

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, sdxl: Path, encode: Callable[..., None]) -> Path:
    """A cache of SDXL with five shapes, flips and masks, whose second instruction must not be flipped."""
    folder = tmp_path_factory.mktemp("shapes")
    columns = tiny.pairs(9, sizes=tiny.SIDES)
    columns["edit_prompt"][1] = "make it face left"
    columns["mask_image"] = [picture.convert("L") for picture in columns["edited_image"]]
    flags = {"resolution": 32, "bucket_step": 8, "random_flip": True, "mask_column": "mask_image"}
    encode(sdxl, tiny.dataset(folder / "data", columns), folder / "cache", **flags)
    return folder / "cache"


def test_a_sample_is_what_training_reads(shapes: Path) -> None:
    """All of it, in its shape and type; what zarr reads is the same, and so is the empty instruction."""
    dataset, cache = CacheDataset(shapes, view="plain"), Cache.open(shapes)
    table = cache.samples().to_pylist()
    assert len(dataset) == len(table) == 9
    samples = Samples.of_all(dataset.reader, None)
    for number, (sample, row) in enumerate(zip((dataset[n] for n in range(9)), table, strict=True)):
        h, w = row["height"] // 2, row["width"] // 2
        sizes = {name: (*value.shape, value.dtype) for name, value in sample.items() if isinstance(value, torch.Tensor)}
        half = torch.float16
        assert sizes == {
            "original": (4, h, w, half),
            "edited": (8, h, w, half),
            "mask": (1, h, w, half),
            "text": (77, 48, half),
            "pooled": (32, half),
            "time_ids": (6, torch.float32),
        }
        assert (sample["instruction"], sample["view"]) == (row["instruction"], "plain")
        for name, views in latents_of(cache, row).items():
            assert np.array_equal(sample[name], views[0])
        batch = gather(dataset.reader, samples, np.array([number]), CPU)
        assert all(torch.equal(value[0], sample[name]) for name, value in batch._asdict().items())
    null = null_conditioning(dataset.reader, CPU)
    assert all(torch.equal(getattr(null, name)[0], value) for name, value in dataset.null.items())
    assert dataset.null.keys() == {"text", "pooled"}


def test_views_are_drawn_by_pytorch_and_what_must_not_be_flipped_is_not(shapes: Path) -> None:
    """Both come; the generator's seed decides; one view alone can be had."""
    dataset, cache = CacheDataset(shapes), Cache.open(shapes)
    table = cache.samples().to_pylist()
    (fixed,) = [number for number, row in enumerate(table) if not row["flip"]]
    drawn: list[list[object]] = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append([dataset[number]["view"] for number in [0, fixed] * 20])
    assert drawn[0] == drawn[1]
    assert set(drawn[0][::2]) == {"plain", "flip"}
    assert set(drawn[0][1::2]) == {"plain"}
    sample = CacheDataset(cache, view="flip")[0]
    assert np.array_equal(sample["edited"], latents_of(cache, table[0])["edited"][1])
    assert CacheDataset(cache, view="flip")[fixed]["view"] == "plain"


def test_batches_have_one_shape_and_an_epoch_each_sample_once(shapes: Path) -> None:
    """In an order that is another in the next epoch."""
    dataset = CacheDataset(shapes)
    sampler = dataset.batches(2)
    torch.manual_seed(0)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1]
    for batches in epochs:
        assert len(batches) == len(sampler)
        assert sorted(number for batch in batches for number in batch) == list(range(9))
        assert max(map(len, batches)) == 2
        for batch in batches:
            assert len({dataset[number]["original"].shape for number in batch}) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same(cache: Path, method: str) -> None:
    """A pickled dataset maps the files anew; a worker that inherits the mapping reads them, too."""
    dataset = CacheDataset(cache, view="flip")
    again = pickle.loads(pickle.dumps(dataset))
    assert "reader" not in vars(again)
    context = multiprocessing.get_context(method)
    batches = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=context)
    found = torch.cat([batch["edited"] for batch in batches])
    assert torch.equal(found, torch.stack([again[number]["edited"] for number in range(10)]))


def test_a_condition_keeps_some(cache: Path) -> None:
    """By the columns of the table of samples; the instructions are those of the samples that are kept."""
    dataset = CacheDataset(cache, keep="position >= 6")
    table = Cache.open(cache).samples().to_pylist()
    assert [sample["instruction"] for sample in dataset.__getitems__(range(len(dataset)))] == [
        row["instruction"] for row in table if row["position"] >= 6
    ]


def test_without_cached_text_the_instruction_alone_is_there(
    sd: Path, data: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """And the empty one embedded."""
    encode(sd, data, tmp_path / "cache", no_cache_text=True)
    dataset = CacheDataset(tmp_path / "cache")
    assert dataset[0].keys() == {"original", "edited", "instruction", "view"}
    assert dataset.null["text"].shape == (77, 16)


def test_what_cannot_be_used_is_an_error(cache: Path, tmp_path: Path) -> None:
    """Of the kind that commands show in a line: a number that is none, a view, a condition, a torn cache."""
    dataset = CacheDataset(cache)
    with pytest.raises(IndexError, match="10 of 10"):
        dataset[10]
    assert dataset[-1]["instruction"] == dataset[9]["instruction"]
    with pytest.raises(Ip2pError, match="has plain, flip; did you mean flip"):
        CacheDataset(cache, view="flp")
    with pytest.raises(Ip2pError, match="true of none of the 10 samples"):
        CacheDataset(cache, keep="position > 10")
    torn = shutil.copytree(cache, tmp_path / "torn")
    (torn / "commits" / "images-v1-000000.json").unlink()
    with pytest.raises(Ip2pError, match="is missing"):
        CacheDataset(torn)


def test_torch_is_imported_when_it_is_needed() -> None:
    """Whoever makes a configuration, or looks at a cache, waits for none of it; a wrong name is told as ever."""
    code = (
        "import sys, ip2p.encode, ip2p.train, ip2p.infer\n"
        "from ip2p.encode import Cache, EncodeConfig\n"
        "from ip2p.train import TrainConfig\n"
        "print('torch' in sys.modules)\n"
        "from ip2p.encode import CacheDataset\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)\n"
        "from ip2p.train import trane"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True", "False"]
    assert "cannot import name 'trane'" in done.stderr
