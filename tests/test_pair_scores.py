"""Pairs that `ip2p-encode --pair_scores` judges by CLIP: what is judged when, and what becomes of it."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import tiny
from forms import PAIRS, Flags, opened, seeds
from ip2p.encode import scores
from ip2p.encode.base.errors import ImageError, SettingsError, SourceError
from ip2p.encode.base.flags import parse
from ip2p.encode.cache import writer
from ip2p.encode.cache.format import SAMPLES, Cache
from ip2p.encode.config import EncodeConfig
from ip2p.encode.data.pictures import open_picture
from ip2p.encode.keeper import preview
from ip2p.encode.keeper.__main__ import main as keeper
from ip2p.encode.keeper.verify import verify
from ip2p.encode.models.judge import Judge
from ip2p.infer.score.metrics import Edit, measure
from ip2p.train.data import keep
from test_crash import Encode as Processes
from test_keep import files_of
from test_scores import Judges, tiny_judges

Encode = Callable[..., None]
BEFORE = ["a cat", "a house", None, "a dog", "the sky", "a cat", "it", "a dog"]
AFTER = ["a red cat", "a green house", "the sky", " ", "the night", "a blue cat", "a dog", "a red dog"]
NAMES = ("clip_image", "clip_direction", "clip_t")


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return tiny_judges(tmp_path_factory.mktemp("judges"))


def columns(count: int = 8) -> dict[str, list]:
    """Pairs of two sizes with captions, of which one of each side is missing; the last pair but one comes again."""
    table = tiny.pairs(7, sizes=((24, 20), (40, 24)))
    table = {name: [*values, values[-1]] for name, values in table.items()}
    table |= {"original_prompt": BEFORE, "edited_prompt": AFTER}
    return {name: values[:count] for name, values in table.items()}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, sd: Path, encode: Encode, judges: Judges) -> Path:
    """A folder with a judged cache of the eight pairs, and these; copy it before changing it."""
    folder = tmp_path_factory.mktemp("judged")
    encode(sd, tiny.dataset(folder / "data", columns()), folder / "cache", pair_scores=True, clip_model=judges.clip)
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each batch has that CLIP sees."""
    found: list[int] = []
    embed = Judge.embed

    def count(judge: Judge, pixels: Any) -> Any:
        found.append(len(pixels) // 2)
        return embed(judge, pixels)

    monkeypatch.setattr(Judge, "embed", count)
    return found


def scores_of(cache: Path) -> list[dict[str, float | None]]:
    """The scores of each sample, in the order of the dataset."""
    return Cache.open(cache).samples().sort_by("position").select(list(NAMES)).to_pylist()


def assert_same_scores(one: Path, other: Path) -> None:
    """But for the rounding of batches of other sizes; NULL is the same as NULL."""
    found = [np.array([list(row.values()) for row in scores_of(cache)], float) for cache in (one, other)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_scores_are_those_of_evaluate_and_touch_no_shard(
    sd: Path, tmp_path: Path, encode: Encode, judges: Judges, capsys: pytest.CaptureFixture[str]
) -> None:
    """Added to a finished cache, of the dataset's own pictures; what needs a caption that is missing is NULL."""
    data, cache = tiny.dataset(tmp_path / "data", columns()), tmp_path / "cache"
    encode(sd, data, cache)
    files, times = files_of(cache), {path: (cache / path).stat().st_mtime_ns for path in files_of(cache)}
    encode(sd, data, cache, pair_scores=True, clip_model=judges.clip)
    said = capsys.readouterr().out
    assert f"judged 8 samples by {judges.clip}\n" in said
    assert "1 samples have no clip_t, which needs captions (--edited_caption_column)\n" in said
    assert "2 samples have no clip_direction, which needs captions (--original_caption_column and --edited" in said
    assert files_of(cache) == files
    assert {path: (cache / path).stat().st_mtime_ns for path in files} == times
    assert not list(cache.glob(".scores*"))
    judge, found = Judge(*judges), scores_of(cache)
    rows: Any = datasets.load_dataset(str(data), split="train")
    for row, scored in zip(rows, found, strict=True):
        before, after = (
            text if text and text.strip() else None for text in (row["original_prompt"], row["edited_prompt"])
        )
        edit = Edit(open_picture(row["input_image"]), open_picture(row["edited_image"]), None, (before, after))
        (expected,) = measure(judge, [edit])
        wanted = {"clip_image", *(["clip_t"] if after else []), *(["clip_direction"] if before and after else [])}
        assert {name for name, value in scored.items() if value is not None} == wanted
        assert {name: scored[name] for name in wanted} == pytest.approx({n: expected[n] for n in wanted}, abs=1e-5)
    assert len({tuple(row.values()) for row in found}) == 8, "equal pairs with other captions have other scores"
    entry = {"clip_model": judges.clip, "clip": judge.identity, "captions": ["original_prompt", "edited_prompt"]}
    assert Cache.open(cache).manifest["pair_scores"] == entry
    assert verify(cache) == []


def test_what_is_judged_stays_and_what_is_new_or_has_other_captions_is_judged(
    sd: Path, judges: Judges, judged: Path, tmp_path: Path, encode: Encode, counted: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The cache remembers by which CLIP. Whoever leaves out the flag is told that new samples have no scores."""
    data, cache = tiny.dataset(tmp_path / "data", columns(5)), tmp_path / "cache"
    encode(sd, data, cache, pair_scores=True, clip_model=judges.clip)
    encode(sd, data, cache, pair_scores=True)
    assert sum(counted) == 5
    assert f"nothing to judge: {judges.clip} has judged all\n" in capsys.readouterr().out
    first = scores_of(cache)
    encode(sd, tiny.dataset(data, columns()), cache)
    assert "new samples have no scores: --pair_scores judges them\n" in capsys.readouterr().out
    assert scores_of(cache)[:5] == first
    assert {value for row in scores_of(cache)[5:] for value in row.values()} == {None}
    encode(sd, data, cache, pair_scores=True)
    assert sum(counted) == 8
    assert_same_scores(cache, judged / "cache")
    others = columns()
    others["edited_prompt"] = [*AFTER[:7], "a house"]
    encode(sd, tiny.dataset(data, others), cache, pair_scores=True)
    assert sum(counted) == 9
    before, after = scores_of(judged / "cache"), scores_of(cache)
    assert [a["clip_t"] == pytest.approx(b["clip_t"], abs=1e-6) for a, b in zip(before, after, strict=True)] == [
        *[True] * 7, False,
    ]  # fmt: skip
    assert verify(cache) == []


def test_another_clip_judges_all_again_which_is_said(
    sd: Path, judges: Judges, judged: Path, tmp_path: Path, encode: Encode, counted: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whether it has another name or not: weights decide, and what it sees of a picture."""
    cache = Path(shutil.copytree(judged / "cache", tmp_path / "cache"))
    same = Path(shutil.copytree(judges.clip, tmp_path / "same"))
    capsys.readouterr()
    encode(sd, judged / "data", cache, pair_scores=True, clip_model=same)
    assert not counted
    assert Cache.open(cache).manifest["pair_scores"]["clip_model"] == str(same)
    assert "another CLIP" not in capsys.readouterr().out
    settings = json.loads((same / "preprocessor_config.json").read_text())
    (same / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    encode(sd, judged / "data", cache, pair_scores=True)
    assert sum(counted) == 8
    assert f"{cache} was judged by {same}, and {same} is another CLIP: 8 samples are judged again\n" in (
        capsys.readouterr().out
    )
    assert all(a != b for a, b in zip(scores_of(cache), scores_of(judged / "cache"), strict=True))


@pytest.mark.parametrize("dies", ["at Ctrl-C", "killed", "at the manifest"])
def test_what_was_judged_before_a_process_died_is_not_judged_again(
    dies: str, sd: Path, judges: Judges, judged: Path, tmp_path: Path, encode: Encode, counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C keeps all of it, and a process that is killed has kept what is older than a few seconds."""
    cache, data = tmp_path / "cache", judged / "data"
    monkeypatch.setattr(scores, "BATCH", 2)
    monkeypatch.setattr(scores, "SECONDS", 0)
    flags = {"pair_scores": True, "clip_model": judges.clip}

    def at_call(number: int, error: type[BaseException], function: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[int] = []

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) >= number:
                raise error
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if dies == "at Ctrl-C":
            patch.setattr(scores, "_judged", at_call(3, KeyboardInterrupt, scores._judged))
        elif dies == "killed":  # before the third block is there
            patch.setattr(scores, "write_block", at_call(3, ZeroDivisionError, scores.write_block))
        else:  # the second one, that of the outcome
            patch.setattr(writer, "write_record", at_call(2, ZeroDivisionError, writer.write_record))
        with pytest.raises((ZeroDivisionError, SystemExit)):
            encode(sd, data, cache, **flags)
    kept = {"at Ctrl-C": 4, "killed": 4, "at the manifest": 8}[dies]
    assert len(list(cache.glob(".scores/*"))) == kept / 2
    assert not [finding for finding in verify(cache) if ".scores" in finding.path]
    if dies != "at the manifest":
        encode(sd, data, cache)  # without the flag, what is judged stays for whoever goes on
    counted.clear()
    encode(sd, data, cache, **flags)
    assert sum(counted) == 8 - kept
    assert_same_scores(cache, judged / "cache")
    assert not list(cache.glob(".scores*"))
    assert verify(cache) == []


def test_conditions_spreads_and_previews_go_by_scores(
    sd: Path, judges: Judges, judged: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Beside what is kept of the dataset; a condition on what is not there says what adds it."""
    table = columns() | {"score": [9.0, 1.0, 8.0, None, float("nan"), 3.0, 10.0, 2.0]}
    data, cache = tiny.dataset(tmp_path / "data", table), tmp_path / "cache"
    encode(sd, data, cache, pair_scores=True, clip_model=judges.clip, keep_columns="score")
    found = [row["clip_direction"] for row in scores_of(cache)]
    middle = sorted(value for value in found if value is not None)[2]
    condition = f"clip_direction >= {middle} and score > 2"
    (mask,) = keep.choose([Cache.open(cache)], condition) or []
    expected = [
        value is not None and value >= middle and score is not None and score > 2
        for value, score in zip(found, table["score"], strict=True)
    ]
    assert mask.tolist() == expected
    capsys.readouterr()
    keeper(["info", str(cache)])
    said = capsys.readouterr().out
    assert "columns   score (number), clip_image (number), clip_direction (number), clip_t (number)\n" in said
    assert "  score: 1 2.25 5.5 8.75 10 (smallest, quartiles, largest; 2 samples have none)\n" in said
    assert f"pair_scores\n  clip_model       {judges.clip}\n" in said
    assert "  captions         original_prompt, edited_prompt\n" in said
    keeper(["info", str(cache), "--keep", condition, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == sum(expected)
    kept_scores = [value for value, good in zip(found, expected, strict=True) if good]
    quartiles = np.quantile(np.array(kept_scores, float), [0, 0.25, 0.5, 0.75, 1])
    assert told["spread"]["clip_direction"] == {"quartiles": pytest.approx(quartiles.tolist()), "missing": 0}
    rows: list[str] = []
    monkeypatch.setattr(
        preview, "contact_sheet", lambda strips, *_: rows.extend(t for t, _ in strips) or Image.new("RGB", (1, 1))
    )
    keeper(["preview", str(cache), "--keep", condition, "--output", str(tmp_path / "sheet.png")])
    first = expected.index(True)
    assert (
        rows[0]
        == f"{table['edit_prompt'][first]} (clip_direction {found[first]:.3g}, score {table['score'][first]:.3g})"
    )
    assert len(rows) == sum(expected)
    with pytest.raises(SettingsError, match=r"no column clip_direction, but .*--pair_scores CLIP's"):
        keep.choose([Cache.open(bare(judged, tmp_path))], "clip_direction > 0")
    with pytest.raises(SettingsError, match="true of none of the 8 samples"):
        keep.choose([Cache.open(cache)], "clip_image > 1.5")


def bare(judged: Path, folder: Path) -> Path:
    """A copy of the cache without its scores."""
    cache = Cache.open(Path(shutil.copytree(judged / "cache", folder / "bare")))
    manifest = {name: value for name, value in cache.manifest.items() if name != "pair_scores"}
    writer.write_state(cache.folder, manifest, cache.samples().select(SAMPLES.names), cache.commits())
    return cache.folder


def test_pairs_that_cannot_be_judged_are_counted_and_tried_again(
    sd: Path, judges: Judges, judged: Path, tmp_path: Path, encode: Encode, counted: list[int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """They have no scores, and the others do; --on_error fail stops at the first one."""
    cache, flags = bare(judged, tmp_path), {"pair_scores": True, "clip_model": judges.clip}
    with monkeypatch.context() as patch:

        def broken(file: bytes, background: str) -> Image.Image:
            if (image := open_picture(file, background)).size == (40, 24):
                raise ImageError("the disk is tired")
            return image

        patch.setattr(scores, "open_picture", broken)
        with pytest.raises(SystemExit):
            encode(sd, judged / "data", cache, **flags, on_error="fail")
        assert "position 1 of the dataset: the disk is tired (--on_error quarantine" in capsys.readouterr().err
        encode(sd, judged / "data", cache, **flags)
    said = capsys.readouterr().out
    assert f"judged 5 samples by {judges.clip}\n" in said
    assert "3 samples could not be judged: the disk is tired\n" in said
    assert [row["clip_image"] is None for row in scores_of(cache)] == [n % 2 == 1 and n < 7 for n in range(8)]
    assert Cache.open(cache).manifest["counts"] == {"ok": 8}
    counted.clear()
    encode(sd, judged / "data", cache, **flags)
    assert sum(counted) == 3
    assert_same_scores(cache, judged / "cache")


def test_scores_that_are_lost_with_their_table_are_said(
    sd: Path, judged: Path, tmp_path: Path, encode: Encode, counted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """What judges them again is named, and does it with the CLIP of before."""
    cache = Path(shutil.copytree(judged / "cache", tmp_path / "cache"))
    (cache / "samples.parquet").unlink()
    encode(sd, judged / "data", cache)
    said = capsys.readouterr().out
    assert "samples.parquet is missing or damaged, and so are the scores of pairs: --pair_scores judges them" in said
    assert verify(cache) == []
    shutil.rmtree(cache)
    shutil.copytree(judged / "cache", cache)
    (cache / "samples.parquet").unlink()
    encode(
        sd, judged / "data", cache, pair_scores=True, clip_model=Cache.open(cache).manifest["pair_scores"]["clip_model"]
    )
    assert "judges them" not in capsys.readouterr().out
    assert sum(counted) == 8
    assert_same_scores(cache, judged / "cache")


def test_a_fresh_look_tells_wrong_scores_and_another_clip(
    judges: Judges, judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify --reencode` judges again what it encodes again."""
    cache = Cache.open(Path(shutil.copytree(judged / "cache", tmp_path / "cache")))
    keeper(["verify", str(cache.folder), "--reencode", "8"])
    assert "clip_direction: at most " in capsys.readouterr().out
    samples = cache.samples()
    wrong = pa.array([0.5, *samples["clip_t"].to_pylist()[1:]], pa.float32())
    samples = samples.set_column(samples.column_names.index("clip_t"), samples.field("clip_t"), wrong)
    writer.write_state(cache.folder, cache.manifest, samples, cache.commits())
    with pytest.raises(SystemExit):
        keeper(["verify", str(cache.folder), "--reencode", "8"])
    assert f"{cache.folder}: clip_t differs from a fresh encoding\n" in capsys.readouterr().out
    other = tiny_judges(tmp_path / "other", seed=1).clip
    with pytest.raises(SystemExit):
        keeper(["verify", str(cache.folder), "--reencode", "1", "--clip_model", other])
    assert f"was not judged by {other}: name its CLIP with --clip_model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        keeper(["verify", str(bare(judged, tmp_path)), "--reencode", "1", "--clip_model", other])
    assert "no CLIP has judged the pairs of this cache: leave out --clip_model" in capsys.readouterr().err


@pytest.mark.parametrize("every", [False, True], ids=["first", "every"])
def test_reversed_pairs_have_their_captions_reversed(every: bool, tmp_path: Path) -> None:
    """Whichever instruction of a row a sample has; of a list of captions the first one counts."""
    table = tiny.pairs(3) | {"before": [["a", "x"], ["b"], []], "after": [["A"], ["B"], ["C"]]}
    table |= {"edit_prompt": [["1", "2"], ["3"], ["4"]], "inverse_edit": [["5"], ["6", "7"], ["8"]]}
    lists = dict.fromkeys(("before", "after", "edit_prompt", "inverse_edit"), datasets.List(datasets.Value("string")))
    features = datasets.Features(dict.fromkeys(("input_image", "edited_image"), datasets.Image()) | lists)
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "pairs.parquet")
    flags: Flags = {"dataset_name": tmp_path / "pairs.parquet", "prompt_choice": "all" if every else "first"}
    flags |= {"pair_scores": True, "original_caption_column": "before", "edited_caption_column": "after"}
    source = opened(flags, reverse_pairs=True)
    found = zip(*(texts.to_pylist() for texts in source.captions(np.arange(len(source)))), strict=True)
    one = [(None if a == "" else a, b) for a, b in [("a", "A"), ("b", "B"), ("", "C")]]
    told = {"1": 0, "2": 0, "3": 1, "4": 2, "5": 0, "6": 1, "7": 1, "8": 2}
    for position, captions in enumerate(found):
        instruction = source[position].instruction
        expected = one[told[instruction]]
        assert captions == (expected if instruction < "5" else expected[::-1])
    assert len(source) == (8 if every else 6)


def test_captions_come_from_what_is_known_of_a_dataset_or_from_flags(tmp_path: Path) -> None:
    """They identify no dataset. A column that is not there is answered as others are."""
    form = seeds(tmp_path / "seeds", PAIRS[:4])
    source = opened(form, pair_scores=True)
    assert source.captions(np.arange(2))[0].to_pylist() == ["a cat"] * 2
    assert source.captions(np.arange(2))[1].to_pylist() == ["a dog"] * 2
    assert (source.columns, source.fingerprint()) == (opened(form).columns, opened(form).fingerprint())
    data = tiny.dataset(tmp_path / "data", columns())
    source, plain = opened({"dataset_name": data}, pair_scores=True), opened({"dataset_name": data})
    assert source.captions(np.array([7, 0]))[0].to_pylist() == ["a dog", "a cat"]
    assert (source.columns, source.fingerprint(), source[3]) == (plain.columns, plain.fingerprint(), plain[3])
    with pytest.raises(SourceError, match=r"has no column captoin; it has .*: choose with --original_caption_column"):
        opened({"dataset_name": data}, pair_scores=True, original_caption_column="captoin")


@pytest.mark.parametrize("flag", ["clip_model", "original_caption_column", "edited_caption_column"])
def test_flags_of_judging_belong_to_pair_scores(flag: str) -> None:
    """Alone they cannot act."""
    required = "--pretrained_model_name_or_path m --dataset_name d --cache c"
    with pytest.raises(SettingsError, match=f"--{flag} x belongs to --pair_scores: add that, or leave it out"):
        parse(EncodeConfig, [*required.split(), f"--{flag}", "x"], "ip2p-encode")


@pytest.mark.slow
def test_processes_that_are_killed_lose_nothing_and_share_what_is_left(
    sd: Path, judges: Judges, tmp_path: Path
) -> None:
    """At random moments, on two, one and three processes: the scores are those of one that nobody disturbed."""
    table = tiny.pairs(60) | {"original_prompt": ["a cat", "a dog"] * 30, "edited_prompt": ["a red cat", "day"] * 30}
    processes = Processes(sd, tiny.dataset(tmp_path / "data", table), tmp_path)
    processes.flags |= {"pair_scores": True, "clip_model": judges.clip, "dataloader_num_workers": 0}
    processes.finish(tmp_path / "undisturbed", 1)
    chance = random.Random(0)
    for count in (2, 1, 3):
        with processes.start(tmp_path / "cache", count) as group:
            limit = time.monotonic() + 60
            while not (tmp_path / "cache" / "samples.parquet").is_file() and time.monotonic() < limit:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 6))
            assert group
    processes.finish(tmp_path / "cache", 2)
    assert_same_scores(tmp_path / "cache", tmp_path / "undisturbed")
    assert verify(tmp_path / "cache") == []
