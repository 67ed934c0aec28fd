"""`ip2p-infer` over folders and tables: every input is edited once, and a second run continues."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import parse
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from ip2p.infer.config import InferConfig
from ip2p.infer.jobs import find_jobs
from ip2p.infer.outputs import output_paths
from ip2p.infer.score.metrics import psnr
from test_infer import apart, picture
from test_infer_command import STEPS, edit


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


def test_what_a_model_does_not_read_of_a_prompt_is_said(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text encoder reads 77 tokens, of which two are marks: the rest is shown once, by an example."""
    prompt = " ".join(["make it red"] * 25 + ["and snowy"])
    arguments = ["--model", model, "--image", str(photos), *STEPS, "--prompt"]
    assert main([*arguments, prompt, "--output", str(tmp_path / "long")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "longer" in line]
    assert said == [f"3 prompts are longer than the model reads; not read of {photos / 'a.png'}: and snowy"]
    assert main([*arguments, "make it red", "--output", str(tmp_path / "short")]) == 0
    assert "longer" not in capsys.readouterr().err


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
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "several splits: choose one of train, test with --split" in capsys.readouterr().err
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


@pytest.mark.slow
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
    assert all(name in line for name, line in zip(["decoded", "prompt", "gone.png", "image"], skipped, strict=True))
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


def test_a_photo_with_broken_exif_and_names_that_are_too_long_are_edited_like_others(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of outputs are shortened where they must be, each in its own way and the same each time."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    tiny.picture(0, (16, 12)).save(photos / "a.jpg", exif=b"Exif\0\0junkjunk")
    names = ["貓" * 80 + end for end in "狗馬鳥"]  # of 243 bytes
    for number, name in enumerate([*names, "貓" * 74], 1):
        tiny.picture(number, (16, 12)).save(photos / f"{name}.jpg", exif=b"Exif\0\0junkjunk")
    arguments = ["--model", model, "--image", str(photos), "--prompt", "make it red", "--output", str(out), *STEPS]
    assert main(arguments) == 0
    made = {path.stem for path in out.iterdir()}
    assert len(made) == 5
    assert {"a", "貓" * 74} < made
    assert sum(stem.startswith("貓" * 71 + "-") for stem in made) == 3
    capsys.readouterr()
    assert main([*arguments, "--num_images", "1"]) == 0
    assert "5 already there" in capsys.readouterr().out
    assert main([*arguments, "--num_images", "11"]) == 0


def test_a_name_that_no_file_can_have_names_no_output(model: str, tmp_path: Path) -> None:
    """The path that came with a picture in a table may be anything."""
    names = ["a\0b.png", "x/" + "y" * 5000, "..", ""]
    picture = tmp_path / "p.png"
    tiny.picture(0, (16, 12)).save(picture)
    files = [{"bytes": picture.read_bytes(), "path": name} for name in names]
    columns = {"input_image": files, "edit_prompt": [f"make it {word}" for word in tiny.WORDS[2:6]]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = tmp_path / "out"
    assert main(["--model", model, "--table", str(tmp_path / "t.parquet"), "--output", str(out), *STEPS]) == 0
    assert len(list(out.iterdir())) == 4


@pytest.mark.parametrize("prompt", [5, ["make it red", 3], [3], {"a": 1}, None])
def test_a_prompt_that_is_no_text_costs_its_row_alone(
    prompt: object, model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is skipped with the reason, as it stands aside while encoding."""
    rows = [{"image": "photos/a.png", "prompt": "make it red"}, {"image": "photos/b.png", "prompt": prompt}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert main(["--model", model, "--table", str(tmp_path / "t.jsonl"), "--output", str(out), *STEPS]) == 0
    written = capsys.readouterr()
    if prompt == ["make it red", 3]:
        assert "2 edited" in written.out
    else:
        assert "1 edited, 1 skipped" in written.out
        assert "skipped row 1: the prompt is" in written.err


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--image {jpgs} --output {jpgs}", "lies among the inputs"),
        ("--image {jpgs}/a.jpg --output {jpgs}", None),
        ("--image {jpgs} --output {jpgs}/out", None),
        ("--image {jpgs} --output {jpgs}/../jpgs/x/../", "lies among the inputs"),
        ("--image {jpgs}/*.jpg --output {jpgs}", None),
        ("--image {jpgs}/* --output {jpgs}", "lies among the inputs"),
        ("--image {jpgs}/* --output {jpgs}/out", None),
        ("--image {jpgs}/**/* --output {jpgs}/out", "lies among the inputs"),
        ("--image {jpgs}/**/*.jpg --output {jpgs}/out", None),
        ("--image {jpgs} --output out --sheet {jpgs}/sheet.png", "--sheet .* lies among the inputs"),
    ],
)
def test_outputs_do_not_become_inputs(flags: str, refused: str | None, tmp_path: Path) -> None:
    """What the next run would take for an input is not written there; neither is anything below a file."""
    (tmp_path / "jpgs" / "x").mkdir(parents=True)
    tiny.picture(0, (16, 12)).save(tmp_path / "jpgs" / "a.jpg")
    arguments = ["--model", "m", "--prompt", "make it red", *flags.format(jpgs=tmp_path / "jpgs").split()]
    config = parse(InferConfig, arguments, "ip2p-infer")
    if refused:
        with pytest.raises(SettingsError, match=refused):
            output_paths(config, find_jobs(config))
    else:
        assert len(output_paths(config, find_jobs(config))) == 1


def test_outputs_do_not_lie_where_a_table_is_searched(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of Parquet files would become one of pictures."""
    table = tiny.dataset(tmp_path / "set", tiny.pairs(1))
    with pytest.raises(SystemExit, match="2"):
        main(["--model", model, "--table", str(table), "--output", str(table / "out")])
    assert f"--output {table / 'out'} lies in the folder of the dataset" in capsys.readouterr().err


def test_names_in_another_encoding_stop_nothing(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of bytes that are not UTF-8 is edited as any other, and so are those after it."""
    odd = os.fsencode(photos) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write((photos / "a.png").read_bytes())
    main(["--model", model, "--image", str(photos), "--prompt", "red", "--output", str(tmp_path / "out"), *STEPS])
    assert "4 edited" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 4
