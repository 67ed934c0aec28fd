"""The same pairs in every form that a dataset may have: builders that return the flags which name it."""

import contextlib
import csv
import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

import tiny
from configs import encode_config
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.data.pairs import Pair, Pairs

Flags = dict[str, object]
Kind = Callable[[Path, list[Pair]], Flags]
NAMES: tuple[str, ...] = ("input_image", "edited_image", "edit_prompt")


@functools.cache
def pair(number: int) -> Pair:
    """A pair of small pictures; four neighbors share an instruction."""
    return Pair(jpeg(2 * number), jpeg(2 * number + 1), f"make it {tiny.WORDS[number // 4]}")


@functools.cache
def jpeg(number: int) -> bytes:
    """The file of a picture of 12 by 8 pixels."""
    file = io.BytesIO()
    tiny.picture(number, (12, 8)).save(file, "JPEG")
    return file.getvalue()


def columns(pairs: list[Pair], names: tuple[str, ...] = NAMES) -> dict[str, list]:
    """Pairs as columns."""
    return {name: [pair[n] for pair in pairs] for n, name in enumerate(names)}


def image_files(folder: Path, pairs: list[Pair]) -> list[dict[str, str]]:
    """Write the images into a folder below `folder`; returns rows that name them."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (original, edited, instruction, *_) in enumerate(pairs):
        row = dict(zip(NAMES, (f"images/{number}a.jpg", f"images/{number}b.jpg", instruction), strict=True))
        (folder / row["input_image"]).write_bytes(original or b"")
        (folder / row["edited_image"]).write_bytes(edited or b"")
        rows.append(row)
    return rows


def parquet(folder: Path, pairs: list[Pair]) -> Flags:
    """Image columns of the datasets library."""
    features = datasets.Features(dict.fromkeys(NAMES[:2], datasets.Image()) | {"edit_prompt": datasets.Value("string")})
    folder.mkdir()
    table = datasets.Dataset.from_dict(columns(pairs), features=features)
    half = len(pairs) // 2
    table.select(range(half)).to_parquet(folder / "train-00000-of-00002.parquet")
    table.select(range(half, len(pairs))).to_parquet(folder / "train-00001-of-00002.parquet")
    return {"dataset_name": folder}


def stream(folder: Path, pairs: list[Pair]) -> Flags:
    """The same, read as a stream."""
    return parquet(folder, pairs) | {"streaming": True}


def image_lists(folder: Path, pairs: list[Pair]) -> Flags:
    """Lists of images, of which the first counts, in a dataset on the disk; lists of instructions as well."""
    features = datasets.Features(
        dict.fromkeys(NAMES[:2], datasets.List(datasets.Image()))
        | {"edit_prompt": datasets.List(datasets.Value("string"))}
    )
    rows = columns([Pair([a, jpeg(999)], [b], [text, "unused"]) for a, b, text, _ in pairs])  # type: ignore[arg-type]
    datasets.DatasetDict({"only": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(folder)
    return {"dataset_name": folder}


def raw_bytes(folder: Path, pairs: list[Pair]) -> Flags:
    """Binary columns of an Arrow file that no library of images wrote."""
    folder.mkdir()
    table = pa.table(columns(pairs))
    with pa.ipc.new_stream(folder / "pairs.arrow", table.schema) as file:
        file.write_table(table)
    return {"dataset_name": folder / "pairs.arrow"}


def views(folder: Path, pairs: list[Pair]) -> Flags:
    """Columns of the newer kind of binary values and texts, as other libraries write them."""
    folder.mkdir()
    types = (pa.binary_view(), pa.binary_view(), pa.string_view())
    arrays = [pa.array(values, type_) for values, type_ in zip(columns(pairs).values(), types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, NAMES), folder / "pairs.parquet")
    return {"dataset_name": folder / "pairs.parquet"}


def paths(folder: Path, pairs: list[Pair]) -> Flags:
    """Columns of paths relative to the folder of the dataset."""
    rows = image_files(folder, pairs)
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    return {"dataset_name": folder}


def metadata_jsonl(folder: Path, pairs: list[Pair]) -> Flags:
    """A folder of images with a line of JSON for each pair."""
    lines = [json.dumps(row) for row in image_files(folder, pairs)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"train_data_dir": folder}


def prompt_lists(folder: Path, pairs: list[Pair]) -> Flags:
    """A file of lines of JSON beside the images, each with a list of instructions, of which the first counts."""
    rows = [row | {"edit_prompt": [row["edit_prompt"], "unused"]} for row in image_files(folder, pairs)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"dataset_name": folder / "pairs.jsonl"}


def csv_file(folder: Path, pairs: list[Pair]) -> Flags:
    """A table of text beside the images, under any name."""
    metadata_csv(folder, pairs)
    return {"dataset_name": (folder / "metadata.csv").rename(folder / "Pairs.CSV")}


def metadata_csv(folder: Path, pairs: list[Pair]) -> Flags:
    """A folder of images with a table of text."""
    rows = image_files(folder, pairs)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(rows)
    return {"train_data_dir": folder}


def metadata_parquet(folder: Path, pairs: list[Pair]) -> Flags:
    """A folder of images with a Parquet file."""
    pq.write_table(pa.Table.from_pylist(image_files(folder, pairs)), folder / "metadata.parquet")
    return {"train_data_dir": folder}


def add(tar: tarfile.TarFile, name: str, content: bytes | None) -> None:
    """Add a file to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content or b"")
    tar.addfile(member, io.BytesIO(content or b""))


def shards(folder: Path, pairs: list[Pair]) -> Flags:
    """WebDataset tar files with the instruction in a text file."""
    folder.mkdir()
    step = -(-len(pairs) // 3)
    for shard in range(3):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as tar:
            for number, (original, edited, text, *_) in enumerate(pairs[shard * step : (shard + 1) * step]):
                add(tar, f"some/{number:04}.original.jpg", original)
                add(tar, f"some/{number:04}.edited.jpg", edited)
                add(tar, f"some/{number:04}.txt", f"{text}\n".encode())
    return {"dataset_name": folder / "pairs-{0..2}.tar"}


def shards_by_url(folder: Path, pairs: list[Pair]) -> Flags:
    """The same by url, with the instruction in a JSON object."""
    folder.mkdir()
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number, (original, edited, text, *_) in enumerate(pairs):
            add(tar, f"{number:04}.edited.png", edited)
            add(tar, f"{number:04}.json", json.dumps({"edit_prompt": text, "score": 0.5}).encode())
            add(tar, f"{number:04}.original.png", original)
    return {"dataset_name": (folder / "pairs.tar").as_uri(), "cache_dir": folder / "downloads"}


def seeds(folder: Path, pairs: list[Pair]) -> Flags:
    """The layout of the InstructPix2Pix repository."""
    listed: list[tuple[str, list[str]]] = []
    for number, (original, edited, text, *_) in enumerate(pairs):
        place = folder / f"{number // 4:07}"
        if number % 4 == 0:
            place.mkdir(parents=True)
            (place / "prompt.json").write_text(json.dumps({"input": "a cat", "edit": text, "output": "a dog"}))
            listed.append((place.name, []))
        seed = str(1000 - number)
        listed[-1][1].append(seed)
        (place / f"{seed}_0.jpg").write_bytes(original or b"")
        (place / f"{seed}_1.jpg").write_bytes(edited or b"")
    (folder / "seeds.json").write_text(json.dumps(listed))
    return {"train_data_dir": folder}


PAIRS = [pair(number) for number in range(64)]
KINDS = [
    parquet,
    stream,
    image_lists,
    prompt_lists,
    raw_bytes,
    views,
    paths,
    metadata_jsonl,
    metadata_csv,
    metadata_parquet,
    csv_file,
    shards,
    shards_by_url,
    seeds,
]


def opened(flags: Flags, **more: object) -> Pairs:
    """The source that flags mean."""
    values: dict[str, Any] = {name: str(v) if name == "dataset_name" else v for name, v in (flags | more).items()}
    config = encode_config(**values)
    return open_pairs(config.dataset, config.model.cache_dir, config.scores)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the files of a folder; yields the url."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server that says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
