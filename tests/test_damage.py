"""A property test: a damaged model gives the numbers of the whole one, or is refused by the name of the file."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.numpy import load_file

import tiny
from damage import damages
from ip2p.encode.__main__ import main as encode
from ip2p.encode.cache.format import Cache
from ip2p.infer.__main__ import main as infer
from ip2p.train.__main__ import main as train
from test_parts import early_tokenizer, to_bin
from test_train import flags

Numbers = Mapping[str, np.ndarray]
DAMAGES = 56  # of each model folder for each command; six of them


def run_encode(model: Path, out: Path, data: Path) -> None:
    where = {"pretrained_model_name_or_path": model, "dataset_name": data, "cache": out}
    encode(tiny.arguments(where | {"resolution": 16, "dataloader_num_workers": 0}))


def cached(out: Path) -> Numbers:
    """What `ip2p-encode` made: all numbers, and all that the cache says of the model; nothing if it is unfinished."""
    if not (out / "manifest.json").is_file() or "pending" in (cache := Cache.open(out)).manifest["counts"]:
        return {}
    arrays = {name: array for kind in ("images", "text") for name, array in cache.arrays(kind).items()}
    said = [cache.manifest["identity"], cache.manifest["encoding"], cache.manifest["model"]["prediction_type"]]
    return {name: np.asarray(array[:]) for name, array in arrays.items()} | {"said": np.array(repr(said))}


def saved(out: Path) -> Numbers:
    """What `ip2p-train` made: all weights of the pipeline, and what decides how it draws; nothing without one."""
    if not (out / "model_index.json").is_file():
        return {}
    weights = {
        f"{file.parent.name}/{name}": value
        for file in out.glob("*/*.safetensors")
        for name, value in load_file(file).items()
    }
    schedule = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    return weights | {"schedule": np.array(repr(sorted(schedule.items())))}


def edited(out: Path) -> Numbers:
    """The picture that `ip2p-infer` made, if it did."""
    file = out.with_suffix(".png")
    return {"picture": np.asarray(Image.open(file))} if file.is_file() else {}


@pytest.mark.slow  # 336 runs of commands
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("command", ["ip2p-encode", "ip2p-train", "ip2p-infer"])
def test_a_damaged_model_gives_the_numbers_of_the_whole_one_or_is_refused_by_the_name_of_the_file(
    command: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deleted, cut, emptied and foreign files, lost keys and tensors: never a traceback, never a wrong result."""
    data, cache, picture = tiny.dataset(tmp_path / "data", tiny.pairs(1)), tmp_path / "cache", tmp_path / "a.png"
    if command == "ip2p-infer":
        model = tiny.pipeline(tmp_path / family)
        tiny.picture(1, (16, 16)).save(picture)
    else:
        model = tiny.checkpoint(tmp_path / family, sdxl=family == "sdxl", prediction_type="v_prediction")
    if family == "sd":  # as early releases are laid out
        to_bin(model, "text_encoder")
        to_bin(model, "vae")
        early_tokenizer(model / "tokenizer")
    if command == "ip2p-train":
        run_encode(model, cache, data)
    run: Callable[[Path], None]
    look: Callable[[Path], Numbers]
    run, look = {
        "ip2p-encode": (lambda out: run_encode(model, out, data), cached),
        "ip2p-train": (lambda out: train(flags(model, cache, out, max_train_steps=1, train_batch_size=1)), saved),
        "ip2p-infer": (
            lambda out: infer(
                tiny.arguments(
                    {
                        "model": model,
                        "image": picture,
                        "prompt": "make it Red",
                        "output": out.with_suffix(".png"),
                        "num_inference_steps": 2,
                    }
                )
            ),
            edited,
        ),
    }[command]
    outs = (tmp_path / f"out-{n}" for n in itertools.count())
    run(reference := next(outs))
    expected, same = look(reference), 0
    assert expected
    for what, file in damages(model, DAMAGES, 1, lambda path: command != "ip2p-encode" or path.parent.name != "unet"):
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        out, status = next(outs), 0
        try:
            run(out)
        except SystemExit as stopped:
            status = stopped.code
        found, said = look(out), capsys.readouterr().err
        if status:
            lines = said[said.rindex(f"{command}: ") :].splitlines()
            assert (status, found, "Traceback" in said) == (2, {}, False), f"{what}: {said}"
            assert len(lines) <= 3, f"{what}: {said}"
            assert any(name in "".join(lines) for name in (file.name, file.parent.name)), f"{what}: {said}"
        else:
            assert found.keys() == expected.keys(), what
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, f"{what}: {name}")
            same += 1
    assert 0 < same < DAMAGES / 2, "hardly anything was damaged"
