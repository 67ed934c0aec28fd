"""What earlier versions wrote stays readable: files of a run at commit 005a64b, in tests/recorded.

They were made there with the tiny model of tests/tiny.py: six pairs at 16 px with flips, then six steps of two samples
(seed 1, cosine, two steps of warm-up), a checkpoint every three, once without and once with --use_ema.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import tiny
from ip2p.encode.cache.format import Cache
from ip2p.encode.keeper.verify import repair, verify
from ip2p.train.__main__ import main

RECORDED = Path(__file__).parent / "recorded" / "005a64b"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in which paths are as they were recorded."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def readable() -> None:
    """Skips tests for which the model has to be read: its text encoder's weights are called as by transformers 5.17."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig())
    if hasattr(model, "text_model"):
        pytest.skip("this version of transformers does not know the names of weights that later ones save")


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("kind", ["plain", "average"])
def test_its_checkpoints_are_resumed_by_its_own_settings(run: Path, kind: str) -> None:
    """To where that version got with the same steps: the order in which products are rounded is all that differs."""
    expected = (run / kind / "checkpoint-6").rename(run / "expected")
    main(["--config", f"{kind}/train.yaml", "--resume_from_checkpoint", "latest"])
    reached, before = (load_file(run / kind / f"checkpoint-{step}" / "model.safetensors") for step in (6, 3))
    for name, weight in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(reached[name], weight, rtol=0, atol=2e-6)
    moved = max((reached[name] - before[name]).abs().max().item() for name in before)
    assert moved > 1e-4  # fifty times what may differ
    if kind == "average":
        old, new = (
            torch.load(folder / "custom_checkpoint_2.pkl") for folder in (expected, run / kind / "checkpoint-6")
        )
        assert new["optimization_step"] == old["optimization_step"] == 6
        torch.testing.assert_close(new["shadow_params"], old["shadow_params"], rtol=0, atol=2e-6)


@pytest.mark.usefixtures("readable")
def test_its_cache_is_sound_and_grows(run: Path, encode: Callable[..., None]) -> None:
    """Nothing of it is encoded again, what is new comes to it, and the run that knew it goes on."""
    cache = run / "cache"
    assert verify(cache) == []
    assert Cache.open(cache).manifest["format"] == 1
    before = Cache.open(cache).samples()
    records = {path.name: path.read_bytes() for path in (cache / "commits").iterdir()}
    encode(Path("model"), Path("data"), cache, random_flip=True)
    assert {path.name: path.read_bytes() for path in (cache / "commits").iterdir()} == records
    assert Cache.open(cache).samples().equals(before)
    tiny.dataset(run / "data", tiny.pairs(8))
    encode(Path("model"), Path("data"), cache, random_flip=True)
    opened = Cache.open(cache)
    assert (opened.manifest["format"], opened.manifest["counts"]) == (2, {"ok": 8})
    assert opened.samples()[:6].equals(before)
    assert {path.name: path.read_bytes() for path in (cache / "commits").iterdir()}.items() > records.items()
    assert verify(cache) == []
    (run / "plain" / "checkpoint-6").rename(run / "expected")
    main(["--config", "plain/train.yaml", "--resume_from_checkpoint", "latest"])
    assert (run / "plain" / "checkpoint-6" / "model.safetensors").is_file()


def test_verify_repair_makes_it_one_of_todays(run: Path) -> None:
    """Whatever is found: the small files are written anew, and its records stay."""
    records = {path.name: path.read_bytes() for path in (run / "cache" / "commits").iterdir()}
    stray = run / "cache" / "commits" / ".text-000000.json.77"
    stray.write_text("torn")
    assert repair(run / "cache", verify(run / "cache")) == ["commits/.text-000000.json.77"]
    assert Cache.open(run / "cache").manifest["format"] == 2
    assert {path.name: path.read_bytes() for path in (run / "cache" / "commits").iterdir()} == records
    assert verify(run / "cache") == []


@pytest.mark.usefixtures("readable")
def test_its_settings_are_those_of_today(run: Path) -> None:
    """Each flag that it recorded is still one, and a new run can start from the file."""
    main(["--config", "average/train.yaml", "--output_dir", "again", "--max_train_steps", "1"])
    assert json.loads(Path("again/metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
