"""Tests of SD 2.x and SDXL from the dataset to the edited picture, on tiny real models."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image
from safetensors.torch import load_file

import dataset as emoji
import tiny
from configs import train_config
from ip2p.encode.base.errors import CacheMismatch, ModelError
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.models.weights import hash_weights, weight_files
from ip2p.infer.__main__ import main as infer
from ip2p.train.__main__ import main as train
from ip2p.train.data.batches import Batches, null_conditioning
from ip2p.train.data.order import Order, Turns
from test_train import assert_same, flags, unet_file

CPU = torch.device("cpu")
HALF: dict[str, Any] = {"rtol": 2**-10, "atol": 1e-6}  # rounding to float16
ARRAYS = [("images", "original"), ("images", "edited"), ("text", "text"), ("text", "pooled")]
Encode = Callable[..., None]


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with other weights and another scale than those of the tiny checkpoints, in a folder of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae: Any = AutoencoderKL.from_config(tiny.vae().config, scaling_factor=0.25, force_upcast=False)
    vae.save_pretrained(folder := tmp_path_factory.mktemp("models") / "vae")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of wide and tall pairs, one instruction longer than the text encoder can see."""
    columns = tiny.pairs(6)
    for n, size in enumerate([(40, 20), (16, 28), (24, 24)] * 2):
        columns["input_image"][n] = tiny.picture(2 * n, size)
        columns["edited_image"][n] = tiny.picture(2 * n + 1, size)
    columns["edit_prompt"][5] = "make the cat snowy and " * 30
    return tiny.dataset(tmp_path_factory.mktemp("data") / "wide", columns)


@pytest.fixture(scope="module")
def sdxl_cache(sdxl: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Cache:
    """A cache with two random crops and their flips."""
    folder = tmp_path_factory.mktemp("caches") / "sdxl"
    encode(sdxl, wide, folder, resize_mode="random_crop", crops=2, random_flip=True)
    return Cache.open(folder)


@pytest.fixture(scope="module")
def pipeline(sdxl: Path) -> Any:
    """The pipeline that would edit with the tiny SDXL, told to encode the empty prompt."""
    return StableDiffusionXLInstructPix2PixPipeline.from_pretrained(sdxl, force_zeros_for_empty_prompt=False)


def test_sdxl_training_sees_the_pipelines_own_conditioning(sdxl_cache: Cache, pipeline: Any) -> None:
    """Text, pooled text and time ids of each sample and view are those that the pipeline computes for it."""
    samples, table = Samples.of(sdxl_cache, None), sdxl_cache.samples().to_pylist()
    order = Order(len(table), 4, seed=3)
    drawn = Turns([order], [np.arange(order.samples)], [1]).batches([0], 8)
    batches = Batches(Reader(sdxl_cache), samples, drawn, CPU, batch_size=8)
    seen = set()
    for step in range(6):
        batch = next(batches)
        assert batch.pooled is not None
        assert batch.time_ids is not None
        numbers, views = order(8 * step, 8)
        for n, (sample, view) in enumerate(zip((table[number] for number in numbers), views, strict=True)):
            text, _, pooled, _ = pipeline.encode_prompt(sample["instruction"], do_classifier_free_guidance=False)
            torch.testing.assert_close(batch.text[n].float(), text[0], **HALF)
            torch.testing.assert_close(batch.pooled[n].float(), pooled[0], **HALF)
            original = sample["original_height"], sample["original_width"]
            crop = sample["crop_top"][view], sample["crop_left"][view]
            ids = pipeline._get_add_time_ids(original, crop, (16, 16), torch.float32, pooled.shape[-1])
            assert torch.equal(batch.time_ids[n], ids[0])
            seen.add((*original, *crop))
    batches.close()
    assert len(seen) > 8  # sizes and crops do differ


def test_sdxl_null_conditioning_is_what_guidance_will_use(sdxl_cache: Cache, pipeline: Any) -> None:
    """What training drops to equals the pipeline's negative prompt, text and pooled."""
    null = null_conditioning(Reader(sdxl_cache), CPU)
    _, text, _, pooled = pipeline.encode_prompt("make it red", do_classifier_free_guidance=True)
    assert null.pooled is not None
    torch.testing.assert_close(null.text.float(), text, **HALF)
    torch.testing.assert_close(null.pooled.float(), pooled, **HALF)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_family_encodes_trains_resumes_and_edits(
    family: str,
    request: pytest.FixtureRequest,
    other_vae: Path,
    wide: Path,
    tmp_path: Path,
    encode: Encode,
) -> None:
    """With another VAE than its own, resumed bit for bit, and the saved pipeline edits with all that was trained."""
    model, cache, out = request.getfixturevalue(family), tmp_path / "cache", tmp_path / "out"
    encode(model, wide, cache, pretrained_vae_model_name_or_path=other_vae, center_crop=True, random_flip=True)
    shape = {"max_train_steps": 4, "checkpointing_steps": 2}
    train(flags(model, cache, out, **shape))
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    train(flags(model, cache, again, **shape, resume_from_checkpoint="latest"))
    assert_same(load_file(unet_file(again)), load_file(unet_file(out)))

    vaes = [hash_weights(weight_files(folder)) for folder in (out / "vae", other_vae, model / "vae")]
    assert vaes[0] == vaes[1] != vaes[2]
    assert json.loads((out / "vae" / "config.json").read_text())["scaling_factor"] == 0.25
    kind = "v_prediction" if family == "sd2" else "epsilon"
    assert Checkpoint(out).prediction_type() == kind
    assert Checkpoint(out).identity() == Cache.open(cache).manifest["identity"]
    if family == "sdxl":
        assert json.loads((out / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False

    tiny.picture(9, (32, 16)).save(tmp_path / "in.png")
    files = {"image": tmp_path / "in.png", "output": tmp_path / "edited.png"}
    assert infer(tiny.arguments({"model": out, "prompt": "make it red", "num_inference_steps": 2, **files})) == 0
    with Image.open(tmp_path / "edited.png") as edited:
        assert edited.size == (32, 16)
        assert np.asarray(edited).std() > 1


def test_training_finds_another_vae_that_has_moved(
    sd: Path, other_vae: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """The cache knows where its VAE was and what it was: a flag says where it is now, and a wrong one is refused."""
    moved, cache = tmp_path / "moved", tmp_path / "cache"
    shutil.copytree(other_vae, moved)
    encode(sd, data, cache, pretrained_vae_model_name_or_path=moved)
    moved.rename(tmp_path / "here")
    with pytest.raises(ModelError, match=r"the VAE .*moved is neither .*--pretrained_vae_model_name_or_path"):
        base(sd, cache)
    assert base(sd, cache, pretrained_vae_model_name_or_path=str(tmp_path / "here")).vae_folder == tmp_path / "here"
    with pytest.raises(CacheMismatch, match="vae: "):
        base(sd, cache, pretrained_vae_model_name_or_path=str(sd))


def base(model: Path, cache: Path, **changed: Any) -> Checkpoint:
    """The checkpoint that a training would start from."""
    from accelerate import Accelerator

    from ip2p.train.setup import base_checkpoint

    return base_checkpoint(
        train_config(model, cache, cache, **changed),
        Cache.open(cache),
        Accelerator(cpu=True),
    )


def test_sdxls_vae_stays_in_float32_unless_it_is_known_to_be_safe(
    sd: Path, sdxl: Path, other_vae: Path, tmp_path: Path
) -> None:
    """Its own overflows in half precision; one that declares `force_upcast: false`, and SD's, do not."""
    silent = Path(shutil.copytree(other_vae, tmp_path / "vae"), "config.json")
    config = json.loads(silent.read_text()) | {"_diffusers_version": "0.18.2"}  # which did not know it yet
    silent.write_text(json.dumps({name: value for name, value in config.items() if name != "force_upcast"}))
    assert Checkpoint(sdxl, vae_folder=silent.parent).vae_precision(None, "fp16") == "no"
    assert Checkpoint(sdxl).vae_precision(None, "fp16") == "no"
    assert Checkpoint(sdxl).vae_precision(None, "bf16") == "no"
    assert Checkpoint(sdxl).vae_precision("fp16", "no") == "fp16"
    assert Checkpoint(sdxl, vae_folder=other_vae).vae_precision(None, "fp16") == "fp16"
    assert Checkpoint(sd).vae_precision(None, "fp16") == "fp16"
    assert Checkpoint(sd).vae_precision("no", "fp16") == "no"
    assert Checkpoint(sd).vae_precision("fp32", "fp16") == "no"  # as diffusers' script for SDXL calls it


def test_half_precision_encodes_sdxls_text_and_leaves_its_latents_alone(
    sdxl: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--mixed_precision bf16` is for the text encoders then, which is said, and known to a later run."""
    arrays = {}
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        encode(sdxl, data, folder, mixed_precision=precision, max_train_samples=2)
        cache = Cache.open(folder)
        arrays[precision] = [np.asarray(cache.arrays(kind)[name][:]) for kind, name in ARRAYS]
    assert capsys.readouterr().out.count("the VAE runs in float32") == 1
    same = [np.array_equal(a, b) for a, b in zip(arrays["no"], arrays["bf16"], strict=True)]
    assert same == [True, True, False, False]
    encode(sdxl, data, tmp_path / "bf16", mixed_precision="bf16", max_train_samples=2, vae_precision="no")
    assert "nothing to encode" in capsys.readouterr().out


def test_sdxls_condition_is_the_mode_that_its_pipeline_uses(
    sdxl: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """Not a random draw: encoding twice gives the same latents, and they are those of inference, unscaled."""
    pipeline: Any = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(sdxl)
    latents = []
    for name in ("one", "other"):
        encode(sdxl, data, tmp_path / name, max_train_samples=2)
        latents.append(np.asarray(Cache.open(tmp_path / name).arrays("images")["original"][:2, 0]))
    assert np.array_equal(*latents)
    for n, picture in enumerate(tiny.pairs(2)["input_image"]):
        pixels = pipeline.image_processor.preprocess(picture.resize((16, 16), Image.Resampling.BICUBIC))
        expected = pipeline.prepare_image_latents(pixels, 1, 1, torch.float32, CPU, do_classifier_free_guidance=False)
        torch.testing.assert_close(torch.from_numpy(latents[0][n]).float(), expected[0], **HALF)


def test_sdxls_own_vae_encodes_in_half_precision_if_told_to(
    sdxl: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """`--vae_precision` needs no other VAE beside it; the latents are those of float32 up to its rounding."""
    arrays = []
    for precision in ("no", "bf16"):
        encode(sdxl, data, tmp_path / precision, vae_precision=precision, max_train_samples=2)
        arrays.append(np.asarray(Cache.open(tmp_path / precision).arrays("images")["original"][:2], np.float32))
    assert not np.array_equal(*arrays)
    np.testing.assert_allclose(*arrays, atol=0.05)


ALONE = """
import sys
import torch
from diffusers import DiffusionPipeline
from PIL import Image
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    options = {"num_inference_steps": 3, "image_guidance_scale": 1.4, "guidance_scale": 6.0}
    image, generator = Image.open(f"{folder}/../in.png").convert("RGB"), torch.Generator().manual_seed(5)
    pipeline("make it green", image=image, generator=generator, **options).images[0].save(f"{folder}/alone.png")
assert not [name for name in sys.modules if name.split(".")[0] == "ip2p"]
"""


@pytest.mark.slow  # a training of its own
def test_diffusers_alone_edits_as_the_command_does_after_training_on_the_embedded_pictures(
    sd: Path, sd2: Path, sdxl: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same three commands for each family; the saved folder needs nothing of ip2p for the very same picture."""
    monkeypatch.setattr(emoji, "TRAIN", {"color": 8})
    monkeypatch.setattr(emoji, "TEST", {"color": 2})
    emoji.build(tmp_path / "emoji", size=32)
    tiny.picture(3, (16, 16)).save(tmp_path / "in.png")
    settings = {"num_inference_steps": 3, "image_guidance_scale": 1.4, "guidance_scale": 6.0, "seed": 5}
    outs = [tmp_path / "sd", tmp_path / "sd2", tmp_path / "sdxl"]
    for model, out in zip((sd, sd2, sdxl), outs, strict=True):
        encode(model, tmp_path / "emoji", cache := tmp_path / f"{out.name}-cache", random_flip=True)
        train(flags(model, cache, out, max_train_steps=3, learning_rate=1e-2))
        files = {"model": out, "image": tmp_path / "in.png", "output": out / "edited.png"}
        assert infer(tiny.arguments({"prompt": "make it green", **files, **settings})) == 0
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, outs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pictures = [[np.asarray(Image.open(out / f"{name}.png")) for name in ("edited", "alone")] for out in outs]
    for edited, alone in pictures:
        assert np.array_equal(edited, alone)
    assert not np.array_equal(pictures[0][0], pictures[1][0])
