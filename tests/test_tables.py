"""Tests of tables: streams are read once and no further than needed, and text stays text."""

from pathlib import Path

import pytest

from forms import PAIRS, metadata_csv, opened, stream
from ip2p.encode.base.errors import SourceError
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
