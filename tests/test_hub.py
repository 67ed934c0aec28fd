"""Models and datasets on the Hub, as a stand-in on the loopback interface: what is fetched of them, what is said."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub
import tiny
from ip2p.encode.base.errors import EditError, ModelError, SourceError
from ip2p.encode.config import Dataset, Model
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.models.checkpoint import Checkpoint, find_checkpoint
from ip2p.encode.models.hub import fetch_vae
from ip2p.encode.models.judge import Judge
from ip2p.infer.__main__ import main as infer
from ip2p.infer.kind import check_model
from ip2p.train.__main__ import main
from test_scores import tiny_judges
from test_train import flags

README = (Path(__file__).parents[1] / "README.md").read_text()
MODEL, DATASET = "stable-diffusion-v1-5/stable-diffusion-v1-5", "fusing/instructpix2pix-1000-samples"
MODULES = {"ip2p-encode": "ip2p.encode", "ip2p-train": "ip2p.train", "ip2p-infer": "ip2p.infer"}

# As README has it, but of a size for tests: later flags win.
SMALLER = {
    "ip2p-encode": "--resolution 16 --mixed_precision no",
    "ip2p-train": "--train_batch_size 2 --max_train_steps 2 --mixed_precision no",
    "ip2p-infer": "--num_inference_steps 2",
}
OURS = r"(identify samples|encode|train|editing|denoising): +(\d+%|.* row/s)|[\d,]+ of [\d,]+ samples to encode: "
OURS += r"|encoded [\d,]+ samples: |saved the pipeline in |the safety checker of the base is |\d+ edited -> "
OURS += r"|the model is that of the cache: |[\d,]+ steps of [\d,]+ samples are |\d+ checkpoints? of "
OF_DOWNLOADS = r"Fetching \d+ files: |Generating train split: "


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub.Hub]:
    """A Hub with an SD and an SDXL checkpoint as they were released, and with a dataset."""
    folder = tmp_path_factory.mktemp("hub")
    hub.released(folder / "models" / MODEL)
    hub.released(folder / "models" / "stabilityai" / "sdxl", sdxl=True)
    tiny.dataset(folder / "datasets" / DATASET, tiny.pairs(4))
    for name, lacks in (("safe", "*.bin"), ("pickled", "*.safetensors"), ("both", "*.onnx")):
        vae = shutil.copytree(folder / "models" / MODEL / "vae", folder / "models" / "someone" / name)
        for file in vae.glob(lacks):
            file.unlink()
    with hub.serve(folder) as standin:
        yield standin


@pytest.fixture
def standin(served: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.Hub:
    """The Hub, for this process, which has fetched nothing of it."""
    served.fetched.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", served.url + hub.FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return served


def run(command: list[str], folder: Path, standin: hub.Hub) -> list[str]:
    """Run a command with a home in `folder`, with nothing but what the Hub has; the lines that it shows."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= standin.environment | {"HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
    program, *flags = command
    arguments = [sys.executable, "-m", MODULES[program], *flags, *SMALLER[program].split()]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", done.stdout + done.stderr))
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.slow
def test_readme_s_first_commands_show_our_lines_alone(served: hub.Hub, tmp_path: Path) -> None:
    """With an empty home, against a Hub that stumbles, nothing is shown that is not ours but the download's progress.

    Of the model each command fetches what it needs: no UNet to encode, and no weights twice.
    """
    served.fetched.clear()
    block = README.split("## Use it")[1].split("```")[1].replace("\\\n", "")
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("ip2p-")]
    assert [command[0] for command in commands] == list(MODULES)
    tiny.picture(1).save(tmp_path / "photo.jpg")
    (tmp_path / "home").mkdir()
    fetched = []
    for command in commands:
        served.stumbles = 1
        lines = run(command, tmp_path, served)
        assert [line for line in lines if not re.match(f"{OURS}|{OF_DOWNLOADS}", line)] == []
        assert any(re.match(OURS, line) for line in lines)
        fetched.append(weights(served.files_of(MODEL)))
        served.fetched.clear()
    assert fetched == [
        ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
        ["README.md", "unet/diffusion_pytorch_model.safetensors"],  # the first for its licence
        [],
    ]
    assert (tmp_path / "snowy.png").is_file()


def test_a_model_that_the_hub_does_not_have_is_named(standin: hub.Hub) -> None:
    """With the Hub's own answer."""
    answer = r"^no/model is neither .* Not Found .*\(--pretrained_model_name_or_path\); .* if it is private, `hf auth"
    with pytest.raises(ModelError, match=answer):
        find_checkpoint(Model("no/model"))


@pytest.fixture
def gated(standin: hub.Hub) -> Iterator[hub.Hub]:
    """The Hub, where neither model nor dataset is given to whoever has not accepted its licence."""
    standin.gated |= {MODEL, DATASET}
    yield standin
    standin.gated.clear()


def test_a_licence_that_is_to_be_accepted_is_said_with_its_page(gated: hub.Hub, tmp_path: Path) -> None:
    """Of models to train and to edit with, of another VAE, of CLIP, and of datasets."""
    page = rf"its licence is to be accepted: do so on {gated.url}/(datasets/)?{{name}}, then `hf auth login`$"
    with pytest.raises(ModelError, match=page.format(name=MODEL)):
        find_checkpoint(Model(MODEL))
    with pytest.raises(ModelError, match=page.format(name=MODEL)):
        fetch_vae(MODEL, None, None)
    with pytest.raises(EditError, match=page.format(name=MODEL)):
        check_model(MODEL, None)
    with pytest.raises(SourceError, match=r"accepted: do so on its page on the Hub, then `hf auth login`$"):
        open_pairs(Dataset(dataset_name=DATASET), tmp_path / "data")


def test_what_offline_lacks_is_answered_with_the_variable(standin: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps the libraries from asking; by models and datasets."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    answer = "HF_HUB_OFFLINE is set, and it was not fetched before: unset that once"
    for fetch in (lambda: find_checkpoint(Model(MODEL)), lambda: fetch_vae(MODEL, None, None)):
        with pytest.raises(ModelError, match=answer):
            fetch()
    with pytest.raises(EditError, match=answer):
        check_model(MODEL, None)
    with pytest.raises(ModelError, match=answer):
        Judge("openai/clip-vit-base-patch32", None)
    with pytest.raises(SourceError, match=answer):
        open_pairs(Dataset(dataset_name=DATASET), None)


def test_a_hub_that_cannot_be_reached_is_said(standin: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere + hub.FILES)
    with pytest.raises(ModelError, match="the Hub is out of reach"):
        find_checkpoint(Model(MODEL))


def weights(files: list[str]) -> list[str]:
    """Those files that are not small."""
    return [name for name in files if not name.endswith((".json", ".txt"))]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_what_a_stage_needs_is_fetched(standin: hub.Hub, variant: str | None) -> None:
    """Of SDXL and its many copies: no UNet for encoding, and one file of weights for each part."""
    model, infix = Model("stabilityai/sdxl", variant=variant), f".{variant}" if variant else ""
    files = [f"{part}/model{infix}.safetensors" for part in ("text_encoder", "text_encoder_2")]
    files += [f"vae/diffusion_pytorch_model{infix}.safetensors"]
    find_checkpoint(model, without=("unet",))
    assert weights(standin.files_of("stabilityai/sdxl")) == files
    standin.fetched.clear()
    find_checkpoint(model)
    assert weights(standin.files_of("stabilityai/sdxl")) == [f"unet/diffusion_pytorch_model{infix}.safetensors"]


@pytest.mark.parametrize(
    ("vae", "variant", "file"),
    [
        ("someone/safe", None, "diffusion_pytorch_model.safetensors"),
        ("someone/both", None, "diffusion_pytorch_model.safetensors"),
        ("someone/pickled", None, "diffusion_pytorch_model.bin"),
        ("someone/pickled", "fp16", "diffusion_pytorch_model.fp16.bin"),
        (MODEL, None, "vae/diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_file_of_another_vae_is_fetched(
    standin: hub.Hub, sd: Path, vae: str, variant: str | None, file: str
) -> None:
    """Its .safetensors where there is one, else its .bin, of the variant if it has that."""
    found = find_checkpoint(Model(str(sd), variant=variant, pretrained_vae_model_name_or_path=vae))
    assert weights(standin.files_of(vae)) == [file]
    assert found.identity()["vae"] == Checkpoint(sd).identity()["vae"] or variant == "fp16"


def test_an_estimate_fetches_configurations_alone(
    standin: hub.Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the model, and of another VAE; whoever needs the weights then gets them."""
    main(flags(MODEL, cache, tmp_path / "out", estimate=True, pretrained_vae_model_name_or_path="someone/safe"))
    assert "the flags that are given" in capsys.readouterr().out
    assert {Path(name).name for name in standin.fetched} == {"model_index.json", "config.json"}
    find_checkpoint(Model(MODEL)).identity()


def test_infer_keeps_downloads_where_cache_dir_says(standin: hub.Hub, tmp_path: Path) -> None:
    """Model and dataset; nothing lies where they would else."""
    folder, place = standin.folder, tmp_path / "downloads"
    if not (folder / "models" / "someone" / "edits").exists():
        tiny.pipeline(folder / "models" / "someone" / "edits")
    flags = {"model": "someone/edits", "dataset_name": DATASET, "output": tmp_path / "out", "cache_dir": place}
    assert infer(tiny.arguments(flags | {"num_inference_steps": 1, "resolution": 16})) == 0
    assert {path.name.split("--")[-1] for path in place.glob("*--*")} >= {"edits"}
    assert any(place.rglob("*.arrow"))
    assert not any((tmp_path / "cache").glob("models--*"))


def test_clip_is_kept_where_cache_dir_says(standin: hub.Hub, tmp_path: Path) -> None:
    """Its weights, its tokenizer and what decides how it sees; nothing lies where it would else."""
    if not (folder := standin.folder / "models" / "someone" / "clip").exists():
        tiny_judges(folder.parent)
    Judge("someone/clip", None, "cpu", cache_dir=tmp_path / "downloads")
    assert [path.name for path in (tmp_path / "downloads").glob("*--*")] == ["models--someone--clip"]
    assert not any((tmp_path / "cache").glob("models--*"))
