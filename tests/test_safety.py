"""Models with a safety checker: the black pictures that it puts in the place of edits are no edits."""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

import tiny
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from test_evaluate import columns, held_out
from test_scores import SIDE, tiny_judges

STEPS = ["--num_inference_steps", "1"]


def safety_parts() -> dict[str, Any]:
    """A real safety checker, tiny, that likes nothing, and what prepares pictures for it, as parts of a pipeline."""
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=layers | {"image_size": SIDE, "patch_size": 7}, projection_dim=12)
    )
    checker.concept_embeds_weights.data.fill_(-2)  # which every cosine is above
    sizes: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return {"safety_checker": checker, "feature_extractor": CLIPImageProcessorPil(**sizes)}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with a real safety checker that likes nothing."""
    folder = tmp_path_factory.mktemp("models")
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny.pipeline(folder / "sd"))
    pipeline.register_modules(**safety_parts())
    pipeline.save_pretrained(folder / "checked")
    return folder / "checked"


@pytest.fixture
def dislikes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let safety checkers dislike the pictures of these numbers, in the order in which they see them."""

    def install(*numbers: int) -> None:
        count = itertools.count()

        def forward(_: Any, clip_input: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
            flags = [next(count) in numbers for _ in range(len(clip_input))]
            for n, flagged in enumerate(flags):
                images[n] = torch.zeros_like(images[n]) if flagged else images[n]
            return images, flags

        monkeypatch.setattr(StableDiffusionSafetyChecker, "forward", forward)

    return install


def test_what_a_checker_blacked_out_is_marked(checked: Path) -> None:
    """A real checker's verdict goes with the picture."""
    (edited,) = Editor(checked).edit(tiny.picture(1), "make it red", num_inference_steps=1)
    assert edited.getextrema() == ((0, 0),) * 3
    assert edited.info["blacked_out"]


def test_an_edit_that_is_black_by_itself_is_an_edit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checker's verdict black is a color."""
    editor = Editor(model)
    decode = editor.pipeline.vae.decode
    monkeypatch.setattr(editor.pipeline.vae, "decode", lambda *a, **k: [torch.full_like(decode(*a, **k)[0], -1)])
    (edited,) = editor.edit(tiny.picture(1), "make it black", num_inference_steps=1)
    assert edited.getextrema() == ((0, 0),) * 3
    assert "blacked_out" not in edited.info


def test_no_file_is_written_for_a_blacked_out_picture(
    checked: Path, photos: Path, tmp_path: Path, dislikes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named with its seed; the other pictures of its input are there, and other inputs are edited."""
    out = tmp_path / "out"
    arguments = ["--model", str(checked), "--image", str(photos), "--prompt", "make it red", *STEPS]
    arguments += ["--num_images", "2", "--batch_size", "6", "--output", str(out), "--sheet", str(tmp_path / "s.png")]
    dislikes(1)
    assert main(arguments) == 0
    written = sorted(path.name for path in out.iterdir())
    assert len(written) == 5
    said = capsys.readouterr()
    assert "2 edited, 1 skipped" in said.out
    assert "contact sheet of 2 of 2 inputs" in said.out
    assert "the model's safety checker blacked out 1 of 2 pictures, seed 1: another --seed or prompt" in said.err


def test_a_blacked_out_picture_that_was_asked_for_is_never_taken_for_an_edit(
    checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--keep_blacked_out writes it; a second run has nothing to keep, and no PSNR counts it."""
    tiny.dataset(tmp_path / "pairs", tiny.pairs(1))
    arguments = ["--model", str(checked), "--table", str(tmp_path / "pairs"), "--output", str(tmp_path / "out"), *STEPS]
    for _ in range(2):
        assert main([*arguments, "--keep_blacked_out"]) == 1
        said = capsys.readouterr()
        assert "1 skipped" in said.out
        assert "PSNR" not in said.out
        with Image.open(tmp_path / "out" / "00000.png") as black:
            assert json.loads(black.info["ip2p"])["blacked_out"]


def test_a_sweep_says_which_of_its_cells_are_black(
    checked: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many is said; in the grid, the words stand on the black."""
    arguments = ["--model", str(checked), "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    scales = ["--sweep_image_guidance_scale", "1.5", "--sweep_guidance_scale", "5", "7"]
    assert main([*arguments, "--sweep", *scales, "--output", str(tmp_path / "grid.png")]) == 0
    assert "blacked out 2 of 2 edits of this sweep" in capsys.readouterr().err


def test_blacked_out_pictures_are_not_scored(
    checked: Path, tmp_path: Path, dislikes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Models and scales are compared over the same pairs: those of which none is blacked out."""
    judges = tiny_judges(tmp_path / "judges")
    data, out = held_out(tmp_path / "data", columns()), tmp_path / "scores"
    flags = {"model": checked, "dataset": data, "split": "test", "output": out, "num_inference_steps": 1}
    flags |= {"clip_model": judges.clip, "dino_model": judges.dino, "curve": True}
    dislikes(2, 6)  # of four pairs: the third at the first scale, and of the three that are left the last at the second
    assert main(["evaluate", *tiny.arguments(flags)]) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["pairs"] for result in results] == [2] * 7
    first = [json.loads(line) for line in next(out.glob("*/image_1_*/scores.jsonl")).read_text().splitlines()]
    assert [record["pair"] for record in first] == ["00000", "00001", "00003"]
    assert results[0]["l1"] == pytest.approx((first[0]["l1"] + first[1]["l1"]) / 2)
    assert capsys.readouterr().err.count("blacked out") == 2


PAGE = """
import sys
from pathlib import Path
from ip2p.encode.base.flags import parse
from ip2p.infer.config import InferConfig
from ip2p.infer.ui.page import Page

model, picture, folder = sys.argv[1:]
page = Page(parse(InferConfig, ["--model", model, "--ui"], "ip2p-infer"), Path(folder))
shown = page.edit(None, [], [model], False, picture, None, "make it red", 1, 1.5, 7.5, 0)
assert set(shown) == {page.layout.note}
print(shown[page.layout.note])
"""


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
def test_the_page_shows_no_blacked_out_picture(checked: Path, photos: Path, tmp_path: Path) -> None:
    """It says so instead, and the history stays as it is."""
    command = [sys.executable, "-c", PAGE, str(checked), str(photos / "a.png"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"the safety checker of {checked} blacked this out" in done.stdout, done.stderr
