"""Columns that a cache keeps of its dataset, and training on the samples for which a condition on them is true."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fakes
import tiny
from forms import PAIRS, Flags, Kind, csv_file, metadata_jsonl, opened, parquet, seeds, shards, stream
from ip2p.encode import run
from ip2p.encode.base.errors import SettingsError, SourceError
from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.cache import writer
from ip2p.encode.cache.format import SAMPLES, Cache
from ip2p.encode.cache.keep import kinds as keep_kinds
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.samples import with_columns
from ip2p.encode.cache.tables import write_samples
from ip2p.encode.cache.writer import write_state
from ip2p.encode.cached import Samples
from ip2p.encode.data.pairs import Pairs
from ip2p.encode.keeper.__main__ import main as keeper
from ip2p.encode.keeper.verify import repair, verify
from ip2p.train import agree
from ip2p.train.__main__ import main
from ip2p.train.data import keep
from test_train import flags

Encode = Callable[..., None]
SCORES = [9.0, None, 7.5, 1.0, float("nan"), 8.0, 9.0, 2.0, 3.0, 10.0]
SOURCES = ["web", "studio", None, "web", "web", "studio", "web", "web", "web", "it's"]


def scored(folder: Path, count: int = 10, **columns: list) -> Path:
    """The ten pairs, or the first of them, with a number and a text each."""
    table = tiny.pairs(10) | {"score": SCORES, "source": SOURCES} | columns
    return tiny.dataset(folder, {name: values[:count] for name, values in table.items()})


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, sd: Path, encode: Encode) -> Path:
    """A finished cache of the ten pairs with their numbers and texts; nothing may change it."""
    folder = tmp_path_factory.mktemp("kept")
    encode(sd, scored(folder / "data"), folder / "cache", keep_columns=["score", "source"])
    return folder / "cache"


def columns_of(cache: Path) -> dict[str, list]:
    """What a cache keeps."""
    table = Cache.open(cache).samples()
    return {name: table[name].to_pylist() for name in table.column_names if name not in SAMPLES.names}


def files_of(cache: Path) -> dict[str, bytes]:
    """Numbers and records."""
    paths = (path for part in ("data.zarr", "commits") for path in (cache / part).rglob("*") if path.is_file())
    return {str(path.relative_to(cache)): path.read_bytes() for path in paths}


def test_columns_are_added_to_a_finished_cache_without_a_look_at_a_picture(
    sd: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay when the same dataset is encoded again, one by one as well; numbers and records stay as they are."""
    data, cache = scored(tmp_path / "data"), tmp_path / "cache"
    encode(sd, data, cache)
    before = files_of(cache)
    assert columns_of(cache) == {}
    with monkeypatch.context() as patch:
        patch.setattr(Pairs, "__getitem__", lambda *_: pytest.fail("a picture was read"))
        encode(sd, data, cache, keep_columns="score")
        encode(sd, data, cache, keep_columns="source")
        encode(sd, data, cache)
    found = columns_of(cache)
    assert found.keys() == {"score", "source"}
    np.testing.assert_equal([np.nan if score is None else score for score in found["score"]], np.array(SCORES, float))
    assert found["source"] == SOURCES
    assert files_of(cache) == before
    assert verify(cache) == []
    capsys.readouterr()
    keeper(["info", str(cache), "--keep", "score > 7"])
    told = capsys.readouterr().out
    assert "columns   score (number), source (text)\n" in told
    assert "--keep    5 of 10 samples: score > 7\n" in told
    keeper(["info", str(cache), "--keep", "score > 7", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["columns"], told["kept"]) == ({"score": "number", "source": "text"}, 5)


def test_columns_grow_with_the_dataset_and_outlast_a_repair(sd: Path, tmp_path: Path, encode: Encode) -> None:
    """Each sample has the values of its own row, whether it was there before or has come since."""
    encode(sd, scored(tmp_path / "data", 4), tmp_path / "cache", keep_columns=["source"])
    assert columns_of(tmp_path / "cache") == {"source": SOURCES[:4]}
    grown = scored(tmp_path / "data", source=[*SOURCES[4:], "a", "b", "c", "d"])
    encode(sd, grown, tmp_path / "cache", keep_columns=["source"])
    assert columns_of(tmp_path / "cache") == {"source": [*SOURCES[4:], "a", "b", "c", "d"]}
    (tmp_path / "cache" / "commits" / "images-v0-000000.json").write_text("torn")
    assert repair(tmp_path / "cache", verify(tmp_path / "cache"))
    assert columns_of(tmp_path / "cache") == {"source": [*SOURCES[4:], "a", "b", "c", "d"]}
    encode(sd, grown, tmp_path / "cache", keep_columns=["source"])
    assert verify(tmp_path / "cache") == []


def lose(cache: Path, path: str) -> None:
    """A file is gone."""
    (cache / path).unlink()


def lose_and_repair(cache: Path, path: str) -> None:
    """A file is gone, and `ip2p-cache verify --repair` has seen to what is left."""
    lose(cache, path)
    repair(cache, verify(cache))


def be_killed(cache: Path, path: str) -> None:
    """The table is of an encode that was killed before it could write the manifest, and then repaired."""
    opened = Cache.open(cache)
    write_samples(cache / path, with_columns(opened.samples(), reason=["later"] * 10))
    repair(cache, verify(cache))


@pytest.mark.parametrize(
    ("happens", "path"),
    [
        (lose, "units.parquet"),
        (lose_and_repair, "units.parquet"),
        (lose, "data.zarr/zarr.json"),
        (be_killed, "samples.parquet"),
    ],
)
def test_columns_stay_whatever_small_file_differs_while_their_table_is_whole(
    happens: Callable[[Path, str], None],
    path: str,
    sd: Path,
    kept: Path,
    tmp_path: Path,
    encode: Encode,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next encode need not name them; it mends the cache, and says of no sample that it is new."""
    cache = Path(shutil.copytree(kept, tmp_path / "cache"))
    happens(cache, path)
    encode(sd, kept.parent / "data", cache)
    assert str(columns_of(cache)) == str(columns_of(kept))  # since NaN equals nothing
    assert verify(cache) == []
    assert "nothing in" not in capsys.readouterr().out


def test_columns_outlast_an_encode_that_dies_while_the_cache_grows(
    sd: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the table and the manifest; neither that encode nor the next one named them."""
    encode(sd, scored(tmp_path / "data", 4), tmp_path / "cache", keep_columns=["source"])
    grown = scored(tmp_path / "grown")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(sd, grown, tmp_path / "cache")
    encode(sd, grown, tmp_path / "cache")
    assert columns_of(tmp_path / "cache") == {"source": [*SOURCES[:4], *[None] * 6]}
    assert verify(tmp_path / "cache") == []
    assert "new samples have nothing in source: --keep_columns gives it to them" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "delete", "of an earlier version"])
def test_columns_that_a_damaged_table_takes_along_are_said_with_what_gives_them_back(
    damage: str, sd: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, whichever encode kept them; names with spaces come in quotes."""
    columns: Any = {"a score": SCORES}
    data, cache = scored(tmp_path / "data", **columns), tmp_path / "cache"
    names = ["source"] if damage == "of an earlier version" else ["source", "a score"]
    encode(sd, data, cache, keep_columns=names)
    before = columns_of(cache)
    if damage == "of an earlier version":  # its manifest names them in the settings alone
        manifest = read_record(cache / "manifest.json")
        del manifest["kept"]
        write_record(cache / "manifest.json", manifest)
    else:
        encode(sd, data, cache)  # whose settings name none
    content = bytearray((cache / "samples.parquet").read_bytes())
    content[content.rindex(b"source")] ^= 1  # in the footer, where only a name changes
    (cache / "samples.parquet").unlink() if damage == "delete" else (cache / "samples.parquet").write_bytes(content)
    capsys.readouterr()
    encode(sd, data, cache)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "samples.parquet" in line)
    assert said.startswith(f"{cache / 'samples.parquet'} is missing or damaged, and so is what it kept in ")
    command = said.partition("--keep_columns ")[2].removesuffix(" takes it from the dataset again")
    assert shlex.split(command) == names
    assert columns_of(cache) == {}
    encode(sd, data, cache, keep_columns=shlex.split(command))
    assert str(columns_of(cache)) == str(before)
    assert verify(cache) == []


@pytest.mark.parametrize(
    "kind", [parquet, stream, csv_file, metadata_jsonl, shards, seeds], ids=lambda kind: kind.__name__
)
def test_every_kind_of_dataset_gives_its_columns(kind: Kind, tmp_path: Path) -> None:
    """A column that plays another role can be kept, too; what identifies the dataset does not change by that."""
    form = kind(tmp_path / "data", PAIRS[:9])
    source = opened(form)
    name = source.columns[2]
    keeping = opened(form, keep_columns=(name,))
    samples = keeping.with_kept(pa.table({"position": [5, 0, 8]}), keeping.kept())
    assert samples[name].to_pylist() == [PAIRS[n].instruction for n in (5, 0, 8)]
    assert (keeping.columns, keeping[3]) == (source.columns, source[3])
    assert keeping.fingerprint() == source.fingerprint() or kind is stream


def test_each_sample_of_a_row_has_the_values_of_the_row(tmp_path: Path) -> None:
    """Where every instruction makes a sample, they share what is kept."""
    columns = tiny.pairs(3) | {"score": [1.0, 2.0, 3.0]}
    columns["edit_prompt"] = [["a", "b"], ["c"], ["d", "e"]]
    features = datasets.Features(
        dict.fromkeys(("input_image", "edited_image"), datasets.Image())
        | {"edit_prompt": datasets.List(datasets.Value("string")), "score": datasets.Value("float32")}
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pairs.parquet")
    every: Flags = {"dataset_name": tmp_path / "pairs.parquet", "prompt_choice": "all"}
    source = opened(every, keep_columns=("score",))
    samples = source.with_kept(pa.table({"position": [0, 1, 2, 3, 4]}), source.kept())
    assert samples["score"].to_pylist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert [source[n].instruction for n in range(5)] == list("abcde")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([None, [1.0]] + [[2.0]] * 7, r"row 1 of .* \(the first is 0\) holds \[1\.0\]"),
        ([{"a": "\ud800"}] * 9, r"row 0 of .* holds \{'a': '\\ud800'\}"),
        ([1, 1, "a"] + [1] * 6, "row 2 of .* holds 'a'"),
        ([True, 2] + [True] * 7, "row 1 of .* holds 2"),
        ([1] * 8 + [2**63], "row 8 of .* holds 9223372036854775808"),
        ([10**400] * 9, "row 0 of .* holds 10+"),
        ([datetime(2024, 1, 1)] * 9, "row 0 of .* holds datetime.*"),
    ],
    ids=["lists", "objects", "mixed", "truth and numbers", "large", "huge", "dates"],
)
def test_a_column_that_cannot_be_kept_is_refused(
    values: list, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any picture is read, by its name, with the first row that cannot be, and what mends it."""
    fakes.install(monkeypatch, fakes.Pairs(), 4)
    source = opened(parquet(tmp_path / "data", PAIRS[:9]), keep_columns=("edit_prompt",))
    monkeypatch.setattr(source._rows, "texts", lambda role: values)
    monkeypatch.setattr(run, "open_pairs", lambda *_: source)
    monkeypatch.setattr(Pairs, "__getitem__", lambda *_: pytest.fail("a picture was read"))
    with pytest.raises(
        SourceError, match=f"--keep_columns .*: {said}; expected numbers, booleans or text.*: leave it out"
    ) as caught:
        fakes.encode(tmp_path / "cache", keep_columns=("edit_prompt",))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_column_without_any_value_is_kept(tmp_path: Path) -> None:
    """It might be given some later; until then no condition on it is true."""
    source = opened({"dataset_name": scored(tmp_path / "data", score=[None] * 10)}, keep_columns=("score",))
    samples = source.with_kept(pa.table({"position": [0, 3]}), source.kept())
    assert samples["score"].to_pylist() == [None, None]
    assert keep_kinds(samples.schema)["score"] == "number"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scor", r"has no column scor; it has .*: choose with --keep_columns; did you mean score\?"),
        (
            "input_image",
            "column input_image .* holds images, expected numbers, booleans or text: choose from edit_prompt",
        ),
        ("Position", "--keep_columns Position: the table of samples has a column of that name"),
    ],
)
def test_a_column_that_is_not_there_is_answered_in_a_line(name: str, said: str, tmp_path: Path) -> None:
    """As those of the pairs are."""
    with pytest.raises(SourceError, match=said):
        opened({"dataset_name": scored(tmp_path / "data")}, keep_columns=(name,))


def trained_on(cache: Path, condition: str, limit: int | None = None) -> list[int]:
    """The numbers of the samples that are left of a cache."""
    caches = [Cache.open(cache)]
    return Samples.of_all(Reader(*caches), limit, keep.choose(caches, condition)).numbers.tolist()


def test_training_sees_what_a_condition_keeps_and_the_limit_counts_that(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is NULL, or NaN, is not kept; how many are is said once."""
    assert trained_on(kept, "score > 7 and source <> 'studio'") == [0, 6, 9]
    assert capsys.readouterr().out == f"--keep score > 7 and source <> 'studio': 3 of 10 samples of {kept}\n"
    assert trained_on(kept, "score > 7", 3) == [0, 2, 5]
    assert trained_on(kept, "position % 2 and instruction like '%it%'") == [1, 3, 5, 7, 9]


def test_samples_that_stand_aside_are_not_kept(kept: Path, tmp_path: Path) -> None:
    """Whatever is true of them."""
    cache = Cache.open(kept)
    table = cache.samples()
    status = ["quarantined", *table["status"].to_pylist()[1:]]
    write_state(tmp_path, cache.manifest, table.set_column(table.column_names.index("status"), "status", [status]), {})
    (found,) = keep.choose([Cache.open(tmp_path)], "score > 7") or []
    assert found.sum() == 5
    assert Samples.of(Cache.open(tmp_path), None, found).numbers.tolist() == [2, 5, 6, 9]
    with pytest.raises(SettingsError, match="true of none of the 9 samples"):
        keep.choose([Cache.open(tmp_path)], "position = 0")


def test_each_cache_must_have_the_columns_that_are_named(kept: Path, cache: Path) -> None:
    """One that lacks them is named, as is one of which nothing is left."""
    caches = [Cache.open(kept), Cache.open(cache)]
    masks = keep.choose(caches, "position < 2") or []
    assert Samples.of_all(Reader(*caches), None, masks).numbers.tolist() == [0, 1, 0, 1]
    lacks = re.escape(f"{cache}: --keep score > 7: there is no column score, but")
    with pytest.raises(SettingsError, match=f"{lacks}.*`ip2p-encode --keep_columns` adds the dataset's"):
        keep.choose(caches, "score > 7")
    with pytest.raises(SettingsError, match="that is true of none of the 10 samples of"):
        keep.choose([Cache.open(kept)], "score > 100")


def test_only_the_columns_that_are_named_are_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition on one number costs no reading of texts, and training reads none of the kept columns."""
    read: list[list[str]] = []
    original = pq.read_table

    def spy(*args: object, **options: object) -> pa.Table:
        table = original(*args, **options)  # type: ignore[arg-type]
        read.append(table.column_names)
        return table

    monkeypatch.setattr(pq, "read_table", spy)
    assert trained_on(kept, "score > 7") == [0, 2, 5, 6, 9]
    assert [columns for columns in read if "score" in columns] == [["score"]]
    assert not any("source" in columns for columns in read)


def test_one_process_evaluates_and_tells_the_others(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take its word, and its error: none of them asks SQLite, whose versions may differ."""
    told: list[object] = []
    monkeypatch.setattr(agree, "broadcast_object_list", told.extend)
    caches = [Cache.open(kept)]
    (expected,) = keep.choose(caches, "score > 7") or []
    with pytest.raises(SettingsError, match="true of none"):
        keep.choose(caches, "score > 100")
    assert len(told) == 2
    monkeypatch.setattr(keep, "some_kept", lambda *_: pytest.fail("asked by a process that is not the main one"))
    monkeypatch.setattr(agree.PartialState, "is_main_process", property(lambda _: False))

    def receive(objects: list[object]) -> None:
        objects[0] = told.pop(0)

    monkeypatch.setattr(agree, "broadcast_object_list", receive)
    (found,) = keep.choose(caches, "score > 7") or []
    assert np.array_equal(found, expected)
    with pytest.raises(SettingsError, match="true of none"):
        keep.choose(caches, "score > 100")


def test_a_run_trains_on_what_is_kept_and_its_card_says_so(
    sd: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command; bars in the condition do not break the card's table."""
    condition = "score > 7 and source || '' = 'web'"
    main(flags(sd, kept, tmp_path, keep=condition, max_train_steps=1))
    assert f"--keep {condition}: 2 of 10 samples" in capsys.readouterr().out
    assert r"| keep | score > 7 and source \|\| '' = 'web' |" in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(flags(sd, kept, tmp_path / "other", keep="scor > 7", max_train_steps=1))
    assert stopped.value.code == 2
    assert "no column scor, but" in capsys.readouterr().err


def test_info_tells_truth_from_numbers(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As whoever writes a condition wants to know; conditions take it for a number."""
    cache = Cache.open(Path(shutil.copytree(kept, tmp_path / "cache")))
    samples = cache.samples().append_column("good", [[True, False, None, True, *[False] * 6]])
    write_state(cache.folder, cache.manifest, samples, cache.commits())
    keeper(["info", str(cache.folder), "--keep", "good = 1"])
    told = capsys.readouterr().out
    assert "columns   score (number), source (text), good (boolean)\n" in told
    assert "--keep    2 of 10 samples: good = 1\n" in told
