"""`ip2p-infer`: the command line on a tiny real pipeline, from flags to files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import tiny
from ip2p.encode.base.flags import parse
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from ip2p.infer.config import InferConfig
from test_infer import apart, picture

STEPS = ["--num_inference_steps", "2"]


def edit(editor: Editor, image: Any, prompt: str, **settings: Any) -> list[Image.Image]:
    settings.setdefault("num_inference_steps", 2)
    return editor.edit(image, prompt, **settings)


def test_one_picture_and_one_prompt_give_one_file_with_its_settings(
    model: str, editor: Editor, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command gives what `Editor` gives, to the bit; the PNG says how it was made, and so does the last line."""
    out = tmp_path / "new" / "out.png"
    arguments = ["--model", model, "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    assert main([*arguments, "--output", str(out)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"1 edited -> {out} (2 steps, image guidance 1.5, text guidance 10)"
    assert apart(Image.open(out), edit(editor, photos / "a.png", "make it red")[0]) == 0
    with Image.open(out) as edited:
        settings = json.loads(edited.info["ip2p"])
    names = "model revision variant dtype scheduler num_inference_steps image_guidance_scale guidance_scale "
    names += "guidance_rescale negative_prompt resolution model_files input prompt seed"
    assert list(settings) == names.split(), "pictures made before would be made again"
    assert settings["prompt"] == "make it red"
    assert (settings["seed"], settings["num_inference_steps"], settings["guidance_scale"]) == (0, 2, 10.0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler, numpy 2
@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--seed 7", {"seed": 7}),
        ("--num_inference_steps 3", {"num_inference_steps": 3}),
        ("--image_guidance_scale 0.5", {"image_guidance_scale": 0.5}),
        ("--guidance_scale 1", {"guidance_scale": 1.0}),
        ("--guidance_rescale 0.7", {"guidance_rescale": 0.7}),
        ("--guidance_interval 0.5 1", {"guidance_interval": (0.5, 1.0)}),
        ("--negative_prompt night", {"negative_prompt": "night"}),
        ("--resolution 32", {"resolution": 32}),
        ("--scheduler EulerAncestralDiscrete", {"scheduler": "EulerAncestralDiscrete"}),
        ("--dtype bfloat16", {"dtype": torch.bfloat16}),
    ],
)
def test_every_setting_reaches_the_model(
    model: str, editor: Editor, photos: Path, tmp_path: Path, flags: str, settings: dict[str, Any]
) -> None:
    """Each flag gives the picture of the `Editor` argument of that name, and one unlike the default's."""
    out = tmp_path / "out.png"
    arguments = ["--model", model, "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    assert main([*arguments, *flags.split(), "--output", str(out)]) == 0
    of_editor = {name: settings[name] for name in ("scheduler", "dtype") if name in settings}
    settings = {name: value for name, value in settings.items() if name not in of_editor}
    expected = edit(Editor(model, **of_editor) if of_editor else editor, photos / "a.png", "make it red", **settings)
    assert apart(Image.open(out), expected[0]) == 0
    assert apart(Image.open(out), edit(editor, photos / "a.png", "make it red")[0]) > 0


def test_command_editor_and_bare_pipeline_agree_bit_for_bit(
    model: str, editor: Editor, photos: Path, tmp_path: Path
) -> None:
    """One picture, one prompt, one seed: three ways to the same pixels."""
    picture(5).save(photos / "c.png")  # of the model's own size, at which nothing is resized
    pipeline: Any = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    settings: dict[str, Any] = {"num_inference_steps": 2, "image_guidance_scale": 1.2, "guidance_scale": 7.5}
    bare = pipeline("make it red", image=picture(5), generator=torch.Generator().manual_seed(3), **settings).images[0]
    (edited,) = edit(editor, picture(5), "make it red", seed=3, **settings)
    arguments = ["--model", model, "--image", str(photos / "c.png"), "--prompt", "make it red", "--seed", "3", *STEPS]
    arguments += ["--image_guidance_scale", "1.2", "--guidance_scale", "7.5", "--output", str(tmp_path / "out.png")]
    assert main(arguments) == 0
    assert apart(bare, edited) == apart(bare, Image.open(tmp_path / "out.png")) == 0


def test_a_variant_of_the_weights_is_chosen(model: str, photos: Path, tmp_path: Path) -> None:
    """--variant takes the files of that name, which may hold other weights."""
    folder = shutil.copytree(model, tmp_path / "two")
    other: Any = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    with torch.no_grad():
        other.unet.conv_out.weight.neg_()
    other.save_pretrained(folder, variant="fp16")
    arguments = ["--model", str(folder), "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    for flags in ([], ["--variant", "fp16"]):
        assert main([*arguments, "--output", str(tmp_path / f"out{len(flags)}.png"), *flags]) == 0
    of_variant = edit(Editor(folder, variant="fp16"), photos / "a.png", "make it red")[0]
    assert apart(Image.open(tmp_path / "out2.png"), of_variant) == 0
    assert apart(Image.open(tmp_path / "out2.png"), Image.open(tmp_path / "out0.png")) > 0


# diffusers still passes an argument that huggingface_hub no longer heeds.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
def test_a_revision_on_the_hub_is_chosen(
    model: str, editor: Editor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--revision takes a branch of a Hub id; here from the Hub's cache on disk, where only that branch lies."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--editor"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text("a" * 40)
    shutil.copytree(model, repository / "snapshots" / ("a" * 40))
    arguments = ["--model", "someone/editor", "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    arguments += ["--output", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit, match="2"):  # the default branch is not there
        main(arguments)
    assert main([*arguments, "--revision", "v2"]) == 0
    assert apart(Image.open(tmp_path / "out.png"), edit(editor, photos / "a.png", "make it red")[0]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --model"),
        ("--modle M", "unknown flag --modle; did you mean --model?"),
        ("--model {model} --prompt red --output o.png", "give either --image or --table"),
        ("--model {model} --image {a} --output o.png", "give --prompt"),
        ("--model {model} --image {a} --prompt red", "give --output"),
        ("--model {model} --image {a} --prompt red --output o.jpg", "a name that ends in .png"),
        ("--model {model} --image {a} --prompt red --output o --sheet s.jpg", "a name that ends in .png"),
        ("--model {model} --image {a} --prompt red --output {a}", "would overwrite the input"),
        ("--model {model} --image {photos} --prompt red --output {photos}", "would overwrite the input"),
        ("--model {model} --image {photos} --prompt red --output o.png", "one file for 3 inputs: give a folder"),
        ("--model {model} --image {photos}/*.gif --prompt red --output o", "no picture is there"),
        ("--model {model} --image {a} --prompt red --output o --batch_size 0", "--batch_size 0: expected 1 or more"),
        ("--model {model} --image {a} --prompt red --output o --resolution 33", "resolution 33 is not a multiple"),
        ("--model {model} --image {a} --prompt red --output o --device abacus", "cannot be loaded: Expected one of"),
        ("--model {photos} --image {a} --prompt red --output o", "it has no model_index.json"),
        ("--model {a} --image {a} --prompt red --output o", "expected a folder as ip2p-train saves it"),
        ("--model {photos}/no/where --image {a} --prompt red --output o", "expected a folder as ip2p-train saves"),
        ("--model {base} --image {a} --prompt red --output o", "conv_in takes 4 channels, 8 expected; train one"),
        ("--model {hollow} --image {a} --prompt red --output o", "unet holds no weights: expected"),
        (
            "--model {model} --table {photos}/notes.txt --output o",
            "is a file of no known kind: expected .arrow, .csv",
        ),
        ("--model {model} --table {bad} --output o", "bad.jsonl cannot be opened"),
        (
            "--model {model} --table {odd} --output o",
            "it has input, output, words: choose with --edit_prompt_",
        ),
        (
            "--model {model} --table {odd} --edit_prompt_column word --output o",
            "no column word; .* mean words",
        ),
        ("--config {photos}/gone.yaml", "gone.yaml cannot be read"),
        ("--config {photos}/notes.txt", "holds no `flag: value` lines"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    model: str,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was found, what was expected, what mends it; no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    places = {"model": model, "photos": photos, "a": photos / "a.png"}
    places |= {"bad": photos / "bad.jsonl", "odd": photos / "odd.jsonl"}
    places["bad"].write_text("no json\n")
    places["odd"].write_text(json.dumps({"input": "a.png", "output": "b.png", "words": "make it red"}) + "\n")
    if "{base}" in flags:
        places["base"] = tiny.checkpoint(tmp_path / "base")
    if "{hollow}" in flags:
        places["hollow"] = tiny.pipeline(tmp_path / "hollow")
        (places["hollow"] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    capfd.readouterr()
    before = set(tmp_path.glob("*"))
    with pytest.raises(SystemExit, match="2"):
        main([part.format(**places) for part in flags.split()])
    errors = capfd.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("ip2p-infer: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in errors
    assert set(tmp_path.glob("*")) == before


def test_a_config_stands_for_its_flags_and_later_ones_win(tmp_path: Path) -> None:
    """A YAML file is expanded where it stands; its values are read as the flags' text would be."""
    (tmp_path / "run.yaml").write_text(
        "model: M\nimage: [a.png, b.png]\nprompt: no\noutput: out\nseed: 3\nguidance_scale: 1e1\nresolution: null\n"
    )
    config = parse(InferConfig, ["--seed", "1", f"--config={tmp_path / 'run.yaml'}", "--image", "c.png"], "ip2p-infer")
    assert (config.model, config.inputs.prompt, config.editing.seed, config.inputs.image) == ("M", "no", 3, ("c.png",))
    assert (config.editing.guidance_scale, config.editing.resolution) == (10.0, None)
    config = parse(InferConfig, ["--config", str(tmp_path / "run.yaml"), "--seed", "1"], "ip2p-infer")
    assert (config.editing.seed, config.inputs.image) == (1, ("a.png", "b.png"))


def test_help_says_the_defaults_without_loading_torch() -> None:
    """`python -m ip2p.infer --help` answers at once: nothing heavy is imported for it."""
    code = "import runpy, sys\nsys.argv = ['ip2p-infer', '--help']\n"
    code += "try: runpy.run_module('ip2p.infer', run_name='__main__')\n"
    code += "finally: print(sorted({'torch', 'diffusers', 'transformers', 'datasets'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--image_guidance_scale" in result.stdout
    assert "diffusers' guide" in result.stdout
