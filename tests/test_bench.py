"""Tests of the benchmarks: their shapes are the real ones, they run, and what the documents say comes from results."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ip2p.encode.keeper.verify import verify
from ip2p.train.watch.metrics import peak

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
arithmetic, common, scaling, shapes, summary, synthetic = map(
    importlib.import_module, ("arithmetic", "common", "scaling", "shapes", "summary", "synthetic")
)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run a benchmark; returns the last line that it leaves, with the rows of all of them."""

    def run(name: str, words: str = "", *more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *words.split(), *more, "--results", str(tmp_path)])
        importlib.import_module(name).main()
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        return lines[-1] | {"rows": {what: row for line in lines for what, row in line["rows"].items()}}

    return run


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "unet", "texts"),
    [("sd15", 859_520_964, [123_060_480]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])],
)
def test_the_real_shapes_have_the_published_numbers_of_parameters(size: str, unet: int, texts: list[int]) -> None:
    """What is measured under a model's name is that model, to the last parameter."""
    shape = shapes.SIZES[size]
    with torch.device("meta"):
        assert parameters(shapes.make_unet(shape, in_channels=4)) == unet
        assert parameters(shapes.make_vae(shape)) == 83_653_863
        assert [parameters(encoder) for encoder in shapes.make_text_encoders(shape)] == texts


def test_arithmetic_of_a_convolution_and_of_attention_is_counted() -> None:
    """Two operations for each multiplication: a 3 x 3 convolution, and both products of fused attention."""
    with torch.device("meta"):
        conv, image, heads = torch.nn.Conv2d(2, 5, 3, padding=1), torch.empty(1, 2, 8, 8), torch.empty(1, 3, 16, 4)
    assert arithmetic.count(lambda: conv(image)) * 1e12 == pytest.approx(2 * 64 * 5 * 2 * 9)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert arithmetic.count(lambda: attention(heads, heads, heads)) * 1e12 == pytest.approx(2 * 2 * 3 * 16 * 16 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "tinyxl"])
def test_step_measures_all_kinds_beside_their_arithmetic(bench: Bench, size: str) -> None:
    """Bare, cached and online run on SD and SDXL, and online costs more arithmetic than cached."""
    rows = bench("step", f"--size {size} --resolution 64 --batch_size 2 --rounds 1 --steps 1")["rows"]
    assert all(rows[kind]["value"] > 0 for kind in ("bare", "cached", "online", "online, VAE in channels_last"))
    assert rows["time of cached / bare"]["at_most"] == 1.05
    assert rows["the same by arithmetic"]["value"] > 1


def test_unet_measures_each_variant_against_the_step_as_it_is(bench: Bench) -> None:
    """Every variant that is asked for, and no other, gets a rate of its own and a ratio."""
    names = ["contiguous", "bf16 weights, float32 masters", "four times the batch", "as diffusers' script"]
    rows = bench("unet", "--size tiny --resolution 64 --batch_size 1 --rounds 1 --steps 1 --only", *names)["rows"]
    assert [name for name in rows if name in names] == names
    assert all(rows[f"{name}, rate / as it is"]["value"] > 0 for name in names)


def test_encode_measures_the_command_against_its_encoders(bench: Bench) -> None:
    """The pipeline encodes every pair, and the encoders take a part of its time, not more than all."""
    words = "--size tiny --resolution 64 --batch_size 4 --pairs 6 --pixels 64 --workers 0 --rounds 2"
    rows = bench("encode", words)["rows"]
    assert 0 < rows["share of wall time in the encoders"]["value"] <= 1
    assert rows["processes that decode"]["value"] == 0
    assert rows["ip2p-encode"]["value"] > 0


@pytest.mark.slow
def test_infer_measures_editor_against_diffusers(bench: Bench) -> None:
    """At each pair of scales, and with an interval as far as there are steps outside it."""
    rows = bench("infer", "--size tiny --resolution 64 --batch_size 2 --steps 10 --rounds 1")["rows"]
    assert rows["the same by passes"]["value"] == pytest.approx(3 * 10 / (3 * 6 + 4))
    assert rows["Editor / diffusers, equal scales"]["value"] == pytest.approx(
        rows["Editor, equal scales"]["value"] / rows["diffusers, equal scales"]["value"]
    )


@pytest.mark.slow  # four runs of ip2p-train as processes
def test_whole_runs_are_measured_to_their_first_step_and_between_two_numbers_of_steps(bench: Bench) -> None:
    """The command itself trains on synthetic caches, small and large, and each measurement gives its figures."""
    model = "--size tiny --resolution 64 --batch_size 2 --rounds 1"
    rows = bench("start", f"{model} --samples 3000")["rows"]
    assert rows["command to first step"]["value"] > rows["loading the UNet"]["value"] > 0
    assert rows["peak memory"]["value"] > 0
    rows = bench("train", f"{model} --first 1 --more 40")["rows"]
    assert rows["ip2p-train / bare"]["at_least"] == 0.95
    assert rows["a scored edit while it trains, as training"]["value"] > 1


def test_a_cache_of_repeated_shards_is_a_sound_one(tmp_path: Path) -> None:
    """The synthetic cache for training passes `ip2p-cache verify`, though most of its shards are one file."""
    model = shapes.save(shapes.TINY, tmp_path / "model", shapes.make_unet(shapes.TINY, in_channels=4))
    cache = synthetic.build(tmp_path / "cache", 3500, shapes.TINY.rows(64), model)
    assert verify(cache.folder) == []
    shards = [path for path in (cache.folder / "data.zarr" / "edited" / "c").rglob("*") if path.is_file()]
    assert len(shards) == 4
    assert len({path.stat().st_ino for path in shards}) == 2


def test_communication_is_waited_for_only_where_the_backward_pass_is_shorter() -> None:
    """Summing that fits beside the backward pass costs its last bucket alone; ten batches' worth costs what is left."""
    args = scaling.argparse.Namespace(size="sd15", batch_size=64, samples_per_second=640)
    bucket = scaling.BUCKET / scaling.gradient_bytes(shapes.SIZES["sd15"])
    assert scaling.efficiency(args, 0.05, 1) == pytest.approx(0.1 / (0.1 + 0.05 * bucket))
    assert scaling.efficiency(args, 1.0, 1) == pytest.approx(0.1 / (0.1 + 1 - 0.2 / 3))
    assert scaling.efficiency(args, 1.0, 4) == pytest.approx(0.4 / (0.4 + 1 - 0.2 / 3))


def test_summing_gradients_follows_the_formula_of_rings() -> None:
    """2 (n - 1) / n times the gradients over the bandwidth, first inside a machine and then between machines."""
    args = scaling.argparse.Namespace(size="sd15", per_machine=8, inside=400.0)
    size = scaling.gradient_bytes(shapes.SIZES["sd15"]) / 1e9
    assert scaling.seconds(args, 8, 100.0) == pytest.approx(size * 2 * 7 / 8 / 400)
    assert scaling.seconds(args, 64, 100.0) == pytest.approx(size * 2 * 7 / 8 * (1 / 400 + 1 / 100))


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA Unknown", None)]
)
def test_the_peak_is_that_of_the_very_gpu(name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variants of a GPU have peaks of their own, and of a GPU that is not listed none is made up."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "holds"), [(1, None, None, None), (1, 1, None, True), (0.9, 1, 2, False), (3, 1, 2, False)]
)
def test_a_bar_holds_where_the_figure_reaches_it(value: float, low: Any, high: Any, holds: bool | None) -> None:
    """At least the lower bar and at most the upper one; without a bar there is nothing to hold."""
    assert common.Row("what", value, "s", low, high).holds is holds


def test_a_line_of_results_says_when_where_and_with_what_it_was_measured(bench: Bench) -> None:
    """Date, commit, machine, versions and settings are beside the figures."""
    line = bench("scaling", "--gpus 8")
    assert line.keys() == {"date", "commit", "machine", "versions", "settings", "rows"}
    assert line["settings"]["gpus"] == [8]
    assert {"cpu", "cores", "load", "gpu"} <= line["machine"].keys()


def test_neither_git_nor_a_package_that_is_missing_stops_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the commit or a version cannot be told, the line says so, and is written."""
    look = common.commit.__wrapped__  # once for each process, otherwise
    assert look() or not Path(__file__).parents[1].joinpath(".git").exists()
    monkeypatch.setenv("PATH", "")
    assert look() is None
    monkeypatch.setattr(common, "PACKAGES", ("torch", "no-such-package"))
    assert common.versions().keys() == {"python", "torch", "no-such-package"}
    assert common.versions()["no-such-package"] is None


def test_results_are_written_from_clean_trees_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from the commit is found before anything is measured; results and pages that show them may."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    results, flags = tmp_path / "bench" / "results", common.parser("")
    for name in ("bench/results/speed.jsonl", "docs/performance.md", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(common, "commit", common.commit.__wrapped__)
    with pytest.raises(SystemExit):  # no repository
        flags.parse_args(["--results", str(results)])
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "all")
    for name in ("bench/results/speed.jsonl", "docs/performance.md"):
        (tmp_path / name).write_text("more")
    assert flags.parse_args(["--results", str(results)]).results == results
    (tmp_path / "code.py").write_text("more")
    with pytest.raises(SystemExit):
        flags.parse_args(["--results", str(results)])
    assert common.commit().endswith("-dirty")
    assert flags.parse_args(["--results", str(tmp_path)]).results == tmp_path


def test_a_table_is_that_of_the_newest_line(tmp_path: Path) -> None:
    """The last line counts, with earlier ones alike but for what they leave out; only the rows asked for are shown."""
    machine = {"gpu": None, "cores": 2, "cpu": "Chip", "load": 0.5}
    for size, only, rows in (
        ("old", "", {"fast": 1}),
        ("new", "a", {"fast": 2, "other": 3}),
        ("new", "b", {"faster": 1.5}),
    ):
        found = {what: common.Row.of(what, [9, value, 0.1], "s", at_most=2)._asdict() for what, value in rows.items()}
        settings = {"rounds": 3, "size": size, "only": only}
        line = {"date": "2026-01-02T03", "commit": "abc", "machine": machine, "settings": settings, "rows": found}
        with (tmp_path / "speed.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    page = summary.filled("before\n<!-- speed: ^fast -->\nold\n<!-- end -->\nafter", tmp_path)
    assert page.splitlines() == [
        "before",
        "<!-- speed: ^fast -->",
        "",
        "| 2 cores of Chip, 2026-01-02, commit abc, load 0.5 (`bench/results/speed.jsonl`) |  | bar |",
        "| --- | --- | --- |",
        "| fast | 2 s (0.1 to 9) | <= 2 |",
        "| faster | 1.5 s (0.1 to 9) | <= 2 |",
        "",
        "<!-- end -->",
        "after",
    ]
    assert summary.filled(page, tmp_path) == page


def test_rows_become_columns_by_what_a_pattern_names(tmp_path: Path) -> None:
    """The part of a name that the group `column` takes heads a column; what is left names the row."""
    rows = {"a: step": 1, "a: card": 4, "b: step": 2, "c": 3}
    found = {what: common.Row(what, value, "s", at_most=8)._asdict() for what, value in rows.items()}
    line = {"date": "2026-01-02T03", "commit": "abc", "machine": {}, "settings": {}, "rows": found}
    (tmp_path / "speed.jsonl").write_text(json.dumps(line))
    page = summary.filled("<!-- speed: : (?P<column>step|card)$ -->\n<!-- end -->", tmp_path)
    assert page.splitlines()[2:6] == [
        "| On paper, 2026-01-02, commit abc (`bench/results/speed.jsonl`) | step | card | bar |",
        "| --- | --- | --- | --- |",
        "| a | 1 s | 4 s | <= 8 |",
        "| b | 2 s |  | <= 8 |",
    ]


@pytest.mark.parametrize("path", summary.PAGES, ids=lambda path: path.name)
def test_the_tables_of_the_page_are_those_of_the_results(path: Path) -> None:
    """The page shows what the newest results say: `python bench/summary.py` brings it up to date."""
    page = path.read_text()
    assert summary.filled(page, common.RESULTS) == page
    assert "Not measured yet" not in page


def test_what_the_tables_show_was_measured_in_clean_trees() -> None:
    """Whoever checks out the commit that a table names can measure it again."""
    heads = [
        re.findall(r"commit ([^(]*?)(?:, load [\d.]+)? \(`bench/results/(\w+)", page.read_text())
        for page in summary.PAGES
    ]
    shown = {name: commits for head in heads for commits, name in head}
    assert len(shown) > 10
    assert [name for name, commits in shown.items() if "dirty" in commits] == [
        "gpu"
    ]  # with files of half an hour later


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_results_file_that_is_named_is_there(path: Path) -> None:
    """A figure in a document names a file that can be looked into."""
    for name in re.findall(r"bench/results/[\w.]+\w", path.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", summary.PAGES, ids=lambda path: path.name)
def test_every_paragraph_with_a_measured_figure_names_its_results(path: Path) -> None:
    """On both pages no rate, time or size of a run stands without the file that it comes from."""
    figure = re.compile(r"\d\s*(samples/s|pairs/s|TFLOP|GiB|ms\b|s\b)")
    for paragraph in path.read_text().split("\n\n"):
        assert not figure.search(paragraph) or "bench/results/" in paragraph, paragraph
