"""Tests of tables: streams are read once and no further than needed, and text stays text."""

from pathlib import Path

import pytest

from forms import PAIRS, Kind, metadata_csv, opened, parquet, paths, stream
from ip2p.encode.base.errors import SampleError, SourceError
from ip2p.encode.data import tables


def test_a_stream_is_fetched_no_further_than_needed(tmp_path: Path) -> None:
    """With --max_train_samples a stream stops there: what lies behind it may even be unreadable."""
    flags = stream(tmp_path / "data", PAIRS)
    (tmp_path / "data" / "train-00001-of-00002.parquet").write_bytes(b"not Parquet")
    source = opened(flags, max_train_samples=20)
    assert [source[index] for index in range(20)] == PAIRS[:20]
    with pytest.raises(SourceError, match="cannot be opened"):
        opened(flags)


def test_a_stream_is_read_once_and_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped in the middle of a stream leaves nothing; a finished one spares the next run the stream."""
    flags, file_bytes = stream(tmp_path / "data", PAIRS[:9]), tables.file_bytes
    read: list[object] = []

    def counted(image: object, folder: Path) -> bytes | None:
        read.append(image)
        if len(read) == 11:
            raise OSError("the network is gone")
        return file_bytes(image, folder)

    monkeypatch.setattr(tables, "file_bytes", counted)
    with pytest.raises(SourceError, match="the network is gone"):
        opened(flags)
    source = opened(flags)
    assert len(read) == 11 + 18
    again = opened(flags)
    assert len(read) == 11 + 18
    assert [again[index] for index in range(9)] == [source[index] for index in range(9)] == PAIRS[:9]


@pytest.mark.parametrize("instruction", ["None", "null", "NA", "nan"])
def test_words_that_mean_nothing_elsewhere_are_instructions(instruction: str, tmp_path: Path) -> None:
    """A table of text is not a table of numbers with gaps."""
    assert opened(metadata_csv(tmp_path / "data", [PAIRS[0]._replace(instruction=instruction)]))[0][2] == instruction


@pytest.mark.parametrize("kind", [parquet, stream], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["column_kinds", "file_in"])
def test_a_mistake_of_ours_is_not_taken_for_one_of_the_dataset(
    kind: Kind, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the datasets library raises means that a dataset cannot be opened."""

    def mistaken(*_: object) -> None:
        raise KeyError("ours")

    flags = kind(tmp_path / "data", PAIRS[:4])
    monkeypatch.setattr(tables, name, mistaken)
    with pytest.raises(KeyError, match="ours"):
        opened(flags)[0] if name == "column_kinds" or kind is stream else opened(flags)._rows.name(0)


def test_an_image_that_a_stream_did_not_find_is_looked_for_again(tmp_path: Path) -> None:
    """It costs its sample alone, with the reason, and is there once its file is."""
    flags = paths(tmp_path / "data", PAIRS[:4]) | {"streaming": True}
    file = tmp_path / "data" / "images" / "1a.jpg"
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file)
    source = opened(flags)
    assert [source[index] for index in (0, 2, 3)] == [PAIRS[0], *PAIRS[2:4]]
    with pytest.raises(SampleError, match="Too many levels of symbolic links"):
        source[1]
    before = source.fingerprint()
    file.unlink()
    file.write_bytes(content)
    again = opened(flags)
    assert again[1] == PAIRS[1]
    assert again.fingerprint() != before
