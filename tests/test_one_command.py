"""Tests of `ip2p-train` on a dataset: it is `ip2p-encode` and then itself, and the same command goes on with either."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionInstructPix2PixPipeline

import hub
import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import build, changed
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.config import EncodeConfig
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.pipeline import Pipeline
from ip2p.train import setup
from ip2p.train.__main__ import main
from ip2p.train.command import place_of, read
from ip2p.train.need import Model
from ip2p.train.unet.load import load_unet
from ip2p.train.watch.metrics import Metrics
from test_interrupt import at_step
from test_keep import files_of
from test_scores import tiny_judges
from test_train import FLAGS, assert_same, living_models, states

STEPS = {"max_train_steps": 6, "checkpointing_steps": 4, "checkpoints_total_limit": 0}
ENCODE = {"resolution": 16, "random_flip": True, "dataloader_num_workers": 0}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where caches lie whose place nobody names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "ip2p" / "caches"


def command(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    """The flags of a run on a dataset."""
    places = {"pretrained_model_name_or_path": model, "dataset_name": data, "output_dir": output}
    return tiny.arguments(places | FLAGS | STEPS | ENCODE | more)


def run(arguments: list[str]) -> None:
    """Run the command as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main(arguments)


@pytest.fixture(scope="module")
def two_commands(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out of `ip2p-encode` and then `ip2p-train`, undisturbed."""
    output = tmp_path_factory.mktemp("two") / "out"
    places = {"pretrained_model_name_or_path": sd, "cache": cache, "output_dir": output}
    run(tiny.arguments(places | FLAGS | STEPS))
    return output


def test_a_dataset_gives_the_weights_of_the_two_commands_and_is_encoded_once(
    sd: Path, data: Path, two_commands: Path, caches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoders are gone when the UNet comes; the place of the cache is said, and the same command finds it."""
    others = living_models()
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({name for number, name in living_models().items() if number not in others})

    def encoding(*_: object, original: Any = Pipeline.run, **rest: Any) -> None:
        look()
        original(*_, **rest)

    def loading(*_: Any) -> Any:
        look()
        return load_unet(*_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run", encoding)
        patch.setattr("ip2p.train.unet.make.load_unet", loading)
        run(command(sd, data, tmp_path / "out"))
        run(command(sd, data, tmp_path / "out"))
    first, after, again = seen
    assert {"AutoencoderKL", "CLIPTextModel"} <= first
    assert after == again == set()
    (place,) = caches.iterdir()
    said = capsys.readouterr().out
    assert said.count(f"the cache of this dataset is {place}\n") == 2
    assert f"encoded 10 samples: {place} holds all 10 samples of {data}" in said
    assert f"nothing to encode: {place} holds all 10 samples of {data}" in said
    assert "nothing is trained" in said
    for step in (4, 6):
        assert_same(states(tmp_path / "out" / f"checkpoint-{step}"), states(two_commands / f"checkpoint-{step}"))


def test_ctrl_c_in_either_part_goes_on_with_the_same_command(
    sd: Path, data: Path, two_commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same weights; another command in that folder must still say what is to become of the checkpoints."""
    arguments = command(sd, data, tmp_path / "out")

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for place, name, change in (
        (Pipeline, "_encode_images", stop),
        (Metrics, "step", at_step(5, signal.SIGINT)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, change)
            with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
                run(arguments)
    assert "the same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(command(sd, data, tmp_path / "out", learning_rate=2e-4))
    captured = capsys.readouterr()
    assert "holds checkpoint-5 already: continue with --resume_from_checkpoint latest" in captured.err
    assert "cache" not in captured.out
    run(arguments)
    captured = capsys.readouterr()
    assert f"the training will go on from {tmp_path / 'out'}/checkpoint-5" in captured.out
    assert_same(states(tmp_path / "out" / "checkpoint-6"), states(two_commands / "checkpoint-6"))


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"cache": ("a", "b")}, "--cache a b: expected one, for the dataset to be encoded to"),
        ({"cache": "s3://bucket/cache"}, "--cache s3://bucket/cache is a url, expected a folder of this machine"),
        ({"report_to": "abacus"}, "--report_to abacus: no such tracker is installed"),
        ({"enable_xformers_memory_efficient_attention": True}, "--enable_xformers_memory_efficient_attention: "),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 trains on a GPU"),
        ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint latest: no such checkpoint"),
        ({"output_dir": "{data}/out"}, "--output_dir {data}/out lies in the folder of the dataset {data}"),
        ({"crops": 8}, "--crops 8 belongs to --resize_mode random_crop"),
        ({"ema_decay": 0.5, "use_ema": False}, "--ema_decay 0.5 does nothing without --use_ema"),
        ({"train_data_dir": "folder"}, "give either --dataset_name or --train_data_dir"),
        ({"learning_rat": 1}, "unknown flag --learning_rat; did you mean --learning_rate?"),
        ({"random_flop": True}, "unknown flag --random_flop; did you mean --random_flip?"),
        ({"no_use_eam": True}, "unknown flag --no_use_eam; did you mean --no_use_ema?"),
    ],
)
def test_what_either_part_refuses_is_refused_before_anything_is_encoded(
    sd: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    answer: str,
) -> None:
    """Flags, places and the machine, in a line."""
    monkeypatch.setattr("ip2p.encode.run.find_checkpoint", None)
    given = {name: value.format(data=data) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(SystemExit, match="2"):
        run(command(sd, data, tmp_path / "out", **given))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ip2p-train: {answer.format(data=data)}")


def test_a_cache_that_is_named_is_the_one_that_is_encoded_to(sd: Path, data: Path, tmp_path: Path) -> None:
    """An output folder that is not named is diffusers' own; what a file says counts as on the command line."""
    (tmp_path / "run.yaml").write_text(f"dataset_name: {data}\nresolution: 32\nseed: 3\nrandom_flip: true\n")
    flags = f"--config {tmp_path}/run.yaml --no_random_flip --pretrained_model_name_or_path {sd} --cache c --seed 4"
    encoding, config = read(flags.split())
    assert encoding
    assert (encoding.cache, config.samples.cache) == (Path("c"), ("c",))
    assert (encoding.pictures.resolution, encoding.pictures.random_flip, config.steps.seed) == (32, False, 4)
    assert config.saving.output_dir == Path("instruct-pix2pix-model")
    assert read(["--pretrained_model_name_or_path", "m", "--cache", "c", "--output_dir", "o"])[0] is None
    with pytest.raises(SettingsError, match="give --cache and --output_dir, or --dataset_name"):
        read(["--pretrained_model_name_or_path", "m"])


def test_cublas_is_told_before_the_encoders_use_it(sd: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It reads its variable once."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found: list[str | None] = []
    monkeypatch.setattr(setup, "encode", lambda *_, **__: found.append(os.environ.pop("CUBLAS_WORKSPACE_CONFIG")))
    encoding, config = read(command(sd, data, tmp_path / "out", deterministic=True))
    assert encoding
    setup.encode_first(encoding, config)
    assert found == [":4096:8"]


@pytest.fixture
def encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    """An encode of a dataset in the working folder."""
    for name in ("data", "model", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return build(EncodeConfig, {"pretrained_model_name_or_path": "model", "dataset_name": "data", "cache": Path()})


def test_a_place_is_the_same_however_the_same_is_said(
    encoding: EncodeConfig, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever folder one is in, and whatever is not in the cache: who changes that finds the cache again."""
    place = place_of(encoding)
    assert place.parent == caches
    assert place.name.startswith("data-model-256-")
    same: list[dict[str, Any]] = [
        {"dataset_name": str(tmp_path / "data"), "pretrained_model_name_or_path": "./model"},
        {"encode_batch_size": 3, "dataloader_num_workers": 2, "on_error": "fail", "retry_quarantined": True},
        {"keep_columns": ("score",), "no_flip_regex": "none", "streaming": True, "cache_dir": tmp_path},
        {"resize_mode": "squash"},
    ]
    for flags in same:
        assert place_of(changed(encoding, **flags)) == place
    cropped = place_of(changed(encoding, center_crop=True))
    assert cropped == place_of(changed(encoding, resize_mode="center_crop")) != place
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path / "other")
    assert place_of(changed(encoding, dataset_name="../link", pretrained_model_name_or_path="../model")) == place
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of(encoding).parent == tmp_path / ".cache" / "ip2p" / "caches"


def test_whatever_decides_what_is_in_a_cache_gives_it_another_place(encoding: EncodeConfig, monkeypatch: Any) -> None:
    """Samples, model and geometry; and a pattern of files, which means others in another folder."""
    several: list[dict[str, Any]] = [
        {},
        {"dataset_name": "other"},
        {"dataset_name": "someone/data"},
        {"dataset_name": "{000..009}.tar"},
        {"dataset_name": None, "train_data_dir": Path("data")},
        {"pretrained_model_name_or_path": "someone/model"},
        {"revision": "fp16"},
        {"pretrained_vae_model_name_or_path": "someone/vae"},
        {"split": "test"},
        {"dataset_config_name": "large"},
        {"edit_prompt_column": "words"},
        {"prompt_choice": "all"},
        {"reverse_pairs": True},
        {"mask_column": "mask"},
        {"max_train_samples": 5},
        {"resolution": 512},
        {"bucket_step": 64},
        {"resize_mode": "random_crop"},
        {"resize_mode": "random_crop", "crops": 2},
        {"random_flip": True},
        {"background": "black"},
        {"mixed_precision": "fp16"},
        {"vae_precision": "fp16"},
        {"cache_text": False},
    ]
    places = [place_of(changed(encoding, **flags)) for flags in several]
    monkeypatch.chdir("other")
    places.append(place_of(changed(encoding, dataset_name="{000..009}.tar")))
    assert len(set(places)) == len(several) + 1


# The command of diffusers' guide (docs/source/en/training/instructpix2pix.md), with `-m ip2p.train` for the script.
GUIDE = """
accelerate launch --mixed_precision="fp16" -m ip2p.train \
    --pretrained_model_name_or_path=$MODEL_NAME \
    --dataset_name=$DATASET_ID \
    --enable_xformers_memory_efficient_attention \
    --resolution=256 \
    --random_flip \
    --train_batch_size=4 \
    --gradient_accumulation_steps=4 \
    --gradient_checkpointing \
    --max_train_steps=15000 \
    --checkpointing_steps=5000 \
    --checkpoints_total_limit=1 \
    --learning_rate=5e-05 \
    --max_grad_norm=1 \
    --lr_warmup_steps=0 \
    --conditioning_dropout_prob=0.05 \
    --mixed_precision=fp16 \
    --seed=42 \
    --push_to_hub
"""
MODEL, DATASET = "stable-diffusion-v1-5/stable-diffusion-v1-5", "fusing/instructpix2pix-1000-samples"
# Of a size for tests, and what a CPU cannot do is taken back: later flags win.
SMALLER = "--resolution 16 --max_train_steps 2 --mixed_precision bf16 --no_enable_xformers_memory_efficient_attention"


def launched(line: str, folder: Path, **variables: str) -> str:
    """What a command of accelerate prints that is started in a folder with a home of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(folder), "PYTHONUNBUFFERED": "1"} | variables
    assert line.split()[:2] == ["accelerate", "launch"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(line)[2:]]
    done = subprocess.run(launcher, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_of_diffusers_guide_runs_with_one_word_changed(tmp_path: Path) -> None:
    """From a Hub and back to it; the second time nothing is fetched, encoded or trained."""
    hub.released(tmp_path / "hub" / "models" / MODEL)
    tiny.dataset(tmp_path / "hub" / "datasets" / DATASET, tiny.pairs(10))
    line = GUIDE.replace("$MODEL_NAME", MODEL).replace("$DATASET_ID", DATASET).replace("\n", " ") + SMALLER
    with hub.serve(tmp_path / "hub") as standin:
        first = launched(line, tmp_path, **standin.environment, HF_TOKEN="hf_x")
        uploaded, card = set(standin.uploaded), standin.uploaded["README.md"].decode()
        assert standin.with_places() == []
        standin.uploaded.clear()
        standin.fetched.clear()
        second = launched(line, tmp_path, **standin.environment, HF_TOKEN="hf_x")
    (place,) = (tmp_path / ".cache" / "ip2p" / "caches").iterdir()
    for said, encoded in ((first, "encoded 10 samples"), (second, "nothing to encode")):
        assert f"the cache of this dataset is {place}\n" in said
        assert f"{encoded}: {place} holds all 10 samples of {DATASET}" in said
        assert "uploaded to someone/instruct-pix2pix-model" in said
    assert "nothing is trained" in second
    assert standin.fetched == []
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= uploaded
    assert set(standin.uploaded) >= {"model_index.json", "README.md"}
    said = yaml.safe_load(card.split("---")[1])
    assert (said["base_model"], said["datasets"], said["license"]) == (MODEL, [DATASET], "creativeml-openrail-m")
    assert 'from_pretrained("someone/instruct-pix2pix-model")' in card
    assert f"| [{DATASET}](https://huggingface.co/datasets/{DATASET}) | 10 | 0 |" in card
    StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "instruct-pix2pix-model")


@pytest.mark.slow
def test_the_same_processes_encode_and_train(sd: Path, data: Path, tmp_path: Path, encode: Callable[..., None]) -> None:
    """Two of them end in the weights that two of them reach on a cache that one made."""
    arguments = command(sd, data, tmp_path / "out")
    line = "accelerate launch --cpu --num_processes 2 --mixed_precision no -m ip2p.train "
    said = launched(line + shlex.join(arguments), tmp_path, HF_HUB_OFFLINE="1")
    assert "encoded 10 samples" in said
    encode(sd, data, tmp_path / "cache", random_flip=True)
    places = {"pretrained_model_name_or_path": sd, "cache": tmp_path / "cache", "output_dir": tmp_path / "two"}
    launched(line + shlex.join(tiny.arguments(places | FLAGS | STEPS)), tmp_path, HF_HUB_OFFLINE="1")
    assert_same(states(tmp_path / "out" / "checkpoint-6"), states(tmp_path / "two" / "checkpoint-6"))


@pytest.mark.parametrize(
    ("flags", "encodes", "trains"),
    [
        ("--pair_scores", "clip", None),
        ("--score_samples 2 --num_validation_samples 2", None, "clip"),
        ("--pair_scores --score_samples 2 --num_validation_samples 2", "clip", "clip"),
    ],
)
def test_a_clip_judges_pairs_or_edits_or_both(flags: str, encodes: str | None, trains: str | None) -> None:
    """Where it can act; and scores decide nothing about where the cache lies."""
    arguments = "--pretrained_model_name_or_path m --dataset_name d --clip_model clip"
    encoding, config = read([*arguments.split(), *flags.split()])
    assert encoding is not None
    assert (encoding.scores.clip_model, config.watching.clip_model) == (encodes, trains)
    assert place_of(encoding) == place_of(changed(encoding, pair_scores=False, clip_model=None))


def test_pairs_are_judged_in_the_cache_that_is_there(
    sd: Path, data: Path, cache: Path, caches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shard of it is touched, CLIP is gone when the UNet comes, and training keeps pairs by what it said."""
    judges, keep = tiny_judges(tmp_path / "judges"), "clip_image <= 1.1 and clip_t is null"
    flags = {"max_train_steps": 1, "pair_scores": True, "clip_model": judges.clip, "keep": keep}
    arguments = command(sd, data, tmp_path / "out", **flags)
    encoding, _ = read(arguments)
    assert encoding
    place = Path(shutil.copytree(cache, place_of(encoding)))
    files, living = files_of(place), list[str]()

    def loading(*_: Any) -> Any:
        living.extend(living_models().values())
        return load_unet(*_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.train.unet.make.load_unet", loading)
        run(arguments)
    said = capsys.readouterr().out
    assert f"judged 10 samples by {judges.clip}\n" in said
    assert f"--keep {keep}: 10 of 10 samples of {place}\n" in said
    assert "CLIPModel" not in living
    assert [*caches.iterdir()] == [place]
    assert files_of(place) == files


@pytest.mark.parametrize("more", [{"bucket_step": 8}, {"no_cache_text": True, "mixed_precision": "bf16"}])
def test_an_estimate_goes_by_the_flags_and_encodes_nothing(
    sd: Path, data: Path, caches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    """It is that of the finished cache, to the byte, and neither cache nor output folder is made for it."""
    arguments = command(sd, data, tmp_path / "out", num_validation_samples=2, **more)
    run([*arguments, "--estimate"])
    said = capsys.readouterr().out
    assert "for 16 x 16 px, batches of 2" in said
    assert not caches.exists()
    assert not (tmp_path / "out").exists()
    encoding, config = read(arguments)
    assert encoding
    setup.encode(encoding)
    base = Checkpoint(sd)
    cached = Model.of(base, Reader(Cache.open(Path(config.samples.cache[0]))))
    assert Model.planned(base, encoding) == cached
    assert (cached.text > 0) == ("no_cache_text" in more)
