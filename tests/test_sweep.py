"""`ip2p-infer --sweep`: grids of edits over both guidance scales, on a tiny real pipeline."""

import json
from pathlib import Path

import pytest
from PIL import Image

import tiny
from ip2p.encode.base.flags import parse
from ip2p.encode.data.sheet import TILE
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from ip2p.infer.config import InferConfig
from test_infer import apart, picture

ROWS, COLUMNS = (0.5, 1.5), (1.0, 4.0, 9.0)
SCALES = ["--sweep_image_guidance_scale", *map(str, ROWS), "--sweep_guidance_scale", *map(str, COLUMNS)]
STEPS = ["--num_inference_steps", "2"]


def enlarged(image: Image.Image) -> Image.Image:
    factor = TILE // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def tiles(sheet: Image.Image, original: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The edits in a grid, row by row, found from its lower right corner."""
    width, height = enlarged(original).size
    gap = 8
    lefts = [sheet.width - gap - (columns - n) * (width + gap) for n in range(columns)]
    tops = [sheet.height - gap - (rows - n) * (height + gap) for n in range(rows)]
    return [sheet.crop((left, top, left + width, top + height)) for top in tops for left in lefts]


def expected(editor: Editor, image: Image.Image, prompt: str, seed: int = 0) -> list[Image.Image]:
    """The edits that belong into a grid, one by one."""
    return [
        enlarged(edited)
        for row in ROWS
        for column in COLUMNS
        for edited in editor.edit(
            image, prompt, seed=seed, num_inference_steps=2, image_guidance_scale=row, guidance_scale=column
        )
    ]


def test_a_sweep_is_a_grid_of_the_edits_at_each_pair_of_scales(model: str, editor: Editor, tmp_path: Path) -> None:
    """Image guidance grows downwards and text guidance to the right; the PNG says which, and a repetition keeps it."""
    image, out = tmp_path / "in.png", tmp_path / "out.png"
    picture(1).save(image)
    arguments = ["--model", model, "--image", str(image), "--prompt", "make it red", "--output", str(out), *STEPS]
    assert main([*arguments, "--sweep", *SCALES]) == 0
    with Image.open(out) as sheet:
        found = tiles(sheet, picture(1), len(ROWS), len(COLUMNS))
        settings = json.loads(sheet.info["ip2p"])
    assert [apart(*both) for both in zip(found, expected(editor, picture(1), "make it red"), strict=True)] == [0] * 6
    assert min(apart(found[i], found[j]) for i in range(6) for j in range(i)) > 0
    assert settings["image_guidance_scale"] == list(ROWS)
    assert settings["guidance_scale"] == list(COLUMNS)
    assert settings["prompt"] == "make it red"
    made = out.stat().st_mtime_ns
    assert main([*arguments, "--sweep", *SCALES]) == 0
    assert out.stat().st_mtime_ns == made
    assert main([*arguments, "--sweep", "--sweep_image_guidance_scale", "1", "--sweep_guidance_scale", "2"]) == 0
    assert out.stat().st_mtime_ns != made, "other scales are another grid"


def test_every_input_and_seed_has_a_grid_of_its_own(model: str, editor: Editor, tmp_path: Path) -> None:
    """A table of two pictures and prompts with two seeds each gives four grids, each of its own edits."""
    table, out = tiny.dataset(tmp_path / "set", tiny.pairs(2)), tmp_path / "out"
    arguments = ["--model", model, "--table", str(table), "--output", str(out), "--num_images", "2", *STEPS]
    assert main([*arguments, "--sweep", *SCALES]) == 0
    columns = tiny.pairs(2)
    for row, (image, prompt) in enumerate(zip(columns["input_image"], columns["edit_prompt"], strict=True)):
        for seed in (0, 1):
            with Image.open(out / f"0000{row}_{seed}.png") as sheet:
                found = tiles(sheet, image, len(ROWS), len(COLUMNS))
            assert max(map(apart, found, expected(editor, image, prompt, seed))) <= 1


def test_the_default_scales_surround_those_in_use() -> None:
    """Without values a sweep reaches over the paper's range, and holds its text guidance."""
    config = parse(InferConfig, "--model M --image a.png --prompt red --output o --sweep".split(), "ip2p-infer")
    scales = config.outputs.sweep_image_guidance_scale
    assert (min(scales), max(scales)) == (1.0, 2.2)
    assert min(config.outputs.sweep_guidance_scale) < 7.5 < max(config.outputs.sweep_guidance_scale)
    assert 7.5 in config.outputs.sweep_guidance_scale


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sheet s.png", "give one of the two"),
        ("--sweep_guidance_scale", "want one number or more"),
        ("--sweep_guidance_scale 2 -1", "guidance_scale is -1.0, expected a number from 0 up"),
        ("--sweep_image_guidance_scale nan", "image_guidance_scale is nan"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    """One line says what is wrong, and no grid is written."""
    picture(1).save(tmp_path / "in.png")
    arguments = ["--model", model, "--image", str(tmp_path / "in.png"), "--prompt", "red", *STEPS, "--sweep"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--output", str(tmp_path / "out.png"), *flags.split()])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
