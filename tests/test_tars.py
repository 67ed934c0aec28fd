"""Tests of WebDataset tar files: grouped as the webdataset package does, indexed once, fetched once."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from forms import PAIRS, add, opened, serve, shards
from ip2p.encode.base.errors import SourceError
from ip2p.encode.data import tars

NAMED = st.tuples(
    st.sampled_from(["", "a/", "./", "a.b/", "__meta__/"]),
    st.sampled_from(["1", "2", "x y", "__key__", ".hidden"]),
    st.sampled_from(["", ".jpg", ".original.JPG", ".edited.jpg", ".txt", ".json", "."]),
).map("".join)


@hypothesis.given(st.lists(NAMED, unique=True))
@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
def test_tar_files_are_grouped_as_the_webdataset_package_does(names: list[str]) -> None:
    """Samples, their suffixes and the bytes of each member agree with what the package yields."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.tar")
        with tarfile.open(path, "w") as tar:
            for number, name in enumerate(names):
                add(tar, name, f"content {number}".encode())
                if number == 1:
                    tar.addfile(member_of_type(tarfile.DIRTYPE))
        try:
            with path.open("rb") as file:  # the package itself leaves files open
                package = group_by_keys(tar_file_expander([{"url": "shard.tar", "stream": file}]))
                expected = [{name: value for name, value in sample.items() if name[:2] != "__"} for sample in package]
        except ValueError:  # it says "duplicate file name"
            with pytest.raises(SourceError, match="twice"):
                tars.index(path)
            return
        found: dict[int, dict[str, bytes]] = {}
        for row in tars.index(path).to_pylist():
            content = path.read_bytes()[row["offset"] :][: row["size"]]
            found.setdefault(row["sample"], {})[row["suffix"]] = content
        assert list(found.values()) == expected


def member_of_type(kind: bytes) -> tarfile.TarInfo:
    """A member that is no file."""
    member = tarfile.TarInfo("folder.jpg")
    member.type = kind
    return member


def test_a_folder_stands_for_its_tar_files(tmp_path: Path) -> None:
    """They are read in the order of their names."""
    shards(tmp_path / "data", PAIRS[:9])
    source = opened({"dataset_name": tmp_path / "data"})
    assert [source[index] for index in range(len(source))] == PAIRS[:9]


def test_an_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run finds the members without going through the tar files again."""
    flags = shards(tmp_path / "data", PAIRS[:9])
    opened(flags)
    monkeypatch.setattr(tars, "index", lambda shard: pytest.fail(f"{shard} was indexed again"))
    assert opened(flags)[8] == PAIRS[8]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The url at which the files in `tmp_path`/web are served."""
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as url:
        yield url


def test_shards_are_fetched_once_from_where_the_url_says(server: str, tmp_path: Path) -> None:
    """Braces stand for several urls; what was fetched is there when the server is not, and a failure leaves nothing."""
    shards(tmp_path / "web" / "data", PAIRS[:9])
    flags = {"dataset_name": f"{server}/data/pairs-{{0..2}}.tar", "cache_dir": tmp_path / "downloads"}
    hidden = (tmp_path / "web" / "data" / "pairs-1.tar").rename(tmp_path / "hidden.tar")
    with pytest.raises(SourceError, match=r"pairs-1\.tar cannot be fetched"):
        opened(flags)
    hidden.rename(tmp_path / "web" / "data" / "pairs-1.tar")
    assert opened(flags)[8] == PAIRS[8]
    shutil.rmtree(tmp_path / "web" / "data")
    source = opened(flags)
    assert [source[index] for index in range(9)] == PAIRS[:9]
    assert {path.suffix for path in (tmp_path / "downloads" / "tars").iterdir()} == {".tar", ".parquet"}
