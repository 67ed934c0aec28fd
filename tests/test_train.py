"""Tests of whole training runs on a tiny model: resuming, accumulation, precision, and the pipeline that comes out."""

import errno
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.train.__main__ import main
from ip2p.train.objective import Batch, Draws, Objective
from ip2p.train.save import checkpoint
from ip2p.train.save.resume import find
from ip2p.train.watch.metrics import Metrics
from ip2p.train.watch.validate import Validation

FLAGS = {
    "train_batch_size": 2,
    "max_train_steps": 20,
    "seed": 1,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "report_to": "none",
}


def flags(model: Path | str, cache: Path | str | tuple[Path, ...], output: Path, **changed: object) -> list[str]:
    """The command line of a run; `changed` flags come on top of those above."""
    paths = {"pretrained_model_name_or_path": model, "cache": cache, "output_dir": output}
    given = paths | FLAGS | changed
    if given["lr_scheduler"] == "constant":
        del given["lr_warmup_steps"]
    return tiny.arguments(given)


KILL_AT_STEP_12 = """
import os, signal, sys, time
from ip2p.train.watch.metrics import Metrics

def step(self, step, *rest, original=Metrics.step):
    original(self, step, *rest)
    if step == 12:
        while not self.file.with_name("checkpoint-9").exists():  # which a thread writes
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Metrics.step = step
from ip2p.train.save import checkpoint
from ip2p.train.__main__ import main
main(sys.argv[1:])
"""


def states(checkpoint: Path) -> dict[str, Any]:
    """UNet, EMA, optimizer and schedule of a checkpoint."""
    files = {path.name: path for path in checkpoint.iterdir() if not path.name.startswith("random_states")}
    loaded = {name: torch.load(path) for name, path in files.items() if path.suffix in (".pkl", ".bin")}
    return loaded | {"unet": load_file(files["model.safetensors"])}


def assert_same(first: object, second: object, where: str = "") -> None:
    """Equal bit for bit, tensors, numbers and containers of them."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert isinstance(second, list | tuple)
        assert len(first) == len(second), where
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert first == second, where


@pytest.fixture(scope="module")
def straight(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of 20 undisturbed steps."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    main(flags(sd, cache, output, checkpointing_steps=9))
    return output


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    sd: Path, cache: Path, straight: Path, tmp_path: Path
) -> None:
    """After 12 steps, SIGKILL and resuming from step 9, weights, EMA, Adam's moments and schedule agree bit for bit."""
    output = tmp_path / "killed"
    arguments = flags(sd, cache, output, checkpointing_steps=9)
    killed = subprocess.run([sys.executable, "-c", KILL_AT_STEP_12, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-9"]
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert_same(states(output / "checkpoint-20"), states(straight / "checkpoint-20"))
    assert_same(load_file(unet_file(output)), load_file(unet_file(straight)))


def test_the_training_changes_every_part_that_it_should(sd: Path, straight: Path) -> None:
    """The comparison above is no comparison of untouched weights: UNet and EMA have moved, and differ."""
    trained, averaged = states(straight / "checkpoint-20")["unet"], load_file(unet_file(straight))
    base = load_file(unet_file(sd))
    assert isinstance(trained, dict)
    assert trained["conv_in.weight"][:, 4:].abs().max() > 0
    moved = [
        name for name, weight in base.items() if name != "conv_in.weight" and not torch.equal(trained[name], weight)
    ]
    assert len(moved) > 0.95 * len(base)
    assert not torch.equal(averaged["conv_in.weight"], trained["conv_in.weight"])


def test_the_run_leaves_exactly_these_files(straight: Path) -> None:
    """Checkpoints, the pipeline, the resolved configuration and the metrics; nothing temporary."""
    assert {path.name for path in straight.iterdir()} == {
        *("checkpoint-9", "checkpoint-18", "checkpoint-20", "metrics.jsonl", "train.yaml", "README.md", ".lock"),
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    }


def test_accumulation_reports_the_mean_loss_and_counts_optimizer_steps(sd: Path, cache: Path, tmp_path: Path) -> None:
    """Two batches of 2 per step see four samples each step; the learning rate falls with optimizer steps."""
    main(flags(sd, cache, tmp_path / "out", gradient_accumulation_steps=2, max_train_steps=10))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [10]
    assert metrics[0]["lr"] == 0  # the cosine ends with the last optimizer step
    state = torch.load(tmp_path / "out" / "checkpoint-10" / "custom_checkpoint_0.pkl")
    assert (state["step"], state["samples"]) == (10, 40)


def test_accumulated_steps_have_the_gradient_of_one_large_batch(sd: Path, cache: Path, tmp_path: Path) -> None:
    """With equal draws, two half batches and one whole batch give the same update."""
    seen = {}
    for name, size, steps in (("halves", 5, 2), ("whole", 10, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Objective, "draw", fixed_draw)
            changed = {"train_batch_size": size, "gradient_accumulation_steps": steps, "lr_scheduler": "constant"}
            changed |= {"max_train_steps": 1, "use_ema": False, "adam_epsilon": 1.0}  # SGD-like: no division by ~0
            main(flags(sd, cache, tmp_path / name, **changed))
        seen[name] = load_file(unet_file(tmp_path / name))
    for name, weight in seen["whole"].items():
        torch.testing.assert_close(seen["halves"][name], weight, rtol=0, atol=1e-7)


def fixed_draw(_: Objective, batch: Batch, *position: int) -> Draws:
    """The same noise for every sample."""
    size = batch.original.shape[0]
    noise = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8).repeat(size, 1, 1, 1)
    return Draws(noise, noise.flip(1), torch.full((size,), 300), torch.full((size,), 0.9))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_and_precision_run(sd: Path, cache: Path, tmp_path: Path, precision: str) -> None:
    """The switches that save memory train the same model in the same files."""
    changed = {"gradient_checkpointing": True, "mixed_precision": precision, "max_train_steps": 2}
    main(flags(sd, cache, tmp_path / "out", **changed))
    assert unet_file(tmp_path / "out").is_file()


def test_old_checkpoints_are_dropped_beyond_the_limit(sd: Path, cache: Path, tmp_path: Path) -> None:
    """`--checkpoints_total_limit 2` keeps the newest two."""
    main(flags(sd, cache, tmp_path, checkpointing_steps=3, checkpoints_total_limit=2, max_train_steps=9))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_an_interrupted_checkpoint_is_never_resumed_from(sd: Path, cache: Path, straight: Path, tmp_path: Path) -> None:
    """A checkpoint that was not renamed to its name does not exist for `latest`."""
    (tmp_path / "checkpoint-30.incomplete").mkdir()
    with pytest.raises(SettingsError, match="holds no checkpoint"):
        find(tmp_path, "latest")
    assert find(tmp_path, "auto") is None
    assert find(straight, "latest") == straight / "checkpoint-20"
    assert find(straight, "checkpoint-9") == straight / "checkpoint-9"


def test_finished_work_is_not_overwritten_by_accident(straight: Path) -> None:
    """An output folder with checkpoints needs a word on what shall become of them."""
    with pytest.raises(SettingsError, match="checkpoint-20 already: continue with --resume_from_checkpoint latest"):
        find(straight, None)


def test_a_loss_that_is_not_finite_stops_the_run(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a silent NaN: training ends with advice."""
    with pytest.raises(SystemExit) as stopped:
        main(flags(sd, cache, tmp_path / "out", learning_rate=1e30, lr_scheduler="constant"))
    assert stopped.value.code == 2
    assert "no finite gradient in the last" in capsys.readouterr().err


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(sd: Path, cache: Path, tmp_path: Path) -> None:
    """One bad batch costs one step: weights stay finite, and the count of skipped steps is reported."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def poisoned(self: Objective, unet: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        seen[len(seen)] = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
        value = original(self, unet, batch, draws)
        return value * float("nan") if len(seen) == 3 else value

    original = Objective.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "loss", poisoned)
        main(flags(sd, cache, tmp_path / "out", max_train_steps=5, lr_scheduler="constant"))
    assert_same(seen[3], seen[2])  # the third step changed nothing
    assert not torch.equal(seen[2]["conv_in.weight"], seen[1]["conv_in.weight"])
    assert not torch.equal(seen[4]["conv_in.weight"], seen[3]["conv_in.weight"])
    metrics = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["skipped_steps"] == 1
    assert metrics["loss"] > 0


def test_a_full_disk_at_a_checkpoint_leaves_the_previous_one(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The torn checkpoint is removed and the answer names the last good one."""

    def full(folder: Path, state: Any, original: Callable[..., None] = checkpoint.write) -> None:
        original(folder, state)
        if "checkpoint-6" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(SystemExit):
            main(flags(sd, cache, tmp_path, checkpointing_steps=3))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "checkpoint-6 cannot be written" in (text := capsys.readouterr().err)
    assert "checkpoint-3 is the last" in text


def living_models() -> dict[int, str]:
    """Models in this process, by identity."""
    kinds = (ModelMixin, PreTrainedModel)
    return {id(item): type(item).__name__ for item in gc.get_objects() if issubclass(type(item), kinds)}


def test_no_vae_and_no_text_encoder_live_while_training(sd: Path, cache: Path, tmp_path: Path) -> None:
    """At every step the only model that the run keeps in memory is the UNet; validation brings the others and goes."""
    gc.collect()
    others = living_models()
    training: list[set[str]] = []
    validating: list[set[str]] = []

    def names() -> set[str]:
        return {name for number, name in living_models().items() if number not in others}

    def step(self: Metrics, *rest: Any, original: Callable[..., None] = Metrics.step) -> None:
        training.append(names())
        original(self, *rest)

    def look(self: Validation, *rest: Any, original: Any = Validation.decode) -> Any:
        validating.append(names())
        return original(self, *rest)

    looked_at = {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "step", step)
        patch.setattr(Validation, "decode", look)
        main(flags(sd, cache, tmp_path / "out", max_train_steps=5, **looked_at))
    unet = {"UNet2DConditionModel", "Transformer2DModel"}  # the second is a part of the first
    assert training == [unet] * 5
    assert len(validating) == 3
    assert all("AutoencoderKL" in found and "CLIPTextModel" not in found for found in validating)


ALONE = """
import sys
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.split(".")[0] == "ip2p"]
image = Image.new("RGB", (16, 16), "red")
edited = pipeline("make it blue", image, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
assert edited.size == (16, 16)
assert len(set(edited.getdata())) > 1
"""


def test_the_saved_folder_is_a_pipeline_for_a_process_that_never_imports_ip2p(straight: Path) -> None:
    """diffusers alone loads it and edits a picture."""
    done = subprocess.run([sys.executable, "-c", ALONE, str(straight)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_frozen_parts_keep_their_precision(sd: Path, cache: Path, straight: Path) -> None:
    """VAE and text encoder are saved as they were found, value by value, and the UNet knows its resolution."""
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert_same(load_file(straight / part), load_file(sd / part))
    config = json.loads((straight / "unet" / "config.json").read_text())
    assert (config["sample_size"], config["in_channels"]) == (8, 8)


def test_the_result_can_be_trained_further_on_the_same_cache(straight: Path, cache: Path, tmp_path: Path) -> None:
    """An 8-channel result fits the cache that it came from, though its files were written anew."""
    main(flags(straight, cache, tmp_path / "more", max_train_steps=1))
    assert unet_file(tmp_path / "more").is_file()


def test_the_saved_configuration_starts_the_same_run(straight: Path, tmp_path: Path) -> None:
    """`--config train.yaml` stands for all flags it holds; later flags win."""
    main(["--config", str(straight / "train.yaml"), "--output_dir", str(tmp_path / "again")])
    assert_same(load_file(unet_file(tmp_path / "again")), load_file(unet_file(straight)))


def test_a_run_without_a_seed_draws_one_that_repeats_it(sd: Path, cache: Path, tmp_path: Path) -> None:
    """It stands in the saved configuration; the next run draws another."""
    for name in ("one", "other"):
        main(flags(sd, cache, tmp_path / name, seed=None, max_train_steps=2))
    main(["--config", str(tmp_path / "one" / "train.yaml"), "--output_dir", str(tmp_path / "again")])
    seeds = [yaml.safe_load((tmp_path / name / "train.yaml").read_text())["seed"] for name in ("one", "other", "again")]
    assert seeds[0] == seeds[2] != seeds[1]
    one, other, again = (load_file(unet_file(tmp_path / name)) for name in ("one", "other", "again"))
    assert_same(one, again)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_epochs_are_counted_in_samples(sd: Path, cache: Path, tmp_path: Path) -> None:
    """Three passes over ten samples in steps of four are eight steps: the last one reaches into a fourth pass."""
    main(flags(sd, cache, tmp_path, max_train_steps=None, num_train_epochs=3, train_batch_size=4))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("kind", ["sdxl", "v_prediction"])
def test_sdxl_and_v_prediction_train_and_save(
    kind: str, sdxl: Path, data: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """The other families run through the same commands."""
    model = sdxl if kind == "sdxl" else tiny.checkpoint(tmp_path / "v", prediction_type="v_prediction")
    encode(model, data, tmp_path / "cache")
    main(flags(model, tmp_path / "cache", tmp_path / "out", max_train_steps=2))
    DiffusionPipeline.from_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index.get("force_zeros_for_empty_prompt", False) is False


def unet_file(folder: Path) -> Path:
    """Where diffusers keeps the UNet's weights."""
    return folder / "unet" / "diffusion_pytorch_model.safetensors"
