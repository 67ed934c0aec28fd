"""What the name of a dataset means on this machine, and where results may not lie."""

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

import tiny
from configs import encode_config
from forms import KINDS, PAIRS, Flags, Kind, metadata_jsonl, opened, parquet, prompt_lists, seeds, serve, shards
from ip2p.encode.__main__ import main
from ip2p.encode.base.errors import SettingsError, SourceError
from ip2p.encode.base.flags import changed
from ip2p.encode.data.pairs import Pairs
from ip2p.encode.data.places import check_place
from ip2p.infer.config import InferConfig, Inputs, Outputs
from ip2p.infer.jobs import find_jobs


def instructions(source: Pairs) -> list[object]:
    """The instruction of each sample."""
    return [source[index].instruction for index in range(len(source))]


APART = PAIRS[::4][:6]  # six pairs of six instructions


def of(*numbers: int) -> list[object]:
    """The instructions of some of them."""
    return [APART[number].instruction for number in numbers]


def folder(path: Path) -> Flags:
    """Parquet files of a split."""
    return parquet(path, APART)


def single(path: Path) -> Flags:
    """What `save_to_disk` wrote of one split."""
    table = datasets.load_dataset(str(folder(path.parent / "source")["dataset_name"]), split="train")
    table.save_to_disk(path)
    return {"dataset_name": path}


def unnamed(path: Path) -> Flags:
    """What `save_to_disk` wrote of a dataset that is no split."""
    datasets.Dataset.from_dict({name: [pair[n] for pair in APART] for n, name in enumerate(COLUMNS)}).save_to_disk(path)
    return {"dataset_name": path}


def several(path: Path) -> Flags:
    """What `save_to_disk` wrote of several splits."""
    table = datasets.load_dataset(str(folder(path.parent / "source")["dataset_name"]), split="train")
    datasets.DatasetDict({"train": table, "test": table.select([5])}).save_to_disk(path)
    return {"dataset_name": path}


COLUMNS = ("input_image", "edited_image", "edit_prompt")
every_form = pytest.mark.parametrize("form", [folder, single, unnamed, several], ids=lambda form: form.__name__)


@every_form
@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("train", of(*range(6))),
        ("train[:2]", of(0, 1)),
        ("train[50%:]", of(3, 4, 5)),
        ("train[:1]+train[-1:]", of(0, 5)),
    ],
)
def test_a_split_may_be_sliced_wherever_it_lies(
    form: Callable[[Path], Flags], split: str, found: list[object], tmp_path: Path
) -> None:
    """Encoding and editing take the same rows, in a folder of files and of all that `save_to_disk` writes."""
    flags = form(tmp_path / "data")
    assert instructions(opened(flags, split=split)) == found
    table = Inputs(table=str(flags["dataset_name"]))
    assert [job.prompt for job in find_jobs(changed(InferConfig("m", table, Outputs("o")), split=split))] == found


@every_form
@pytest.mark.parametrize("split", ["nonsense", "nonsense[:2]", "train[:2", "train+nonsense"])
def test_a_split_that_is_not_there_is_refused(form: Callable[[Path], Flags], split: str, tmp_path: Path) -> None:
    """No name is passed over because there is but one split."""
    with pytest.raises(SourceError, match=r"--split"):
        opened(form(tmp_path / "data"), split=split)


def test_splits_add_up_to_all(tmp_path: Path) -> None:
    """As in the datasets library."""
    assert instructions(opened(several(tmp_path / "data"), split="all")) == of(*range(6), 5)


@pytest.mark.parametrize("name", ["pa{1}rs", "a{1,2}b", "a,b c", "x.tar", "a[1]*?", "${HOME}", "a::b"])
@pytest.mark.parametrize("kind", [parquet, metadata_jsonl, shards, seeds], ids=lambda kind: kind.__name__)
def test_a_folder_that_is_there_is_no_pattern(kind: Kind, name: str, tmp_path: Path) -> None:
    """Its name stands for it; where the datasets library takes that for another, a line says so."""
    flags = kind(tmp_path / name, PAIRS[:3])
    flags |= dict.fromkeys(flags, tmp_path / name)  # not a pattern of what lies in it
    if (kind is parquet and "*" in name) or (kind in (parquet, metadata_jsonl) and name in ("${HOME}", "a::b")):
        with pytest.raises(SourceError, match="for a pattern: rename it"):
            opened(flags)
    else:
        assert len(opened(flags)) == 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ != "shards_by_url"], ids=lambda k: k.__name__)
def test_a_url_of_a_file_on_this_machine_is_its_path(kind: Kind, tmp_path: Path) -> None:
    """`file://` is read as the path that it holds, with the files beside it."""
    flags = kind(tmp_path / "my data", PAIRS[:3])
    place = Path(str(flags.get("dataset_name") or flags["train_data_dir"]))
    if place.exists():  # not a pattern
        more = {name: value for name, value in flags.items() if name == "streaming"}
        assert [opened({"dataset_name": place.as_uri()} | more)[n] for n in range(3)] == PAIRS[:3]


def test_a_url_is_read_by_its_ending(tmp_path: Path) -> None:
    """A table on a server is a table; a page is none."""
    parquet(tmp_path / "data", PAIRS[:4])
    with serve(tmp_path / "data") as server:
        source = opened({"dataset_name": f"{server}/train-00000-of-00002.parquet", "streaming": True})
        assert [source[0], source[1]] == PAIRS[:2]
    with pytest.raises(SourceError, match=r"ends in .*\.parquet or \.tar; a dataset on the Hub is named OWNER/NAME"):
        opened({"dataset_name": "https://huggingface.co/datasets/fusing/instructpix2pix-1000-samples"})


@pytest.mark.parametrize("kind", [metadata_jsonl, prompt_lists, shards], ids=lambda kind: kind.__name__)
def test_endings_may_be_in_capitals(kind: Kind, tmp_path: Path) -> None:
    """The only file of a folder, the list of its pairs, and tar files are found by whichever case."""
    kind(tmp_path / "data", PAIRS[:3])
    for file in [file for file in (tmp_path / "data").iterdir() if file.is_file()]:
        file.rename(file.with_suffix(file.suffix.upper()))
    assert len(opened({"dataset_name": tmp_path / "data"})) == 3
    if kind is prompt_lists:
        assert len(opened({"dataset_name": (tmp_path / "data" / "pairs.JSONL")})) == 3


def test_several_files_in_capitals_are_not_passed_over(tmp_path: Path) -> None:
    """`datasets` would not find them: a line says so."""
    parquet(tmp_path / "data", PAIRS[:4])
    file = tmp_path / "data" / "train-00000-of-00002.parquet"
    file.rename(file.with_suffix(".PARQUET"))
    with pytest.raises(SourceError, match=r"\.PARQUET would not be found in its folder: write its ending in small"):
        opened({"dataset_name": tmp_path / "data"})


@pytest.mark.parametrize("cache", ["data", "data/cache", "data/deep/er", "."])
def test_a_cache_lies_neither_in_its_dataset_nor_around_it(
    cache: str, sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before any work, and nothing is made there."""
    flags = parquet(tmp_path / "data", PAIRS[:4]) | {"cache": tmp_path / cache, "pretrained_model_name_or_path": sd}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        main(tiny.arguments(flags))
    assert f"--cache {tmp_path / cache} lies" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [metadata_jsonl, seeds, shards], ids=lambda kind: kind.__name__)
def test_a_cache_may_lie_where_nothing_is_searched(kind: Kind, tmp_path: Path) -> None:
    """A folder with a list of its pairs is what the list says, whatever lies beside that."""
    kind(tmp_path / "data", PAIRS[:3])
    dataset = encode_config(dataset_name=str(tmp_path / "data")).dataset
    check_place(dataset, tmp_path / "data" / "cache", "--cache", alone=True)
    with pytest.raises(SettingsError, match=r"--cache .* lies around"):
        check_place(dataset, tmp_path / "data", "--cache", alone=True)
    os.symlink(tmp_path, tmp_path / "link")
    with pytest.raises(SettingsError, match=r"--cache .* lies around"):
        check_place(dataset, tmp_path / "link", "--cache", alone=True)


@pytest.mark.parametrize("flag", ["streaming", "dataset_config_name", "dataset_revision"])
def test_what_was_saved_has_no_use_for_flags_of_the_hub(flag: str, tmp_path: Path) -> None:
    """Each is refused, as for tar files."""
    with pytest.raises(SourceError, match=f"leave out --{flag}"):
        opened(single(tmp_path / "data"), **{flag: True if flag == "streaming" else "x"})
