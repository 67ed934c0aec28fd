"""`ip2p-infer evaluate`: from flags to scores, on tiny real models."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import pytest
from PIL import Image, ImageColor

import tiny
from ip2p.encode.base.console import bar
from ip2p.encode.base.flags import parse
from ip2p.encode.data.pictures import open_picture
from ip2p.encode.models.judge import Judge
from ip2p.infer.__main__ import main
from ip2p.infer.config import EvaluateConfig
from ip2p.infer.drawing import denoise
from ip2p.infer.score import evaluate as scoring
from ip2p.infer.score.curve import COLORS
from ip2p.infer.score.evaluate import CURVE
from ip2p.infer.score.metrics import Edit, measure
from test_scores import Judges, tiny_judges

CAPTIONS = ["a cat", "a house", "the sky", "a dog"], ["a red cat", "a green house", "the sky at night", "a snowy dog"]
Evaluate = Callable[..., int]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return tiny_judges(tmp_path_factory.mktemp("judges"))


def columns() -> dict[str, list]:
    """Four pairs with captions, named as in timbrooks/instructpix2pix-clip-filtered."""
    return tiny.pairs(4) | dict(zip(("original_prompt", "edited_prompt"), CAPTIONS, strict=True))


def held_out(folder: Path, rows: dict[str, list]) -> Path:
    """Write rows as the test split of a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: datasets.Image() for name in rows if "image" in name}
    texts = {name: datasets.Value("string") for name in rows if name not in images}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(images | texts))
    table.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scores"


@pytest.fixture
def evaluate(model: str, judges: Judges, tmp_path: Path, out: Path) -> Evaluate:
    """Run the command; `rows` are the dataset's columns, other keywords are flags."""

    def run(rows: dict[str, list] | None = None, **flags: object) -> int:
        data = held_out(tmp_path / "data", columns() if rows is None else rows)
        options = {"model": model, "dataset": data, "split": "test", "output": out, "num_inference_steps": 1}
        options |= {"clip_model": judges.clip, "dino_model": judges.dino}
        try:
            return main(["evaluate", *tiny.arguments(options | flags)])
        except SystemExit as stopped:
            return int(stopped.code or 0)

    return run


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["results"]


def records(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("*/*/scores.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def times(out: Path, pattern: str = "*/*/*.png") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(pattern)}


def settings_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as edited:
        return json.loads(edited.info["ip2p"])


def test_scores_are_those_of_the_stored_edits(
    evaluate: Evaluate, judges: Judges, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each pair is scored against its own target and captions; results.json and the table hold the means."""
    assert evaluate(batch_size=3) == 0
    rows = columns()
    edits = [
        Edit(original, open_picture(path), target, (before, after))
        for original, path, target, before, after in zip(
            rows["input_image"], sorted(out.glob("*/*/*.png")), rows["edited_image"], *CAPTIONS, strict=True
        )
    ]
    expected = measure(Judge(*judges), edits)
    found = records(out)
    assert [record["pair"] for record in found] == ["00000", "00001", "00002", "00003"]
    for record, scores in zip(found, expected, strict=True):
        assert {name: record[name] for name in scores} == pytest.approx(scores, abs=1e-5)
    (result,) = results(out)
    assert result["pairs"] == 4
    printed = capsys.readouterr().out
    for name in expected[0]:
        assert result[name] == pytest.approx(fmean(scores[name] for scores in expected), abs=1e-5)
        assert f"{result[name]:.4f}" in printed
    assert "left out" not in printed


@pytest.mark.parametrize(
    ("missing", "said", "there"),
    [
        (["original_prompt"], "CLIP direction; the dataset has no captions of the originals", "clip_t"),
        (["original_prompt", "edited_prompt"], "CLIP-T; the dataset has no captions of the edited", "dino"),
        (["edited_image"], "L1, L2, PSNR, CLIP-I, DINO; the dataset has no edited pictures", "clip_direction"),
    ],
)
def test_what_the_columns_do_not_allow_is_left_out_and_said(
    evaluate: Evaluate, out: Path, capsys: pytest.CaptureFixture[str], missing: list[str], said: str, there: str
) -> None:
    """Datasets without captions or without targets get the scores that they allow."""
    assert evaluate({name: column for name, column in columns().items() if name not in missing}) == 0
    printed = capsys.readouterr().out
    assert said in " ".join(line for line in printed.splitlines() if line.startswith("left out: "))
    (result,) = results(out)
    left_out = json.loads((out / "results.json").read_text())["left_out"]
    assert there in result
    assert left_out
    assert not left_out.keys() & result.keys()


def test_columns_of_any_name_are_taken_by_flag(evaluate: Evaluate, out: Path) -> None:
    """Every column can be named, and named columns give the scores of the usual ones."""
    assert evaluate() == 0
    (usual,) = results(out)
    odd = dict(zip(("p", "q", "r", "s", "t"), columns().values(), strict=True))
    odd = {f"{name}_image" if name in "pq" else name: column for name, column in odd.items()}
    flags = {"original_image_column": "p_image", "edited_image_column": "q_image", "edit_prompt_column": "r"}
    assert evaluate(odd, **flags, original_caption_column="s", edited_caption_column="t") == 0
    assert results(out) == [usual]


def test_a_second_run_keeps_edits_and_scores(
    evaluate: Evaluate, out: Path, judges: Judges, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what is new, torn, or made or judged otherwise is done again."""
    counts: list[int] = []
    monkeypatch.setattr(scoring, "measure", lambda judge, edits: counts.append(len(edits)) or measure(judge, edits))

    def scored(rows: dict[str, list] | None = None, **flags: object) -> int:
        counts.clear()
        assert evaluate(rows, **flags) == 0
        return sum(counts)

    assert scored() == 4
    edits, first = times(out), results(out)
    assert scored(batch_size=1, device="cpu") == 0
    assert results(out) == first
    (file,) = out.glob("*/*/scores.jsonl")
    file.write_bytes(file.read_bytes()[:-40])
    assert scored() == 1, "one line is torn"
    for name, value in first[0].items():
        assert results(out)[0][name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)
    assert len(records(out)) == 4
    rows = columns()
    rows["edited_image"][1] = tiny.picture(99)
    rows["edited_prompt"] = [*rows["edited_prompt"][:3], "another caption"]
    assert scored(rows) == 2, "one target and one caption have changed"
    assert scored(rows, published_clip_range=True) == 4
    others = shutil.copytree(Path(judges.clip).parent, tmp_path / "judges")
    assert scored(rows, published_clip_range=True, dino_model=others / "dino") == 4
    os.utime(others / "dino" / "model.safetensors")
    assert scored(rows, published_clip_range=True, dino_model=others / "dino") == 4, "other weights, perhaps"
    assert scored(rows, published_clip_range=True, split="test[:1]") == 1
    assert scored(rows, published_clip_range=True, dino_model=others / "dino") == 1, "the other rows' scores are kept"
    assert times(out) == edits, "no picture was edited again"
    assert scored(rows, seed=1) == 4
    assert all(times(out)[path] != edits[path] for path in edits)


def test_an_interrupted_evaluation_is_finished_by_the_same_command(
    evaluate: Evaluate, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while scoring loses at most the batch in hand."""
    sizes: list[int] = []

    def stop_at_the_third(judge: Judge, edits: list[Edit]) -> list[dict[str, float]]:
        sizes.append(len(edits))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return measure(judge, edits)

    monkeypatch.setattr(scoring, "measure", stop_at_the_third)
    assert evaluate(batch_size=1) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [record["pair"] for record in records(out)] == ["00000", "00001"]
    edits = times(out)
    assert evaluate(batch_size=1) == 0
    assert sizes == [1] * 5, "two before, one lost, two left"
    assert results(out)[0]["pairs"] == 4
    assert times(out) == edits


def test_every_setting_of_an_edit_reaches_it(evaluate: Evaluate, out: Path) -> None:
    """The flags that evaluation shares with editing are in force, as each picture's own record says."""
    settings = {"seed": 2, "num_inference_steps": 2, "image_guidance_scale": 0.5, "guidance_scale": 3.0}
    settings |= {
        "guidance_rescale": 0.5,
        "guidance_interval": [0.0, 0.5],
        "negative_prompt": "night",
        "resolution": 32,
        "scheduler": "DPMSolverMultistep",
        "dtype": "bfloat16",
    }
    assert evaluate(**settings, split="test[:1]") == 0
    (picture,) = out.glob("*/image_0.5_text_3/00000.png")
    assert settings_of(picture).items() >= settings.items()
    (result,) = results(out)
    assert (result["image_guidance_scale"], result["pairs"]) == (0.5, 1)
    assert (result["num_inference_steps"], result["guidance_scale"]) == (2, 3)


def test_bad_pairs_are_reported_once_and_left_out(
    evaluate: Evaluate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken or missing picture, an empty prompt and an empty caption cost a line each, at however many scales."""
    rows = {name: column + column[:3] for name, column in columns().items()}
    broken = {"bytes": b"no picture", "path": None}
    rows["input_image"][0] = broken
    rows["edited_image"][1] = broken
    rows["edited_image"][2] = None
    rows["edit_prompt"][4] = ""
    rows["edited_prompt"][5] = " "
    rows["original_prompt"][6] = None
    assert evaluate(rows, curve=True) == 0
    errors = capsys.readouterr().err
    skipped = sorted(line.partition("skipped ")[2] for line in errors.splitlines() if "skipped " in line)
    reasons = ["decoded", "decoded", "no picture in column edited_image", "prompt is empty", "caption is", "caption is"]
    rows_in_order = [0, 1, 2, 4, 5, 6]
    assert len(skipped) == len(reasons)
    for line, row, reason in zip(skipped, rows_in_order, reasons, strict=True):
        assert line.startswith(f"row {row}: ")
        assert reason in line
    assert {result["pairs"] for result in results(out)} == {1}


def test_the_status_is_1_where_nothing_could_be_scored(
    evaluate: Evaluate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts can tell an evaluation without any result from one with some."""
    assert evaluate(columns() | {"edit_prompt": [""] * 4}) == 1
    assert "no pair could be scored" in capsys.readouterr().err
    assert not (out / "results.json").exists()


def test_the_curve_compares_models_over_the_papers_scales(
    evaluate: Evaluate, model: str, out: Path, tmp_path: Path
) -> None:
    """Two models in one plot, each scored at seven image guidances and one text guidance."""
    other = tiny.pipeline(tmp_path / "other")
    assert evaluate(model=(model, other), split="test[:2]", curve=True) == 0
    found = [(result["model"], result["image_guidance_scale"]) for result in results(out)]
    assert found == [(name, scale) for name in (model, str(other)) for scale in CURVE]
    assert CURVE == (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    with Image.open(out / "curve.png") as plot:
        colors = {color for _, color in plot.convert("RGB").getcolors(1 << 20) or ()}
    assert {ImageColor.getrgb(color) for color in COLORS[:2]} <= colors
    assert not {ImageColor.getrgb(color) for color in COLORS[2:6]} & colors
    settings = [settings_of(path) for path in out.glob("*/*/00000.png")]
    assert {setting["guidance_scale"] for setting in settings} == {7.5}
    assert {setting["image_guidance_scale"] for setting in settings} == set(CURVE)


def test_what_the_scales_of_a_curve_share_is_computed_once(
    evaluate: Evaluate, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures and texts that are edited, and those that CLIP and DINO see; one bar counts the edits of all scales."""
    encoded, seen, bars = list[int](), list[int](), dict[str, int]()
    encode, see = denoise.encode, Judge.see
    monkeypatch.setattr(denoise, "encode", lambda *given: encoded.append(len(given[1])) or encode(*given))
    monkeypatch.setattr(Judge, "see", lambda self, pictures: seen.append(len(pictures)) or see(self, pictures))

    def counted(items: Any, what: str, unit: str, total: int) -> Any:
        bars[what] = max(total, bars.get(what, 0))
        return bar(items, what, unit, total=total)

    monkeypatch.setattr(scoring, "bar", counted)
    assert evaluate(curve=True, batch_size=3) == 0
    assert encoded == [3, 1]
    assert sum(seen) <= 4 + 4 + 7 * 4, "originals, targets, edits"
    assert bars == {"editing": 7 * 4, "scoring": 4}
    assert len(results(out)) == 7


def test_defaults_are_the_papers() -> None:
    """100 steps, image guidance 1.5 and text guidance 7.5; flags and files of flags change them."""
    config = parse(EvaluateConfig, "--model A B --dataset D --output O".split(), "ip2p-infer evaluate")
    editing = config.editing
    assert (editing.num_inference_steps, editing.image_guidance_scale, editing.guidance_scale) == (100, 1.5, 7.5)
    assert config.model == ("A", "B")
    run = config.infer("B", 1.2, Path("O"))
    assert (run.model, run.inputs.table) == ("B", "D")
    assert (run.editing.num_inference_steps, run.editing.image_guidance_scale) == (100, 1.2)


def test_a_config_stands_for_the_flags_of_an_evaluation(tmp_path: Path) -> None:
    """Lists, switches and texts of a YAML file are read as the flags' text would be."""
    (tmp_path / "run.yaml").write_text(
        "model: [A, B]\ndataset: D\noutput: O\ncurve: true\npublished_clip_range: false\n"
    )
    config = parse(EvaluateConfig, ["--config", str(tmp_path / "run.yaml"), "--seed", "3"], "ip2p-infer evaluate")
    assert (config.model, config.editing.seed) == (("A", "B"), 3)
    assert (config.scoring.curve, config.scoring.published_clip_range) == (True, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": ()}, "give --model"),
        ({"dataset": None}, "give --dataset"),
        ({"output": None}, "give --output"),
        ({"sead": 1}, "unknown flag --sead; did you mean --seed?"),
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"model": ("{model}", "{base}")}, "conv_in takes 4 channels, 8 expected"),
        ({"model": ("{model}", "/nowhere")}, "/nowhere is no model: expected a folder as ip2p-train saves it"),
        ({"clip_model": "/nowhere"}, "--clip_model /nowhere is no model"),
        ({"dino_model": "{model}"}, "--dino_model {model} cannot be loaded"),
        ({"edited_caption_column": "words"}, "no column words; it has"),
        ({"split": "train"}, "cannot be opened"),
    ],
)
def test_wrong_use_is_answered_in_one_line_before_anything_is_edited(
    evaluate: Evaluate,
    model: str,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    message: str,
) -> None:
    """A wrong model among several is found before hours are spent on the first."""
    places = {"model": model, "base": tmp_path / "base"}
    if "{base}" in str(flags):
        tiny.checkpoint(tmp_path / "base")

    def fill(value: Any) -> Any:
        return tuple(map(fill, value)) if isinstance(value, tuple) else value and str(value).format(**places)

    assert evaluate(**{name: fill(value) for name, value in flags.items()}) == 2
    errors = capsys.readouterr().err
    (line,) = (line for line in errors.splitlines() if line.startswith("ip2p-infer: "))
    assert message.format(**places) in line
    assert not list(out.glob("**/*.png"))


def test_the_curve_needs_captions(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    """Direction is measured between captions; without them the command says which flags name them."""
    assert evaluate(tiny.pairs(2), curve=True) == 2
    errors = capsys.readouterr().err
    assert "--curve needs captions of the edited pictures (--edited_caption_column) and captions of the" in errors


def test_help_lists_the_scores_without_loading_torch() -> None:
    """`ip2p-infer evaluate --help` answers at once: nothing heavy is imported for it."""
    code = "import runpy, sys\nsys.argv = ['ip2p-infer', 'evaluate', '--help']\n"
    code += "try: runpy.run_module('ip2p.infer', run_name='__main__')\n"
    code += "finally: print(sorted({'torch', 'diffusers', 'transformers', 'datasets'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--published_clip_range" in result.stdout
