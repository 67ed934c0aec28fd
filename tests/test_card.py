"""Tests of train/save/card.py, public.py and upload.py: the model card, and the upload to a stand-in for the Hub."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import tiny
from configs import train_config
from hub import FILES, Handler, Hub, released, serve
from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.cache.format import Cache
from ip2p.encode.cached import Samples
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.train.__main__ import main
from ip2p.train.data.keep import hold_out
from ip2p.train.save.averages import FOLDER
from ip2p.train.save.public import dataset, licence, public, told
from test_safety import safety_parts
from test_train import flags


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on the loopback interface."""
    with serve(tmp_path / "hub") as standin:
        for name in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
            monkeypatch.setattr(f"{name}.ENDPOINT", standin.url, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", standin.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", standin.url + FILES)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "downloads"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield standin


def test_a_finished_run_is_uploaded_with_its_card_and_without_its_checkpoints(
    sd: Path, cache: Path, tmp_path: Path, hub: Hub
) -> None:
    """`--push_to_hub` sends the pipeline, the card and the validation pictures; no file or tracker sees the token."""
    looked_at = {"num_validation_samples": 2, "num_validation_images": 1, "max_train_steps": 2}
    upload = {
        "report_to": "tensorboard",
        "push_to_hub": True,
        "hub_token": "hf_secret",
        "hub_model_id": "someone/editor",
    }
    main(flags(sd, cache, tmp_path / "out", max_train_steps=1))
    (left := tmp_path / "out" / "abandoned-checkpoint-9").mkdir()
    (left / "metrics.jsonl").touch()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, tmp_path / "out", **looked_at, **upload, resume_from_checkpoint="latest"))
    assert {"model_index.json", "README.md", "train.yaml", "validation/step-000002.png"} <= hub.uploaded.keys()
    assert "unet/diffusion_pytorch_model.safetensors" in hub.uploaded
    assert not [name for name in hub.uploaded if "checkpoint" in name or name.startswith("logs")]
    assert list((tmp_path / "out" / "logs").rglob("events*"))
    assert "Bearer hf_secret" in hub.tokens
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path


@pytest.fixture(scope="module")
def base(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a safety checker, and with a card."""
    folder = Path(shutil.copytree(sd, tmp_path_factory.mktemp("models") / "base"))
    index = json.loads((folder / "model_index.json").read_text())
    for name, part in safety_parts().items():
        part.save_pretrained(folder / name)
        library = "stable_diffusion" if name == "safety_checker" else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: of-its-own\nlicense_link: LICENSE.md\n---\n")
    return folder


def fields(card: str) -> dict[str, str]:
    """The cells of all tables of a card that have two columns, by what stands in the first."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", card, re.MULTILINE)
    return {name: value for name, value in rows if value != "---"}


def test_a_card_is_true_field_by_field_and_nothing_that_is_uploaded_names_a_place(
    base: Path,
    cache: Path,
    encode: Callable[..., None],
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a run with --max_train_samples, held-out samples, a local base and two caches, one of them of the Hub's.

    The lines that it shows run, on what the Hub has of it.
    """
    encode(base, tiny.dataset(tmp_path / "six", tiny.pairs(6, first=20)), tmp_path / "of six")
    manifest = read_record(tmp_path / "of six" / "manifest.json")
    assert manifest["settings"]["dataset_on_hub"] is False
    manifest |= {"dataset": manifest["dataset"] | {"name": "someone/six"}, "ip2p": "0.0.9"}
    manifest["settings"]["dataset_on_hub"] = True
    write_record(tmp_path / "of six" / "manifest.json", manifest)
    output, picture = tmp_path / "out", tmp_path / "picture.png"
    tiny.picture(0, (24, 16)).save(picture)
    looked_at = {
        "num_validation_samples": 3,
        "num_validation_images": 1,
        "max_train_samples": 5,
        "keep": "status <> '/a/b/c'",
    }
    asked = {
        "val_image_url_or_path": picture,
        "validation_prompt": "a/b",
        "report_to": "tensorboard",
        "ema_power": True,
    }
    upload = {"push_to_hub": True, "hub_token": "hf_secret", "hub_private_repo": True, "hub_model_id": "editor"}
    places = {"cache_dir": tmp_path / "downloads", "max_train_steps": 8}
    main(flags(base, (cache, tmp_path / "of six"), output, **looked_at, **asked, **upload, **places))

    card = hub.uploaded["README.md"].decode()
    assert (output / "README.md").read_text() == card
    assert yaml.safe_load(card.split("---")[1]) == {
        "datasets": ["someone/six"],
        "library_name": "diffusers",
        "license": "other",
        "license_name": "of-its-own",
        "pipeline_tag": "image-to-image",
        "tags": ["instruct-pix2pix", "stable-diffusion", "diffusers", "image-to-image"],
    }
    assert "# someone/editor\n" in card
    assert "model, trained from base with ip2p: it edits" in card
    assert "Its licence is of-its-own, that of base." in card
    assert f"Trained by ip2p {version('ip2p')}, torch {version('torch')}, diffusers {version('diffusers')}.\n" in card
    own = "| pairs (a local dataset) | {} | {} | ip2p " + version("ip2p") + " |"
    other = "| [someone/six](https://huggingface.co/datasets/someone/six) | {} | {} | ip2p 0.0.9 |"
    trained = [(trained, held) for trained in range(6) for held in [5 - trained]]
    (first,) = (pair for pair in trained if own.format(*pair) in card)
    (second,) = (pair for pair in trained if other.format(*pair) in card)
    assert first[1] + second[1] == 3
    assert "At 16 px (squash; views: plain, flip): 8 steps, 16 samples seen.\n" in card
    assert "![Validation pictures](validation/step-000008.png)" in card
    found, losses = fields(card), json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["validation_loss"] == f"{losses['validation_loss']:.4f}"
    expected = {"pretrained_model_name_or_path": "base", "cache": "['sd', 'of six']", "output_dir": "out", "seed": "1"}
    expected |= {"cache_dir": "downloads", "window_dir": "ip2p", "val_image_url_or_path": "picture.png"}
    expected |= {"max_train_samples": "5", "validation_prompt": "a/b", "keep": "status <> 'c'"}
    expected |= {name: str(value) for name, value in manifest["identity"].items() if value is not None}
    assert {name: found[name] for name in expected} == expected

    assert str(tmp_path) in (output / "train.yaml").read_text()
    settings = yaml.safe_load(hub.uploaded["train.yaml"])
    assert settings["cache"] == ["sd", "of six"]
    assert settings.keys() == yaml.safe_load((output / "train.yaml").read_text()).keys()
    assert {name.partition("/")[0] for name in hub.uploaded} == {
        *("unet", "vae", "text_encoder", "tokenizer", "scheduler", "validation"),
        *("model_index.json", "README.md", "train.yaml", "metrics.jsonl"),
    }
    assert (output / FOLDER).is_dir()
    assert (output / "logs").is_dir()
    assert hub.with_places() == []
    assert hub.created == {"someone/editor": True}
    assert "the safety checker of the base is not part of it" in capsys.readouterr().out

    repository = tmp_path / "hub" / "models" / "someone" / "editor"
    for name, content in hub.uploaded.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)
    hub.created.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    variables: dict[str, Any] = {}
    edit, with_checker = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(edit, variables)
    before = Image.open("edited.png")
    assert before.size == (16, 10)
    assert before.getextrema() != ((0, 0),) * 3
    exec(with_checker, variables)
    exec(edit.partition("\npipeline = ")[2].partition("\n")[2], variables)
    assert Image.open("edited.png").getextrema() == ((0, 0),) * 3


def test_an_upload_that_fails_leaves_the_pipeline_and_says_so(
    sd: Path, cache: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with the Hub's whole reason after everything was saved, and the upload alone is repeated."""

    def refuse(self: Handler) -> None:
        self.body()
        body = json.dumps({"error": 'Invalid metadata in README.md.\n- "base_model" is not valid.'}).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    arguments = flags(
        sd,
        cache,
        tmp_path / "out",
        max_train_steps=1,
        push_to_hub=True,
        hub_model_id="someone/editor",
        hub_token="hf_x",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_POST", refuse)
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    first, last = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("ip2p-train: --push_to_hub someone/editor: ")
    assert 'Invalid metadata in README.md. - "base_model" is not valid.' in first
    assert f"The pipeline is in {tmp_path / 'out'}" in last
    assert (tmp_path / "out" / "model_index.json").is_file()
    hub.uploaded.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert {"model_index.json", "README.md"} <= hub.uploaded.keys()


def test_what_is_public_says_what_was_used_and_not_where() -> None:
    """Of places on this machine the last part of the name, urls without passwords and keys, all else as it is."""
    shown = {
        "/home/me/caches/sd": "sd",
        "~/.cache/ip2p": "ip2p",
        str(Path(__file__).parent): "tests",
        "runs/long/ago": "ago",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "s3://bucket/caches/sd": "s3://bucket/caches/sd",
        "https://me:secret@host.org/a.png?signature=secret#secret": "https://host.org/a.png",
        "simplecache::s3://key:secret@bucket/cache": "simplecache::s3://bucket/cache",
        "file:///home/me/cache": "cache",
        "zip://list.csv::/home/me/data.zip": "data.zip",
        "score / 2 > 1/4 and source = '/home/me/set/a.tar' or url = 'file:///home/me/b'": (
            "score / 2 > 1/4 and source = 'a.tar' or url = 'b'"
        ),
        "make it snowy/rainy": "make it snowy/rainy",
    }
    assert {value: public(value) for value in shown} == shown
    assert public([1, "/home/me/a", None, 0.5]) == [1, "a", None, 0.5]


def test_a_dataset_is_named_by_its_hub_id_or_by_the_last_part_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the encode has found it; of caches of older versions by the look of its name, where no such folder is here."""
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, recorded, found in (
        ("someone/pairs", {"dataset_on_hub": True}, ("someone/pairs", True)),
        ("data/gone", {"dataset_on_hub": False}, ("gone", False)),
        ("data/pairs", {}, ("pairs", False)),
        ("someone/pairs", {}, ("someone/pairs", True)),
        ("data/gone", {"train_data_dir": "data/gone"}, ("gone", False)),
        ("/home/me/pairs", {"dataset_on_hub": False}, ("pairs", False)),
        ("hf://datasets/someone/pairs@main/a.parquet", {"dataset_on_hub": False}, ("someone/pairs", True)),
        ("s3://key:secret@bucket/{0..9}.tar", {"dataset_on_hub": False}, ("s3://bucket/{0..9}.tar", False)),
    ):
        assert dataset({"dataset": {"name": name}, "settings": recorded}) == found


def test_versions_are_told_in_the_order_in_which_they_trained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each time that they take turns; who trains nothing leaves what is told as it is, even on other samples."""
    samples = Samples.of(opened := Cache.open(cache), None)
    trained, held_out = hold_out(samples, 2)
    said = ""
    for number in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr("ip2p.train.save.public.version", lambda name, number=number: number)
        said = told(said, [opened], trained, held_out, trains=True)
    first = "ip2p 1.0, torch 1.0, diffusers 1.0"
    assert json.loads(said)["versions"] == [first, first.replace("1.0", "1.1")]
    (data,) = json.loads(said)["data"]
    assert (data["trained"], data["held_out"]) == (8, 2)
    assert told(said, [opened], samples, held_out, trains=False) == said
    older = json.loads(told("", [opened], samples, held_out, trains=False))
    assert (older["versions"], older["data"][0]["trained"]) == ([], 10)


@pytest.mark.usefixtures("hub")
def test_the_licence_is_that_of_the_base_wherever_it_is(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its folder or on the Hub; another by --hub_license, and none where nobody says or nobody answers."""
    released(tmp_path / "hub" / "models" / "someone" / "base")
    (tmp_path / "linked").mkdir()
    link = "https://example.org/licence"
    (tmp_path / "linked" / "README.md").write_text(f"---\nlicense: other\nlicense_link: {link}\ntags: [a]\n---\n")
    base, linked = Checkpoint(sd), Checkpoint(sd)
    linked.folder = tmp_path / "linked"
    openrail = {"license": "creativeml-openrail-m"}
    assert licence(train_config("someone/base"), base) == openrail
    assert licence(train_config("someone/nothing"), base) == {}
    assert licence(train_config(sd), base) == {}
    assert licence(train_config(tmp_path / "linked"), linked) == {"license": "other", "license_link": link}
    assert licence(train_config(sd, hub_license="mit"), base) == {"license": "mit"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert licence(train_config("someone/another"), base) == {}
    assert licence(train_config("someone/base"), base) == openrail


def test_a_public_repository_is_not_taken_for_a_private_one(
    sd: Path, cache: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is uploaded into one that was there already, which no flag makes private."""
    hub.created["someone/editor"] = False
    upload = {"push_to_hub": True, "hub_model_id": "someone/editor", "hub_token": "hf_x", "hub_private_repo": True}
    with pytest.raises(SystemExit, match="2"):
        main(flags(sd, cache, tmp_path / "out", max_train_steps=1, **upload))
    said = capsys.readouterr().err
    assert "--push_to_hub someone/editor: someone/editor is there and public, so --hub_private_repo cannot" in said
    assert hub.uploaded == {}
    assert "which is not known here, holds for it as well" in (tmp_path / "out" / "README.md").read_text()
