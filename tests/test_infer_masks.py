"""Masks at inference: outside nothing changes, inside the edit is made, whatever kind of picture and mask it is."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

import tiny
from ip2p.encode.data.pictures import open_picture
from ip2p.infer import EditError, Editor
from ip2p.infer.__main__ import main
from ip2p.infer.drawing.mask import paste, read_mask
from test_infer import apart, picture

STEPS: dict[str, Any] = {"num_inference_steps": 3}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """A tiny pipeline of either family."""
    editor = Editor(tiny.pipeline(tmp_path_factory.mktemp("models") / request.param))
    editor.pipeline.set_progress_bar_config(disable=True)
    return editor


def area(size: tuple[int, int]) -> np.ndarray:
    """A part of a picture of `size` (width, height) with a corner that points inwards: True inside."""
    inside = np.zeros(size[::-1], bool)
    inside[size[1] // 4 : -size[1] // 4, size[0] // 3 :] = True
    inside[: size[1] // 2, size[0] // 2 :] = False
    return inside


def mask_of(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(37, 23), (16, 16), (301, 199)])
def test_outside_a_mask_each_byte_stays(either: Editor, form: str, size: tuple[int, int]) -> None:
    """At sizes that no VAE divides, which are resized to be edited and back; inside, it is another picture."""
    file = io.BytesIO()
    picture(1, size).save(file, form)
    inside = area(size)
    (edited,) = either.edit(file.getvalue(), "make it red", masks=mask_of(inside), **STEPS)
    before, after = np.asarray(open_picture(file.getvalue())), np.asarray(edited)
    assert np.array_equal(after[~inside], before[~inside])
    assert (after[inside] != before[inside]).any(axis=1).mean() > 0.9


def test_a_mask_of_all_is_none_and_one_of_nothing_gives_the_picture_back(either: Editor) -> None:
    """Also among others in a batch, each with its own; one mask stands for all pictures."""
    images, white = [picture(seed) for seed in range(4)], np.ones((16, 16), np.float32)
    plain = either.edit(images, "make it red", **STEPS)
    masked = either.edit(images, "make it red", masks=[None, white, 0 * white, mask_of(area((16, 16)))], **STEPS)
    assert max(apart(*both) for both in zip(masked[:2], plain, strict=False)) <= 1
    assert apart(masked[2], images[2]) == 0
    assert apart(masked[3], plain[3]) > 0
    assert all(apart(*both) == 0 for both in zip(either.edit(images, "red", masks=0 * white), images, strict=True))
    with pytest.raises(EditError, match="4 pictures and 1 masks: give as many, or one mask"):
        either.edit(images, "make it red", masks=[white])


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_in_the_first_half_of_the_steps_latents_outside_are_those_of_the_picture(either: Editor, kind: Any) -> None:
    """With as much of the same noise as the step has, but for places beside the mask; later none is set."""
    pipeline: Any = either.pipeline
    scheduler = pipeline.scheduler
    pipeline.scheduler = kind.from_config(scheduler.config)
    seen: list[torch.Tensor] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0][:1].clone()))
    right = np.arange(16)[None].repeat(16, axis=0) >= 8
    try:
        either.edit(picture(1), "make it red", seed=4, masks=mask_of(right), num_inference_steps=6)
        steps = pipeline.scheduler.timesteps.clone()
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        for number, (sample, step) in enumerate(zip(seen, steps, strict=True)):
            pipeline.scheduler.set_timesteps(6)  # which forgets the step that it was at
            clean = sample[:, 4:] * pipeline.vae.config.scaling_factor
            noisy = pipeline.scheduler.scale_model_input(pipeline.scheduler.add_noise(clean, noise, step[None]), step)
            assert torch.allclose(sample[:, :4, :, :3], noisy[..., :3], 1e-4, 1e-5) == (number < 3)
            assert not torch.allclose(sample[:, :4, :, 3], noisy[..., 3], 1e-4, 1e-5)
            assert not torch.allclose(sample[:, :4, :, 4:], noisy[..., 4:], 1e-4, 1e-5)
    finally:
        hook.remove()
        pipeline.scheduler = scheduler


def test_the_seam_lies_inside() -> None:
    """Along straight edges and corners: a third, two thirds, then all of the edit. A picture's border is no edge."""
    inside = area((40, 32)).astype(np.float32)
    black, white = (Image.new("L", (40, 32), color).convert("RGB") for color in (0, 240))
    mixed = np.asarray(paste(black, white, inside, 3))[..., 0]
    assert (mixed[inside == 0] == 0).all()
    assert mixed[20, 10:18].tolist() == [0, 0, 0, 80, 160, 240, 240, 240]
    assert mixed[20, -1] == 240
    assert set(mixed[inside > 0].tolist()) == {80, 160, 240}
    assert np.array_equal(np.asarray(paste(black, white, inside, 1))[..., 0], 240 * inside)
    shades = np.linspace(0, 1, 40, dtype=np.float32)[None].repeat(32, axis=0)
    assert np.array_equal(np.asarray(paste(black, white, shades, 1))[..., 0], (240 * shades).round())


def test_a_mask_of_another_size_is_brought_to_that_of_its_picture() -> None:
    """A pixel of a smaller mask is a rectangle of the picture."""
    found = read_mask(mask_of(np.array([[True, False]])), (6, 4))
    assert np.array_equal(found, np.repeat([[1, 1, 1, 0, 0, 0]], 4, axis=0))


def test_the_command_takes_a_mask_for_all_pictures(
    model: str, editor: Editor, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture with another mask is made anew, and what is no mask is told before anything is edited."""
    out = tmp_path / "out"
    arguments = ["--model", model, "--image", str(photos), "--prompt", "make it red", "--output", str(out)]
    arguments += ["--num_inference_steps", "3", "--mask", str(tmp_path / "mask.png")]
    for inside in (area((16, 8)), ~area((16, 8))):
        mask_of(inside).save(tmp_path / "mask.png")
        assert main(arguments) == 0
        assert "3 edited" in capsys.readouterr().out
        for name, stem in (("a.png", "a"), ("b.png", "b-2")):
            (expected,) = editor.edit(photos / name, "make it red", masks=mask_of(inside), **STEPS)
            with Image.open(out / f"{stem}.png") as found:
                assert apart(found, expected) <= 1
                assert "mask" in json.loads(found.info["ip2p"])
    assert main(arguments) == 0
    assert "3 already there" in capsys.readouterr().out
    mask_of(np.zeros((16, 16))).save(tmp_path / "mask.png")
    assert main(arguments) == 0
    assert f"--mask {tmp_path}/mask.png is black all over: nothing may change" in capsys.readouterr().err
    (tmp_path / "mask.png").write_bytes(b"no picture")
    for answer in ("mask: the image cannot be decoded (not an image file)", "cannot be read: No such file"):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ip2p-infer: --mask {tmp_path}/mask.png")
        assert answer in line
        (tmp_path / "mask.png").unlink(missing_ok=True)


def test_each_row_of_a_table_has_its_mask(
    model: str, editor: Editor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or none, and may change everywhere then; one with a bad mask is skipped, and the others are edited."""
    inside = area((24, 20))
    mask_of(inside).save(tmp_path / "mask.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = []
    for number, mask in enumerate(["mask.png", None, "bad.png", "gone.png"]):
        picture(number, (24, 20)).save(tmp_path / f"{number}.png")
        rows.append({"input": f"{number}.png", "instruction": "make it red", "mask": mask})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, flags = tmp_path / "out", ["--num_inference_steps", "3", "--mask_column", "auto"]
    arguments = ["--model", model, "--table", str(tmp_path / "t.jsonl"), "--output", str(out), *flags]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "2 edited, 2 skipped" in said.out
    assert "skipped row 2: mask: the image cannot be decoded" in said.err
    for number, mask in enumerate([mask_of(inside), None]):
        (expected,) = editor.edit(tmp_path / f"{number}.png", "make it red", masks=mask, **STEPS)
        assert apart(Image.open(out / f"{number}.png"), expected) <= 1
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--mask", str(tmp_path / "mask.png")])
    assert "give either --mask or --mask_column" in capsys.readouterr().err


PAGE = """
import sys
from pathlib import Path
from ip2p.encode.base.flags import parse
from ip2p.infer.config import InferConfig
from ip2p.infer.ui.page import Page

model, picture, mask, folder = sys.argv[1:]
page = Page(parse(InferConfig, ["--model", model, "--ui"], "ip2p-infer"), Path(folder))
at = page.layout
seen = page.check_mask(mask)[at.mask]
shown = page.edit(None, [], [model], False, picture, seen, "make it red", 3, 1.5, 10.0, 0)
Path(shown[at.result][1]).rename(Path(folder) / "edited.png")
(edit,) = shown[at.shelf]
assert edit.controls[:2] == (picture, seen)
print(page.check_mask(sys.executable)[at.note])
"""


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed: ip2p[ui]")
def test_the_page_takes_a_mask(model: str, editor: Editor, photos: Path, tmp_path: Path) -> None:
    """It shows what counts of it, and says what is none; the picture is the one that `Editor` gives."""
    inside = area((16, 8))
    clear = Image.fromarray(np.dstack([np.full((8, 16, 3), 9), np.where(inside, 0, 255)]).astype(np.uint8))
    clear.save(tmp_path / "mask.png")
    command = [sys.executable, "-c", PAGE, model, str(photos / "a.png"), str(tmp_path / "mask.png"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "mask: the image cannot be decoded" in done.stdout, done.stderr
    (expected,) = editor.edit(photos / "a.png", "make it red", masks=mask_of(inside), **STEPS)
    assert apart(Image.open(tmp_path / "edited.png"), expected) == 0
