"""Tests of train/unet/lora.py: what is trained and what stays, what comes out, and how such a run goes on."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import tiny
from configs import train_config
from hub import Hub
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import parse
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.train.__main__ import main
from ip2p.train.config import TrainConfig, refused
from ip2p.train.learning import Lora
from ip2p.train.machine import make_accelerator
from ip2p.train.run import Run
from ip2p.train.unet import norm
from ip2p.train.unet.load import widen
from ip2p.train.unet.lora import add_adapters
from ip2p.train.unet.norm import Residual, stay_in_channels_last
from ip2p.train.unet.weights import Precision
from ip2p.train.watch import metrics
from test_card import hub  # noqa: F401  a fixture
from test_train import assert_same, states, unet_file

FLAGS = {
    "train_batch_size": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "seed": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
    "lora_rank": 2,
}
ADAPTERS, CONV_IN = "pytorch_lora_weights.safetensors", "conv_in.safetensors"


def command(base: Path, cache: Path, output: Path, **changed: object) -> list[str]:
    """The command line of a run in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    paths = {"pretrained_model_name_or_path": base, "cache": cache, "output_dir": output}
    return tiny.arguments(paths | FLAGS | changed)


class Trained(NamedTuple):
    """A run, beside the base that it started from."""

    base: Path
    output: Path
    targets: str


CASES = {"sd, 4 channels": ("sd", 4, "attn"), "sd, 8": ("sd", 8, "all"), "sdxl, 4": ("sdxl", 4, "all")}
CASES["sdxl, 8"] = ("sdxl", 8, "attn")


@pytest.fixture(scope="module", params=CASES)
def trained(
    request: pytest.FixtureRequest, data: Path, encode: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Six steps on each kind of base, with an alpha that is not the rank."""
    family, channels, targets = CASES[request.param]
    folder = tmp_path_factory.mktemp("runs")
    base = tiny.checkpoint(folder / "base", in_channels=channels, sdxl=family == "sdxl")
    encode(base, data, folder / "cache")
    main(command(base, folder / "cache", folder / "out", lora_targets=targets, lora_alpha=5, use_ema=True))
    return Trained(base, folder / "out", targets)


@pytest.fixture(scope="module")
def straight(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of six undisturbed steps with an average and validation."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    main(command(sd, cache, output, use_ema=True))
    return output


# The lines of the model card, run by a process that never imports ip2p.
ALONE = """
import re, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image

image = Image.open("picture.png")
of_fused, of_adapters = re.findall(r"```python\\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)
pictures = []
for code in (of_fused, of_adapters):
    exec(code)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
    pictures.append(pipeline("make it snowy", image=image, **options).images)
assert not [name for name in sys.modules if name.split(".")[0] == "ip2p"]
np.savez("pictures.npz", *pictures)
"""


@pytest.mark.slow
def test_fused_weights_and_adapters_on_the_base_give_the_same_pictures_by_diffusers_alone(trained: Trained) -> None:
    """By the lines of the model card; and the pictures are not those of the base."""
    folder = trained.output.parent
    tiny.picture(0, (16, 16)).save(folder / "picture.png")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    fused, added = np.load(folder / "pictures.npz").values()
    assert np.abs(fused - added).max() < 1e-5
    assert fused.std() > 0.01
    before, after = load_file(unet_file(trained.base)), load_file(unet_file(trained.output))
    names = {
        name for name, weight in before.items() if name != "conv_in.weight" and not torch.equal(weight, after[name])
    }
    assert {"to_q", "to_k", "to_v"} <= {name.split(".")[-2] for name in names}
    assert any("conv1" in name for name in names) == (trained.targets == "all")


def test_the_fused_unet_has_the_names_of_any_other(trained: Trained) -> None:
    """Nothing of peft is left in its weights or its configuration."""
    fused, base = (load_file(unet_file(folder)) for folder in (trained.output, trained.base))
    assert {name: weight.shape for name, weight in fused.items() if name != "conv_in.weight"} == {
        name: weight.shape for name, weight in base.items() if name != "conv_in.weight"
    }
    fused, base = (
        json.loads((folder / "unet" / "config.json").read_text()) for folder in (trained.output, trained.base)
    )
    changed = {name for name, value in fused.items() if name not in base or base[name] != value}
    assert changed <= {"in_channels", "sample_size", "_name_or_path"}


def test_every_adapter_is_loaded_at_its_strength(trained: Trained) -> None:
    """In silence, diffusers drops attention under other names, and takes alpha for the rank without metadata."""
    saved = load_file(trained.output / ADAPTERS)
    unet = UNet2DConditionModel.from_pretrained(trained.output / "unet")
    unet.load_lora_adapter(trained.output, prefix="unet", weight_name=ADAPTERS)  # type: ignore[attr-defined]
    assert_same(
        {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet, adapter_name="default_0").items()},
        saved,
    )
    attention = {name for name in saved if ".to_" in name}
    assert len(attention) == 2 * 2 * 4 * sum(1 for name, _ in unet.named_modules() if name.endswith("attn1"))
    scaling = {name: module.scaling["default_0"] for name, module in unet.named_modules() if hasattr(module, "scaling")}
    assert scaling.pop("conv_in") == 1
    assert set(scaling.values()) == {5 / 2}
    assert saved["unet.conv_in.lora_A.weight"].shape == (72, 8, 3, 3)


def test_the_untrained_conv_in_lies_beside_the_adapters(trained: Trained) -> None:
    """Bit for bit that of the base, widened with zeros where it was narrow."""
    weights, found = load_file(unet_file(trained.base)), load_file(trained.output / CONV_IN)
    narrow = weights["conv_in.weight"]
    assert torch.equal(found["weight"][:, : narrow.shape[1]], narrow)
    assert found["weight"].shape[1] == 8
    assert not found["weight"][:, narrow.shape[1] :].any()
    assert torch.equal(found["bias"], weights["conv_in.bias"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_leaves_the_base_as_it_is(sd: Path, cache: Path, tmp_path: Path, precision: str) -> None:
    """Bit for bit, in 16 bits under mixed precision but for norms; adapters are float32 and all of them move."""
    config = train_config(sd, cache, tmp_path, **FLAGS | {"mixed_precision": precision, "lora_targets": "all"})
    run = Run(config, *make_accelerator(config))
    before = {name: weight.detach().clone() for name, weight in run.unet.named_parameters()}
    run.fit()
    half, kinds = {"no": torch.float32, "bf16": torch.bfloat16}[precision], dict[str, set[torch.dtype]]()
    for name, weight in run.unet.named_parameters():
        adapts = "lora_" in name
        assert weight.requires_grad == adapts
        assert torch.equal(weight, before[name]) != adapts, name
        kinds.setdefault("adapter" if adapts else "norm" if "norm" in name else "layer", set()).add(weight.dtype)
    assert kinds == {"adapter": {torch.float32}, "norm": {torch.float32}, "layer": {half}}
    for name, weight in load_file(unet_file(sd)).items():
        if name != "conv_in.weight":
            layer, _, kind = name.rpartition(".")
            held = before.get(name, before.get(f"{layer}.base_layer.{kind}"))
            assert held is not None, name
            assert torch.equal(held, weight.to(held.dtype)), name


def test_fusing_takes_the_base_in_full_precision(sd: Path, cache: Path, tmp_path: Path) -> None:
    """What no adapter changes is the base's bit for bit, though it was trained in 16 bits."""
    main(command(sd, cache, tmp_path / "out", mixed_precision="bf16"))
    fused, base = load_file(unet_file(tmp_path / "out")), load_file(unet_file(sd))
    same = {name for name, weight in base.items() if torch.equal(fused[name], weight)}
    assert {name for name in base.keys() - same if name != "conv_in.weight"} <= {
        name for name in base if ".to_" in name and name.endswith("weight")
    }
    assert "conv_out.weight" in same
    adapters = load_file(tmp_path / "out" / ADAPTERS)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = (adapters[f"unet.{name}.lora_{end}.weight"] for end in "BA")
    torch.testing.assert_close(fused[f"{name}.weight"], base[f"{name}.weight"] + up @ down, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("ema", "precision"), [(False, "no"), (True, "bf16")])
def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(
    sd: Path, cache: Path, tmp_path: Path, ema: bool, precision: str
) -> None:
    """Adapters, average and moments, and all that comes out, bit for bit."""
    flags = {"use_ema": ema, "mixed_precision": precision, "lora_targets": "all"}
    main(command(sd, cache, tmp_path / "straight", **flags))
    main(command(sd, cache, tmp_path / "stopped", **flags, max_train_steps=3))
    main(command(sd, cache, tmp_path / "stopped", **flags, resume_from_checkpoint="latest", seed=None))
    first, second = (states(tmp_path / name / "checkpoint-6") for name in ("stopped", "straight"))
    assert ("custom_checkpoint_2.pkl" in second) == ema
    assert_same(first, second)
    for file in ("unet/diffusion_pytorch_model.safetensors", ADAPTERS, CONV_IN):
        assert_same(load_file(tmp_path / "stopped" / file), load_file(tmp_path / "straight" / file))
    earlier, later = (states(tmp_path / "stopped" / f"checkpoint-{step}")["unet"] for step in (3, 6))
    assert not any(torch.equal(earlier[name], later[name]) for name in later)


def test_a_checkpoint_holds_adapters_their_moments_and_their_average_alone(straight: Path) -> None:
    """Each is as large as the adapters, and nothing of the base is in it; the average is what comes out."""
    found = states(straight / "checkpoint-6")
    adapters = found["unet"]
    assert {name.split(".")[-3] for name in adapters} == {"lora_A", "lora_B"}
    numbers = sum(weight.numel() for weight in adapters.values())
    assert numbers == sum(weight.numel() for weight in load_file(straight / ADAPTERS).values())
    held = {
        name: sum(leaf.numel() for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor) and leaf.ndim)
        for name, part in found.items()
    }
    assert (held["optimizer.bin"], held["custom_checkpoint_2.pkl"]) == (2 * numbers, numbers)
    size = sum(path.stat().st_size for path in (straight / "checkpoint-6").iterdir())
    assert size < 4 * 4 * numbers + 2000 * len(adapters)  # what the formats say of each tensor
    saved = load_file(straight / ADAPTERS)
    add_adapters(unet := tiny.unet(8), Lora(2))
    names = [name.replace(".default", "") for name, weight in unet.named_parameters() if weight.requires_grad]
    mean = zip(names, found["custom_checkpoint_2.pkl"]["shadow_params"], strict=True)
    assert_same({f"unet.{name}": weight for name, weight in mean}, saved)
    assert not torch.equal(adapters["conv_in.lora_B.default.weight"], saved["unet.conv_in.lora_B.weight"])


def test_validation_looks_at_adapters_and_their_average_and_changes_nothing(
    sd: Path, cache: Path, straight: Path, tmp_path: Path
) -> None:
    """Losses of both, pictures, and the weights of a run that is not looked at."""
    looked_at = {"val_image_url_or_path": tmp_path / "x.png", "validation_prompt": "make it red"}
    looked_at |= {"validation_steps": 3, "num_validation_images": 1}
    tiny.picture(0).save(tmp_path / "x.png")
    main(command(sd, cache, tmp_path / "a", use_ema=True, **looked_at))
    assert_same(states(tmp_path / "a" / "checkpoint-6"), states(straight / "checkpoint-6"))
    main(
        command(sd, cache, tmp_path / "b", use_ema=True, mixed_precision="bf16", num_validation_samples=2, **looked_at)
    )
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["validation_loss"], line["ema_validation_loss"]) for line in lines if "validation_loss" in line]
    assert len(losses) == 2
    assert all(raw != averaged for raw, averaged in losses)
    assert {path.name for path in (tmp_path / "b" / "validation").iterdir()} == {"step-000003.png", "step-000006.png"}


@pytest.mark.slow
def test_a_compiled_run_trains_the_same(sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are checked first, of which half are zero then."""
    losses = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        output = tmp_path / str(backend)
        main(command(sd, cache, output, compile=bool(backend), logging_steps=1, max_train_steps=3))
        losses.append([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_switches_that_save_memory_train_adapters(sd: Path, cache: Path, straight: Path, tmp_path: Path) -> None:
    """Checkpointed activations and summed gradients give the same adapters but for rounding."""
    options = {"gradient_checkpointing": True, "use_ema": True}
    main(command(sd, cache, tmp_path / "out", **options))
    for name, weight in load_file(straight / ADAPTERS).items():
        torch.testing.assert_close(load_file(tmp_path / "out" / ADAPTERS)[name], weight, rtol=0, atol=1e-5)
    main(command(sd, cache, tmp_path / "summed", **options, gradient_accumulation_steps=2, mixed_precision="bf16"))


def test_adapters_begin_as_a_function_of_the_seed(sd: Path, cache: Path) -> None:
    """And change nothing; no other random state is touched."""
    unets = [tiny.unet(8) for _ in range(3)]
    for unet in unets[1:]:
        unet.load_state_dict(unets[0].state_dict())
    sample, text = torch.randn(1, 8, 8, 8), torch.randn(1, 77, 16)
    expected, state = unets[0](sample, 1, text).sample, torch.get_rng_state()
    for unet, seed in zip(unets, (1, 1, 2), strict=True):
        add_adapters(unet, Lora(2), seed)
        torch.testing.assert_close(unet(sample, 1, text).sample, expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (dict(unet.named_parameters())["conv_in.lora_A.default.weight"] for unet in unets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adapters_stay_in_the_blocks_that_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms for channels_last and the blocks around them call the layers that peft wraps."""
    monkeypatch.setattr(norm, "group_norm", norm._by_torch)
    unet = tiny.unet(4)
    widen(unet)
    add_adapters(unet, Lora(2, "all"))
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    sample, text = torch.randn(1, 8, 8, 8), torch.randn(1, 77, 16)
    expected = unet(sample, 1, text).sample
    stay_in_channels_last(unet)
    assert any(isinstance(module, Residual) for module in unet.modules())
    torch.testing.assert_close(unet(sample, 1, text).sample, expected, rtol=1e-4, atol=1e-4)
    unet.disable_adapters()
    assert (unet(sample, 1, text).sample - expected).abs().max() > 0.1


def test_frozen_weights_are_two_thirds_of_the_arithmetic(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a share of the GPU's peak counts; all weights are three."""
    monkeypatch.setattr(metrics, "peak", lambda _: 1.0)
    options = Reader(Cache.open(cache)), Precision("bf16", copies=False), torch.device("cpu")
    whole = metrics.share_of_peak(unet := tiny.unet(8), *options)
    add_adapters(unet, Lora(2))
    assert whole
    assert metrics.share_of_peak(unet, *options) == pytest.approx(2 / 3 * whole)


def test_the_card_and_the_upload_tell_of_lora(sd: Path, cache: Path, tmp_path: Path, hub: Hub) -> None:  # noqa: F811
    """Rank, targets and alpha; and the adapters are uploaded beside the pipeline, without checkpoints."""
    upload = {"push_to_hub": True, "hub_model_id": "someone/editor", "hub_token": "hf_x", "max_train_steps": 1}
    main(command(sd, cache, tmp_path / "out", lora_alpha=7, **upload))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lora" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "LoRA of rank 2 and alpha 7 on all attention, and of full rank on `conv_in`" in card
    assert 'load_lora_weights("someone/editor", weight_name="pytorch_lora_weights.safetensors")' in card
    assert {ADAPTERS, CONV_IN, "unet/diffusion_pytorch_model.safetensors"} <= hub.uploaded.keys()
    assert 'load_file(hf_hub_download("someone/editor", "conv_in.safetensors"))' in card
    assert not [name for name in hub.uploaded if "checkpoint" in name]
    assert hub.with_places() == []


@pytest.mark.parametrize(
    ("changed", "now"),
    [
        ({"lora_rank": None}, "all weights (no --lora_rank)"),
        ({"lora_rank": 3}, "--lora_rank 3 --lora_targets attn --lora_alpha 3"),
        ({"lora_targets": "all"}, "--lora_rank 2 --lora_targets all --lora_alpha 2"),
        ({"lora_alpha": 4}, "--lora_rank 2 --lora_targets attn --lora_alpha 4"),
    ],
)
def test_a_checkpoint_goes_on_with_its_own_adapters_alone(
    sd: Path,
    cache: Path,
    straight: Path,
    tmp_path: Path,
    changed: dict[str, object],
    now: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line says what it has trained, what this run would train, and by which flags; nothing is renamed."""
    shutil.copytree(straight, tmp_path / "run")
    flags = {"use_ema": True, "resume_from_checkpoint": "latest", "max_train_steps": 9} | changed
    with pytest.raises(SystemExit, match=r"^2$"):
        main(command(sd, cache, tmp_path / "run", **flags))
    line = capsys.readouterr().err.splitlines()[-1]
    found = "--lora_rank 2 --lora_targets attn --lora_alpha 2"
    assert "checkpoint-6" in line
    assert line.endswith(f"the checkpoint has trained {found}, and this run {now}: go on with its flags")
    assert {path.name for path in (tmp_path / "run").glob("*checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_a_checkpoint_of_all_weights_is_no_beginning_of_adapters(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one of an earlier version, which did not say what it trained."""
    main(command(sd, cache, tmp_path / "full", lora_rank=None, max_train_steps=1))
    progress = tmp_path / "full" / "checkpoint-1" / "custom_checkpoint_0.pkl"
    earlier = torch.load(progress)
    del earlier["trains"]
    torch.save(earlier, progress)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(command(sd, cache, tmp_path / "new", resume_from_checkpoint=tmp_path / "full" / "checkpoint-1"))
    assert "has trained all weights (no --lora_rank), and this run --lora_rank 2" in capsys.readouterr().err
    main(command(sd, cache, tmp_path / "full", lora_rank=None, max_train_steps=2, resume_from_checkpoint="latest"))
    assert (tmp_path / "full" / "checkpoint-2").is_dir()


def test_a_checkpoint_becomes_a_pipeline_without_training(
    sd: Path, cache: Path, straight: Path, tmp_path: Path
) -> None:
    """Fused, and with its adapters, as at the end of a run of so many steps."""
    flags = {"use_ema": True, "max_train_steps": 3}
    main(command(sd, cache, tmp_path / "made", **flags, resume_from_checkpoint=straight / "checkpoint-3"))
    main(command(sd, cache, tmp_path / "short", **flags))
    for file in ("unet/diffusion_pytorch_model.safetensors", ADAPTERS, CONV_IN):
        assert_same(load_file(tmp_path / "made" / file), load_file(tmp_path / "short" / file))


def test_half_a_base_is_adapted_in_its_own_precision_and_given_away_in_float32(
    sd: Path, data: Path, encode: Callable[..., None], tmp_path: Path
) -> None:
    """The card's pipeline loads what a base in float16 becomes."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(sd)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "base")
    encode(tmp_path / "base", data, tmp_path / "cache")
    main(command(tmp_path / "base", tmp_path / "cache", tmp_path / "out"))
    assert {weight.dtype for weight in load_file(unet_file(tmp_path / "out")).values()} == {torch.float32}
    with safe_open(tmp_path / "out" / CONV_IN, framework="pt") as file:
        assert json.loads(file.metadata()["unet"]) == {"sample_size": 8}


REQUIRED = {"pretrained_model_name_or_path": "someone/model", "cache": "c", "output_dir": "o"}


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"lora_targets": "all"}, "--lora_targets all does nothing without --lora_rank: add that, or leave it out"),
        ({"lora_alpha": 4}, "--lora_alpha 4 does nothing without --lora_rank: add that, or leave it out"),
        ({"lora_rank": 0}, "--lora_rank 0: expected 1 or more"),
        ({"lora_rank": -4}, "--lora_rank -4: expected 1 or more"),
        ({"lora_rank": "auto"}, "--lora_rank auto: expected a whole number"),
        ({"lora_rank": 4, "lora_alpha": 0}, "--lora_alpha 0: expected 1 or more"),
        ({"lora_rank": 4, "lora_targets": "ff"}, "--lora_targets ff: expected one of attn, all"),
        ({"rank": 4}, "--rank is called --lora_rank here"),
        ({"lora_rnk": 4}, "unknown flag --lora_rnk; did you mean --lora_rank?"),
    ],
)
def test_flags_that_make_no_adapters_are_refused_in_a_line(flags: dict[str, object], answer: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(SettingsError) as refusal:
        parse(TrainConfig, tiny.arguments(REQUIRED | flags), "ip2p-train", refused())
    assert str(refusal.value) == answer


def test_without_peft_a_line_says_how_to_get_it(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only adapters need it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit, match=r"^2$"):
        main(command(sd, cache, tmp_path / "out"))
    assert capsys.readouterr().err.splitlines()[-1] == "ip2p-train: --lora_rank needs peft: pip install peft"
