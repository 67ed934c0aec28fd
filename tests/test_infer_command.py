"""`ip2p-infer`: the command line on a tiny real pipeline, from flags to files."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import tiny
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from ip2p.infer.config import parse
from ip2p.infer.scores import psnr
from test_infer import apart, picture, tiny_pipeline

STEPS = ["--num_inference_steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on many threads, and far slower beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read into a cache of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("models") / "sd"))


@pytest.fixture(scope="module")
def editor(model: str) -> Editor:
    editor = Editor(model)
    editor.pipeline.set_progress_bar_config(disable=True)
    return editor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures of two sizes, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(["a.png", "b.png", "b.bmp"]):
        picture(number, (16, 8 + 4 * (number % 2))).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def edit(editor: Editor, image: Any, prompt: str, **settings: Any) -> list[Image.Image]:
    settings.setdefault("num_inference_steps", 2)
    return editor.edit(image, prompt, **settings)


def test_one_picture_and_one_prompt_give_one_file_with_its_settings(
    model: str, editor: Editor, photos: Path, tmp_path: Path
) -> None:
    """The command gives what `Editor` gives, to the bit, and the PNG says how it was made."""
    out = tmp_path / "new" / "out.png"
    arguments = ["--model", model, "--image", str(photos / "a.png"), "--prompt", "make it red", *STEPS]
    assert main([*arguments, "--output", str(out)]) == 0
    assert apart(Image.open(out), edit(editor, photos / "a.png", "make it red")[0]) == 0
    with Image.open(out) as edited:
        settings = json.loads(edited.info["ip2p"])
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
    assert main(arguments) == 2, "the default branch is not there"
    assert main([*arguments, "--revision", "v2"]) == 0
    assert apart(Image.open(tmp_path / "out.png"), edit(editor, photos / "a.png", "make it red")[0]) == 0


def test_columns_and_prompts_of_a_table_are_chosen_by_flags(
    model: str, editor: Editor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns of any name are taken, and --prompt stands for all rows."""
    columns, flags = tiny.pairs(2), ["--original_image_column", "x", "--edit_prompt_column", "z", *STEPS]
    table = datasets.Dataset.from_dict(dict(zip("xyz", columns.values(), strict=True)))
    table.to_parquet(tmp_path / "t.parquet")
    arguments = ["--model", model, "--table", str(tmp_path / "t.parquet"), "--output", str(tmp_path / "out"), *flags]
    assert main(arguments) == 0
    assert "PSNR" not in capsys.readouterr().out
    assert main([*arguments, "--edited_image_column", "y"]) == 0
    assert "PSNR to the target, 2 pairs" in capsys.readouterr().out
    for row, (image, text) in enumerate(zip(columns["input_image"], columns["edit_prompt"], strict=True)):
        assert apart(Image.open(tmp_path / "out" / f"0000{row}.png"), edit(editor, image, text)[0]) <= 1
    assert main([*arguments, "--prompt", "make it snowy"]) == 0
    for row, image in enumerate(columns["input_image"]):
        assert apart(Image.open(tmp_path / "out" / f"0000{row}.png"), edit(editor, image, "make it snowy")[0]) <= 1


def test_two_prompts_with_two_images_each_give_four_paired_files(
    model: str, editor: Editor, photos: Path, tmp_path: Path
) -> None:
    """Rows of a table and seeds are told apart by file names, and each file is the right one."""
    table = tmp_path / "table.jsonl"
    rows = [("photos/a.png", "make it red"), ("photos/b.png", "make it blue")]
    table.write_text("".join(json.dumps({"image": image, "prompt": text}) + "\n" for image, text in rows))
    out = tmp_path / "out"
    arguments = ["--model", model, "--table", str(table), "--num_images", "2", "--output", str(out), *STEPS]
    assert main([*arguments, "--device", "cpu", "--batch_size", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a_0.png", "a_1.png", "b_0.png", "b_1.png"]
    for stem, (image, text) in zip("ab", rows, strict=True):
        for k, expected in enumerate(edit(editor, tmp_path / image, text, num_images=2)):
            assert apart(Image.open(out / f"{stem}_{k}.png"), expected) <= 1


def test_folders_patterns_and_files_are_taken_together_without_collisions(
    model: str, editor: Editor, photos: Path, tmp_path: Path
) -> None:
    """Pictures of one stem get numbers, in the order in which they are named; other files are left alone."""
    out = tmp_path / "out"
    arguments = ["--model", model, "--prompt", "make it red", "--output", str(out), *STEPS]
    assert main([*arguments, "--image", str(photos), str(photos / "b*.png"), str(photos / "a.png")]) == 0
    names = {"a": "a.png", "b": "b.bmp", "b-2": "b.png", "b-3": "b.png", "a-2": "a.png"}
    assert {path.stem for path in out.iterdir()} == set(names)
    for stem, name in names.items():
        assert apart(Image.open(out / f"{stem}.png"), edit(editor, photos / name, "make it red")[0]) <= 1


@pytest.mark.parametrize("how", ["csv", "parquet", "parquet of paths", "folder", "saved to disk"])
def test_tables_of_every_kind_are_read(model: str, editor: Editor, photos: Path, tmp_path: Path, how: str) -> None:
    """Pictures as paths, as bytes or as Images of datasets; columns named for editing or for training."""
    columns = tiny.pairs(2)
    if how == "csv":
        (tmp_path / "t.csv").write_text("input,instruction\nphotos/a.png,make it red\nphotos/b.png,make it blue\n")
        columns = {"input_image": [photos / "a.png", photos / "b.png"], "edit_prompt": ["make it red", "make it blue"]}
        table, stems = tmp_path / "t.csv", ["a", "b"]
    elif how == "parquet of paths":
        rows = {"src": ["photos/a.png", "photos/b.png"], "prompt": columns["edit_prompt"]}
        columns["input_image"] = [photos / "a.png", photos / "b.png"]
        table, stems = tmp_path / "t.parquet", ["a", "b"]
        datasets.Dataset.from_dict(rows).to_parquet(table)
    else:
        folder, stems = tiny.dataset(tmp_path / "set", columns), ["00000", "00001"]
        table = next(folder.glob("*.parquet")) if how == "parquet" else folder
        if how == "saved to disk":
            table = tmp_path / "disk"
            datasets.load_dataset(str(folder)).save_to_disk(table)
    flags = ["--original_image_column", "src"] if how == "parquet of paths" else []
    out = tmp_path / "out"
    assert main(["--model", model, "--table", str(table), "--output", str(out), *flags, *STEPS]) == 0
    assert sorted(path.stem for path in out.iterdir()) == stems
    for stem, image, text in zip(stems, columns["input_image"], columns["edit_prompt"], strict=True):
        assert apart(Image.open(out / f"{stem}.png"), edit(editor, image, text)[0]) <= 1


def test_a_split_is_chosen_and_sliced(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With several splits the command asks which, and takes a slice of one."""
    folder = tiny.dataset(tmp_path / "set", tiny.pairs(3))
    (folder / "train-00000-of-00001.parquet").rename(folder / "test-00000-of-00001.parquet")
    tiny.dataset(folder, tiny.pairs(1, first=9))
    arguments = ["--model", model, "--table", str(folder), "--output", str(tmp_path / "out"), *STEPS]
    assert main(arguments) == 2
    assert "splits train, test: choose one with --split" in capsys.readouterr().err
    assert main([*arguments, "--split", "test[:2]"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_targets_give_a_sheet_and_a_score(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a table has targets, they stand in the contact sheet, and PSNR tells edits from doing nothing."""
    columns = tiny.pairs(2)
    named = columns | {"target": ["1F393", "1F40E"]}  # a column of names, as in examples/openmoji, is no picture
    folder, out, sheet = tiny.dataset(tmp_path / "set", named), tmp_path / "out", tmp_path / "s" / "sheet.png"
    arguments = ["--model", model, "--table", str(folder), "--output", str(out), "--sheet", str(sheet), *STEPS]
    assert main(arguments) == 0
    report = capsys.readouterr().out
    edits = [Image.open(out / f"0000{n}.png") for n in range(2)]
    after, before = (
        np.mean([psnr(image, target) for image, target in zip(images, columns["edited_image"], strict=True)])
        for images in (edits, columns["input_image"])
    )
    assert f"2 pairs: edited {after:.2f} dB, original {before:.2f} dB" in report
    assert "2 edited" in report
    with Image.open(sheet) as first:
        assert first.width > 3 * 256  # original, edited, target
    sheet.unlink()
    assert main(arguments) == 0, "a sheet is drawn again from pictures that are there"
    assert sheet.exists()
    assert "2 already there" in capsys.readouterr().out


def test_a_second_run_keeps_what_is_there_and_redoes_what_has_changed(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a picture made from the same input by the same model with the same settings counts as there."""
    out = tmp_path / "out"
    arguments = ["--model", model, "--image", str(photos), "--prompt", "make it red", "--output", str(out)]

    def run(*flags: str) -> str:
        assert main([*arguments, *STEPS, *flags]) == 0
        return capsys.readouterr().out.splitlines()[-1].partition(" ->")[0]

    assert run() == "3 edited"
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run("--batch_size", "1", "--device", "cpu") == "3 already there"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert run("--seed", "1") == "3 edited"
    assert run("--seed", "1") == "3 already there"
    picture(99, (16, 8)).save(photos / "a.png")
    (out / "b.png").write_bytes(b"half a file")
    assert run("--seed", "1") == "2 edited, 1 already there"
    os.utime(Path(model) / "unet" / "diffusion_pytorch_model.safetensors")
    assert run("--seed", "1") == "3 edited"


def test_an_interrupted_batch_is_finished_by_the_same_command(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 200 edits, those done before Ctrl-C stay as they are, and repeating the command makes the rest only."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(200):
        picture(number).save(photos / f"{number:03d}.png")
    arguments = ["--model", model, "--image", str(photos), "--prompt", "make it red", "--output", str(out), *STEPS]
    command = [sys.executable, "-m", "ip2p.infer", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    unmuted = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells mute it for what runs with `&`
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=unmuted) as process:
        while len(list(out.glob("*.png"))) < 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "the same command continues" in errors
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 8 <= len(done) < 200
    assert main(arguments) == 0
    assert f"{200 - len(done)} edited, {len(done)} already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(out.iterdir())) == 200


def test_bad_rows_are_named_and_the_batch_goes_on(
    model: str, editor: Editor, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken picture, a missing one and an empty prompt cost one line each, and nothing else."""
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    rows = [
        ("broken.png", "make it red"),
        ("a.png", " "),
        ("gone.png", "make it red"),
        ("", "x"),
        ("a.png", "make it red"),
    ]
    table = photos / "table.jsonl"
    table.write_text("".join(json.dumps({"image": image, "prompt": text}) + "\n" for image, text in rows))
    out = tmp_path / "out"
    assert main(["--model", model, "--table", str(table), "--output", str(out), *STEPS]) == 0
    written = capsys.readouterr()
    assert "1 edited, 4 skipped" in written.out
    skipped = [line for line in written.err.splitlines() if "skipped row" in line]
    assert len(skipped) == 4
    assert all(name in line for name, line in zip(["read", "prompt", "gone.png", "image"], skipped, strict=True))
    (only,) = out.iterdir()
    assert apart(Image.open(only), edit(editor, photos / "a.png", "make it red")[0]) == 0


def test_the_status_is_1_where_nothing_could_be_edited(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts can tell a run without any result from one with some."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = ["--model", model, "--image", str(tmp_path / "broken.png"), "--prompt", "make it red"]
    assert main([*arguments, "--output", str(tmp_path / "out.png")]) == 1
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --model"),
        ("--modle M", "unknown argument --modle: did you mean --model?"),
        ("--model {model} --prompt red --output o.png", "give either --image or --table"),
        ("--model {model} --image {a} --output o.png", "give --prompt"),
        ("--model {model} --image {a} --prompt red", "give --output"),
        ("--model {model} --image {a} --prompt red --output o.jpg", "a name that ends in .png"),
        ("--model {model} --image {a} --prompt red --output o --sheet s.jpg", "a name that ends in .png"),
        ("--model {model} --image {a} --prompt red --output {a}", "would overwrite the input"),
        ("--model {model} --image {photos} --prompt red --output {photos}", "would overwrite the input"),
        ("--model {model} --image {photos} --prompt red --output o.png", "one file for 3 inputs: give a folder"),
        ("--model {model} --image {photos}/*.gif --prompt red --output o", "no picture is there"),
        ("--model {model} --image {a} --prompt red --output o --batch_size 0", "start at 1"),
        ("--model {model} --image {a} --prompt red --output o --resolution 33", "resolution 33 is not a multiple"),
        ("--model {model} --image {a} --prompt red --output o --device abacus", "cannot be loaded: Expected one of"),
        ("--model {photos} --image {a} --prompt red --output o", "no file named model_index.json"),
        ("--model {a} --image {a} --prompt red --output o", "expected a folder as ip2p-train saves it"),
        ("--model {photos}/no/where --image {a} --prompt red --output o", "expected a folder as ip2p-train saves"),
        ("--model {base} --image {a} --prompt red --output o", "conv_in takes 4 channels, 8 expected; train one"),
        ("--model {hollow} --image {a} --prompt red --output o", "cannot be loaded: .*diffusion_pytorch_model"),
        ("--model {model} --table {photos}/notes.txt --output o", "expected .jsonl, .json, .csv, .parquet"),
        ("--model {model} --table {bad} --output o", "bad.jsonl cannot be read"),
        ("--model {model} --table {odd} --output o", "none is known among the columns input, output, words"),
        ("--model {model} --table {odd} --edit_prompt_column word --output o", "there are input, output, words"),
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
        places["hollow"] = tiny_pipeline(tmp_path / "hollow")
        (places["hollow"] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    capfd.readouterr()
    before = set(tmp_path.glob("*"))
    assert main([part.format(**places) for part in flags.split()]) == 2
    errors = capfd.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("ip2p-infer: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in errors
    assert set(tmp_path.glob("*")) - before <= {tmp_path / "hf"}


def test_a_config_stands_for_its_flags_and_later_ones_win(tmp_path: Path) -> None:
    """A YAML file is expanded where it stands; its values are read as the flags' text would be."""
    (tmp_path / "run.yaml").write_text(
        "model: M\nimage: [a.png, b.png]\nprompt: no\noutput: out\nseed: 3\nguidance_scale: 1e1\nresolution: null\n"
    )
    config = parse(["--seed", "1", f"--config={tmp_path / 'run.yaml'}", "--image", "c.png"])
    assert (config.model, config.prompt, config.seed, config.image) == ("M", "no", 3, ("c.png",))
    assert (config.guidance_scale, config.resolution) == (10.0, None)
    config = parse(["--config", str(tmp_path / "run.yaml"), "--seed", "1"])
    assert (config.seed, config.image) == (1, ("a.png", "b.png"))


def test_help_says_the_defaults_without_loading_torch() -> None:
    """`python -m ip2p.infer --help` answers at once: nothing heavy is imported for it."""
    code = "import runpy, sys\nsys.argv = ['ip2p-infer', '--help']\n"
    code += "try: runpy.run_module('ip2p.infer', run_name='__main__')\n"
    code += "finally: print(sorted({'torch', 'diffusers', 'transformers', 'datasets'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--image_guidance_scale" in result.stdout
    assert "diffusers' guide" in result.stdout
