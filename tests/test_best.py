"""Tests of train/watch/score.py and train/save/best.py: a run is scored while it trains, and its best pipeline kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from configs import train_config
from ip2p.encode.base.errors import TrainError
from ip2p.encode.cache.format import Cache
from ip2p.encode.cached import Samples
from ip2p.encode.data.columns import AFTER, BEFORE
from ip2p.infer.__main__ import main as infer
from ip2p.infer.score.metrics import Edit, measure
from ip2p.train.__main__ import main
from ip2p.train.save import best
from ip2p.train.save.best import BEST, FORMER, LOWEST, UNFINISHED, go_back, keep, read
from ip2p.train.save.checkpoint import AVERAGE
from ip2p.train.watch import score
from ip2p.train.watch.metrics import Metrics
from ip2p.train.watch.score import find_captions
from ip2p.train.watch.validate import Validation
from test_evaluate import held_out, results
from test_scores import Judges, tiny_judges
from test_train import assert_same, flags, states, unet_file

SCORED = {"num_validation_samples": 3, "validation_steps": 2, "num_validation_images": 1, "score_samples": 2}
BESIDE = {"max_train_steps": 4, "checkpointing_steps": 2}
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 10.0, "image_guidance_scale": 1.5}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return tiny_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def captioned(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., None]) -> Path:
    """A cache of ten pairs that kept captions, those of the edits under the second of their usual names."""
    folder = tmp_path_factory.mktemp("captioned")
    texts = {"original_prompt": [f"a cat {n}" for n in range(10)], "edited_caption": [f"a dog {n}" for n in range(10)]}
    encode(sd, tiny.dataset(folder / "data", tiny.pairs(10) | texts), folder / "cache", keep_columns=list(texts))
    return folder / "cache"


class Seen(list[Edit]):
    """What a run has scored, one edit after the other."""

    def __call__(self, judge: Any, edits: list[Edit]) -> Any:
        self.extend(edits)
        return measure(judge, edits)


@pytest.fixture(scope="module")
def scored(sd: Path, captioned: Path, judges: Judges, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run of 4 steps with scores every 2, and what was scored."""
    output, seen = tmp_path_factory.mktemp("runs") / "scored", Seen()
    watched = SCORED | {"clip_model": judges.clip, "report_to": "tensorboard", "keep_best": "psnr"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "measure", seen)
        main(flags(sd, captioned, output, **BESIDE, **watched))
    return output, seen


def metrics(output: Path, name: str = "validation_psnr") -> dict[int, dict[str, float]]:
    """The lines of metrics.jsonl that have a score, by step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if name in line}


def test_weights_with_and_without_scores_are_equal_bit_for_bit(
    sd: Path, captioned: Path, scored: tuple[Path, Seen], tmp_path: Path
) -> None:
    """Nor does the best pipeline touch the run that it is saved in the midst of."""
    main(flags(sd, captioned, tmp_path, **BESIDE, num_validation_samples=3, validation_steps=10**6))
    assert_same(states(tmp_path / "checkpoint-4"), states(scored[0] / "checkpoint-4"))
    assert_same(load_file(unet_file(tmp_path)), load_file(unet_file(scored[0])))


def test_scores_are_those_of_evaluate(
    scored: tuple[Path, Seen], captioned: Path, judges: Judges, tmp_path: Path
) -> None:
    """Of the same decoded pictures with the same settings: the pipeline that comes out has those of the last step."""
    output, seen = scored
    assert len(seen) == 2 * 2 * 2  # validations, kinds of weights, pairs
    for edit, other in zip(seen[:2], seen[-2:], strict=True):  # the same pairs each time
        assert edit.original.tobytes() == other.original.tobytes()
        assert edit.captions == other.captions
    samples = Samples.of(Cache.open(captioned), None)
    prompts = dict(zip(samples.values([Cache.open(captioned)], "original_prompt"), samples.rows, strict=True))
    instructions = samples.instructions([Cache.open(captioned)])
    last = seen[-2:]
    rows = {
        "input_image": [edit.original for edit in last],
        "edited_image": [edit.target for edit in last],
        "edit_prompt": [instructions[list(prompts).index(edit.captions[0])] for edit in last],
        "original_prompt": [edit.captions[0] for edit in last],
        "edited_prompt": [edit.captions[1] for edit in last],
    }
    options = {"model": output, "dataset": held_out(tmp_path / "data", rows), "split": "test", "output": tmp_path / "s"}
    options |= {"clip_model": judges.clip, "dino_model": judges.dino}
    assert infer(["evaluate", *tiny.arguments(options | SETTINGS)]) == 0
    (found,) = results(tmp_path / "s")
    line = metrics(output)[4]
    for name in ("l1", "l2", "psnr", "clip_i", "clip_t", "clip_direction", "clip_image"):
        # A pixel may round otherwise in a batch, which moves PSNR in dB by 1e-5.
        assert line[f"ema_validation_{name}"] == pytest.approx(found[name], abs=1e-4), name
        assert line[f"validation_{name}"] != line[f"ema_validation_{name}"]
    assert not [name for name in line if "dino" in name]


def test_scores_are_told_beside_the_losses_with_what_they_cost(scored: tuple[Path, Seen]) -> None:
    """In metrics.jsonl, in the tracker and on the card."""
    output, _ = scored
    lines = metrics(output, "validation_loss")
    assert list(lines) == [2, 4]
    assert all(line["scoring_seconds"] > 0 for line in lines.values())
    (events,) = {path.parent for path in (output / "logs").rglob("events*") if path.parent.name == "ip2p"}
    tracker = EventAccumulator(str(events)).Reload()
    for name in ("validation_psnr", "ema_validation_clip_direction", "scoring_seconds"):
        told = {event.step: event.value for event in tracker.Scalars(name)}
        assert told == pytest.approx({step: line[name] for step, line in lines.items()}, rel=1e-6)
    assert f"| ema_validation_psnr | {lines[4]['ema_validation_psnr']:.4f} |" in (output / "README.md").read_text()


def holds_the_best(folder: Path, scores: dict[int, float], score: str = "psnr", prefix: str = "ema_") -> None:
    """Check that a folder's best pipeline is the one with the best of these scores, by what best.json says."""
    step = (min if score in LOWEST else max)(scores, key=scores.__getitem__)
    assert read(folder / BEST) == {"step": step, "score": f"{prefix}validation_{score}", "value": scores[step]}
    assert not (folder / UNFINISHED).exists()
    assert not (folder / FORMER).exists()


def test_the_best_pipeline_is_kept_and_each_checkpoint_has_that_of_its_own_time(scored: tuple[Path, Seen]) -> None:
    """By links, so that it takes the room of one; its UNet is the average of the checkpoint of that step."""
    output, _ = scored
    values = {step: line["ema_validation_psnr"] for step, line in metrics(output).items()}
    holds_the_best(output, values)
    holds_the_best(output / "checkpoint-4", values)
    holds_the_best(output / "checkpoint-2", {2: values[2]})
    step = read(output / BEST)["step"]
    means = torch.load(output / f"checkpoint-{step}" / AVERAGE)["shadow_params"]
    weights = load_file(unet_file(output / BEST))
    assert all(
        torch.equal(weights[name], mean) for (name, _), mean in zip(tiny.unet(8).named_parameters(), means, strict=True)
    )
    assert unet_file(output / BEST).samefile(unet_file(output / "checkpoint-4" / BEST))
    for part in ("unet/config.json", "model_index.json"):
        assert json.loads((output / BEST / part).read_text()) == json.loads((output / part).read_text())


@pytest.mark.parametrize("changed", [{"lora_rank": 2}, {"weights": "bf16"}], ids=["adapters", "bf16 weights"])
def test_a_best_pipeline_of_the_last_step_is_the_pipeline_of_the_run(
    sd: Path, cache: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    """Adapters, which are fused into what is saved, train on all the same; without an average the weights count."""
    if "lora_rank" in changed:
        pytest.importorskip("peft")
    looked_at = {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 1, "keep_best": "loss"}
    step = iter(range(9, 0, -1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "run", lambda *_: {"validation_loss": next(step)})
        main(flags(sd, cache, tmp_path, max_train_steps=3, use_ema=False, **looked_at, **changed))
    assert read(tmp_path / BEST) == {"step": 3, "score": "validation_loss", "value": 7}
    names = {path.relative_to(tmp_path / BEST) for path in (tmp_path / BEST).rglob("*.safetensors")}
    assert names == {
        path.relative_to(tmp_path)
        for path in tmp_path.rglob("*.safetensors")
        if not {"best", "checkpoint-3"} & {*path.parts}
    }
    for name in names:
        assert_same(load_file(tmp_path / BEST / name), load_file(tmp_path / name))


VALUES = {2: 5.0, 4: 9.0, 6: 7.0, 8: 8.0}
EIGHT = {"max_train_steps": 8, "checkpointing_steps": 3, "logging_steps": 1, "checkpoints_total_limit": 0} | SCORED


def scores_of(values: dict[int, float]) -> Callable[..., dict[str, float]]:
    """In place of `Validation.run`: these values, without a look."""
    return lambda _self, step, *_: {"ema_validation_psnr": values[step]}


def go(sd: Path, cache: Path, output: Path, values: dict[int, float], *more: str, killed: int = 0) -> None:
    """A run whose validations find these values, killed in the midst of a step if that is asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "run", scores_of(values))
        if killed:

            def step(self: Metrics, number: int, *rest: Any, original: Any = Metrics.step) -> None:
                original(self, number, *rest)
                if number == killed:
                    raise KeyboardInterrupt

            patch.setattr(Metrics, "step", step)
        arguments = flags(sd, cache, output, **EIGHT, keep_best="psnr")
        if killed:
            with pytest.raises(SystemExit, match="130"):
                main([*arguments, *more])
        else:
            main([*arguments, *more])


def told(output: Path) -> dict[int, float]:
    return {step: line["ema_validation_psnr"] for step, line in metrics(output, "ema_validation_psnr").items()}


@pytest.fixture(scope="module")
def eight(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of 8 undisturbed steps, of which the fourth was best."""
    output = tmp_path_factory.mktemp("runs") / "eight"
    go(sd, cache, output, VALUES)
    return output


def test_a_killed_and_resumed_run_ends_with_the_best_of_its_metrics(
    sd: Path, cache: Path, eight: Path, tmp_path: Path
) -> None:
    """Killed after the best was saved and before a checkpoint: whatever these steps are worth when they come again."""
    holds_the_best(eight, VALUES)
    resume = ("--resume_from_checkpoint", "latest")
    for name, values in (("same", VALUES), ("worse", VALUES | {4: 3.0, 6: 4.0, 8: 2.0})):
        output = tmp_path / name
        go(sd, cache, output, VALUES, killed=5)
        assert read(output / BEST)["step"] == 4
        second = load_file(unet_file(output / "checkpoint-3" / BEST))
        go(sd, cache, output, values, *resume)
        assert told(output) == values
        holds_the_best(output, values)
        found = load_file(unet_file(output / BEST))
        assert_same(found, load_file(unet_file(eight / BEST)) if name == "same" else second)
    with pytest.raises(AssertionError):
        assert_same(second, load_file(unet_file(eight / BEST)))


def test_who_goes_back_finds_the_best_of_that_time_again(sd: Path, cache: Path, eight: Path, tmp_path: Path) -> None:
    """In the same folder and in another one; the branch that is left keeps its own."""
    run, other = shutil.copytree(eight, tmp_path / "run"), tmp_path / "other"
    worse = VALUES | {4: 1.0, 6: 4.0, 8: 3.0}
    go(sd, cache, run, worse, "--resume_from_checkpoint", "checkpoint-3")
    go(sd, cache, other, worse, "--resume_from_checkpoint", str(eight / "checkpoint-3"))
    for output in (run, other):
        assert told(output) == worse
        holds_the_best(output, worse)
        assert_same(load_file(unet_file(output / BEST)), load_file(unet_file(eight / "checkpoint-3" / BEST)))
    holds_the_best(run / "abandoned-checkpoint-6", VALUES)
    holds_the_best(eight, VALUES)


def test_a_run_that_begins_anew_forgets_one_without_a_checkpoint(sd: Path, cache: Path, tmp_path: Path) -> None:
    """Neither its best pipeline nor its metrics are those of the new one."""
    go(sd, cache, tmp_path, {2: 50.0}, killed=3)
    assert read(tmp_path / BEST)["step"] == 2
    assert not list(tmp_path.glob("checkpoint-*"))
    go(sd, cache, tmp_path, VALUES)
    assert told(tmp_path) == VALUES
    holds_the_best(tmp_path, VALUES)


SIGKILL = """
import os, signal, sys
from ip2p.train.save import best
from ip2p.train.watch.validate import Validation
values, moment, arguments = eval(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
Validation.run = lambda _self, step, *_: {"ema_validation_psnr": values[step]}
calls = iter(range(1000))

def sync(path, original=best.sync):
    if next(calls) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    original(path)

best.sync = sync
from ip2p.train.__main__ import main
main(arguments)
"""


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("moment", [5, 25])
def test_sigkill_while_the_best_pipeline_is_saved(
    sd: Path, cache: Path, eight: Path, tmp_path: Path, moment: int
) -> None:
    """In the midst of the first or the second one: what has its name is whole, and the run ends as another."""
    arguments = flags(sd, cache, tmp_path, **EIGHT, keep_best="psnr")
    command = [sys.executable, "-c", SIGKILL, str(VALUES), str(moment), *arguments]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / BEST).exists() == (moment == 25)
    go(sd, cache, tmp_path, VALUES, "--resume_from_checkpoint", "auto")
    assert_same(load_file(unet_file(tmp_path / BEST)), load_file(unet_file(eight / BEST)))
    holds_the_best(tmp_path, VALUES)


class Writer:
    """Saves pipelines of two files that both hold the step, and stops at a moment that is counted from all calls."""

    def __init__(self, output: Path):
        self.output, self.step, self.left = output, 0, 10**9
        self.config = train_config(
            output_dir=output, num_validation_samples=1, score_samples=1, keep_best="psnr", use_ema=True
        )

    def count(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def save(self, folder: Path) -> None:
        for name in ("unet", "vae"):
            self.count()
            (folder / name).mkdir(parents=True)
            (folder / name / "weights").write_text(str(self.step))

    def keep(self, step: int, value: float) -> None:
        self.step = step
        keep(self.config, step, {"ema_validation_psnr": value}, lambda: None, self.save)

    def there(self) -> int:
        """The step of the pipeline that is there, 0 for none; all of it must be of that step."""
        if not (folder := self.output / BEST).exists():
            return 0
        assert {path.read_text() for path in folder.glob("*/weights")} == {str(read(folder)["step"])}
        return read(folder)["step"]


def test_a_kill_at_any_moment_leaves_it_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the checkpoint that is gone on with restores its own; a kill in the midst of that is made good, too."""
    moments, found = 0, set[int]()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no kill takes what was written
    for moment in range(100):
        writer = Writer(tmp_path / str(moment))
        writer.output.mkdir()
        writer.keep(2, 5.0)
        best.take_along(writer.output, origin := writer.output / "checkpoint-3")
        with monkeypatch.context() as patch:
            for place, name in ((Path, "rename"), (best.shutil, "rmtree"), (best, "sync"), (best.shutil, "copytree")):
                original = getattr(place, name)
                patch.setattr(place, name, lambda *a, _o=original, _w=writer, **k: (_w.count(), _o(*a, **k))[1])
            writer.left = moment
            try:
                writer.keep(4, 9.0)
                found.add(writer.there())
                go_back(writer.output, origin)
                break
            except KeyboardInterrupt:
                moments += 1
        writer.left = 10**9
        found.add(writer.there())
        go_back(writer.output, origin)
        assert writer.there() == 2
        assert {path.name for path in writer.output.iterdir()} == {BEST, "checkpoint-3"}
        writer.keep(4, 9.0)
        assert writer.there() == 4
    assert moments > 20
    assert found == {0, 2, 4}


@pytest.mark.parametrize(
    ("score", "better", "worse"),
    [("loss", 0.1, 0.2), ("l1", 0.1, 0.2), ("psnr", 0.2, 0.1), ("clip_direction", 0.2, 0.1)],
)
def test_lowest_losses_and_highest_scores_are_best(tmp_path: Path, score: str, better: float, worse: float) -> None:
    """Equal ones stay; numbers that are none, and scores that were not found, change nothing."""
    watched = {"num_validation_samples": 1, "score_samples": 1, "clip_model": "x"}
    config = train_config(output_dir=tmp_path, keep_best=score, **watched)
    for step, value in enumerate([float("nan"), worse, better, worse, better, float("inf"), None]):
        found = {} if value is None else {f"validation_{score}": value, f"ema_validation_{score}": -value}
        keep(config, step, found, lambda: None, lambda folder: folder.mkdir())
    assert read(tmp_path / BEST) == {"step": 2, "score": f"validation_{score}", "value": better}


def test_links_are_copies_where_a_disk_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network disks of some kinds."""
    writer = Writer(tmp_path)
    writer.keep(2, 5.0)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    best.take_along(tmp_path, tmp_path / "copy")
    assert (tmp_path / "copy" / BEST / "unet" / "weights").read_text() == "2"
    assert not (tmp_path / "copy" / BEST / "unet" / "weights").samefile(tmp_path / BEST / "unet" / "weights")


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    """What was best before is there as it was."""
    writer = Writer(tmp_path)
    writer.keep(2, 5.0)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    writer.save = full  # type: ignore[method-assign]
    with pytest.raises(
        TrainError, match=r"best cannot be written: .*: make space and continue with --resume_from_check"
    ):
        writer.keep(4, 9.0)
    assert writer.there() == 2


def test_captions_are_found_by_the_names_that_evaluate_knows(
    captioned: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In columns that all caches kept; none where one is empty, or pairs were reversed and captions were not."""
    opened, plain = Cache.open(captioned), Cache.open(cache)
    samples = Samples.of(opened, None)
    assert find_captions([opened], samples, BEFORE) == [f"a cat {n}" for n in range(10)]
    assert find_captions([opened], samples, AFTER) == [f"a dog {n}" for n in range(10)]
    assert find_captions([opened, plain], samples, AFTER) is None
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "values", lambda *_: ["a cat", " "])
        assert find_captions([opened], samples, AFTER) is None
    opened.manifest["settings"]["reverse_pairs"] = True
    assert find_captions([opened], samples, AFTER) is None


def test_a_score_that_goes_by_captions_is_refused_without_any(
    sd: Path, cache: Path, judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any step, and so is a folder that holds no CLIP."""
    wrong = {
        "--keep_best clip_direction goes by captions of the originals and captions of the edited images, and --cache "
        "has none: `ip2p-encode --keep_columns original_prompt edited_prompt` takes them from the dataset, also into a "
        "finished cache": {"clip_model": judges.clip, "keep_best": "clip_direction"},
        f"--clip_model {judges.dino} holds a model of type vit, expected clip": {"clip_model": judges.dino},
    }
    for message, changed in wrong.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match="2"):
            main(flags(sd, cache, tmp_path / "out", **SCORED, **changed))
        assert capsys.readouterr().err.splitlines()[-1] == f"ip2p-train: {message}"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_without_memory_for_edits_there_are_no_scores_and_the_run_goes_on(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said for each kind of weights; the losses are there, and no pipeline is best."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Validation, "edit", full)
    monkeypatch.setattr(Validation, "draw", lambda *_: None)
    main(flags(sd, cache, tmp_path, **SCORED | {"max_train_steps": 1}, keep_best="psnr"))
    said = capsys.readouterr().out
    assert said.count("no validation scores at step 1: out of memory") == 1
    assert said.count("no ema_validation scores at step 1: out of memory") == 1
    (line,) = metrics(tmp_path, "ema_validation_loss").values()
    assert "validation_psnr" not in line
    assert not (tmp_path / BEST).exists()


def test_processes_share_the_pairs(captioned: Path) -> None:
    """Each has some, in turns, and all of them together are those that one would have."""
    held, caches = Samples.of(Cache.open(captioned), None), [Cache.open(captioned)]
    config = train_config(num_validation_samples=7, score_samples=7)

    def rows(rank: int, processes: int) -> list[int]:
        alone: Any = type("Accelerator", (), {"process_index": rank, "num_processes": processes, "device": "cpu"})
        found = score.Scores(config, alone, caches, held)
        assert found.count == 7
        return found.pairs.rows.tolist()

    assert len(rows(0, 1)) == 7
    assert [len(rows(rank, 3)) for rank in range(3)] == [3, 2, 2]
    assert sorted(row for rank in range(3) for row in rows(rank, 3)) == sorted(rows(0, 1))
