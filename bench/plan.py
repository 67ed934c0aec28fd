"""What planning costs with a million samples: new ones, those that a cache has already, and for training."""

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import Row, parser, report, take_turns

import ip2p.encode.run  # noqa: F401  what an encode has in memory when it plans
from ip2p.encode.base.files import content_key
from ip2p.encode.base.flags import parse
from ip2p.encode.cache.format import SAMPLES, Cache
from ip2p.encode.cache.samples import Ledger
from ip2p.encode.cache.shapes import row_shapes
from ip2p.encode.cached import Samples
from ip2p.encode.config import NO_FLIP, EncodeConfig
from ip2p.encode.geometry import Geometry
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.planning.index import Index
from ip2p.encode.planning.plan import placed

PIXELS = 16
ROWS = {"images": 8192, "text": 2304}  # of the shards of a cache of this size, at 256 pixels
Measured = tuple[float, float, float]  # seconds, seconds of all cores, and peak memory of the process in GiB
SQUARES = Geometry(PIXELS, "squash", "white")


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--samples", type=int, default=1_000_000, help="in the dataset (default: 1000000)")
    flags.add_argument("--folder", type=Path, help="where dataset and cache lie for the time being")
    args = flags.parse_args()
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_index(folder, args.samples)
        command = write_cache(folder, args.samples)
        parts: dict[str, Callable[[], Measured]] = {
            "nothing": lambda: alone(nothing),
            "plan": lambda: alone(plan, folder, args.samples),
            "again": lambda: alone(plan_again, folder),
            "training": lambda: alone(open_samples, folder),
            "encode": lambda: alone(encode, command),
        }

        def seconds(part: str) -> float:
            found.setdefault(part, []).append(parts[part]())
            return found[part][-1][0]

        times = take_turns(args.rounds, {part: lambda part=part: seconds(part) for part in parts})
    cores = {part: [cores for _, cores, _ in values] for part, values in found.items()}
    memory = {part: [peak for _, _, peak in values] for part, values in found.items()}
    rows = [
        Row.of("plan", times["plan"], "s", at_most=3),
        Row.of("plan, on all cores", cores["plan"], "s"),
        Row.of("plan, peak memory", memory["plan"], "GiB", at_most=0.9),
        Row.of("of which libraries", memory["nothing"], "GiB"),
        Row.of("plan of a cache that has all of it", times["again"], "s"),
        Row.of("the same, peak memory", memory["again"], "GiB"),
        Row.of("the same, on all cores", cores["again"], "s"),
        Row.of("a finished encode again, whole command", times["encode"], "s", at_most=6),
        Row.of("a finished encode again, on all cores", cores["encode"], "s"),
        Row.of("samples for training", times["training"], "s", at_most=1),
        Row.of("samples for training, on all cores", cores["training"], "s"),
        Row.of("samples for training, peak memory", memory["training"], "GiB"),
    ]
    report("plan", args, rows)


def alone(part: Callable[..., float], *arguments: object) -> Measured:
    """What a part takes in a process of its own, which has imported all of this."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, part, *arguments).result()


def _measured(part: Callable[..., float], *arguments: object) -> Measured:
    before = os.times()
    seconds, after = part(*arguments), os.times()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return seconds, sum(after[:4]) - sum(before[:4]), int(status["VmHWM"].split()[0]) / 2**20


def nothing() -> float:
    return 0


def plan(folder: Path, samples: int) -> float:
    """Seconds from the identities on the disk to rows for all samples, and what is to be done."""
    began, ledger = time.perf_counter(), Ledger({}, ROWS, 1)
    table = Index(folder, "bench", samples, SQUARES).read()
    table = placed(table, ledger, NO_FLIP)
    work = list(ledger.missing(table))
    assert sum(len(rows) for _, rows in work) == 2 * samples + 1
    return time.perf_counter() - began


def plan_again(folder: Path) -> float:
    """The same where a cache holds all of it: seconds from its manifest on."""
    began = time.perf_counter()
    cache = Cache.open(folder / "cache")
    ledger, table = Ledger.of(cache), cache.samples()
    assert not list(ledger.missing(placed(table, ledger, NO_FLIP)))
    return time.perf_counter() - began


def open_samples(folder: Path) -> float:
    """Seconds until training knows its samples."""
    began = time.perf_counter()
    Samples.of(Cache.open(folder / "cache"), None)
    return time.perf_counter() - began


def write_index(folder: Path, samples: int) -> None:
    """What is known of a dataset that was read: each pair and each instruction is its own."""
    index = Index(folder, "bench", samples, SQUARES)
    for number, span in enumerate(index.spans):
        keys = [content_key(b"%d" % position) for position in span]
        texts = [f"turn the sky into day {position}, and let the dog go left" for position in span]
        columns = {field.name: pa.nulls(len(span), field.type) for field in SAMPLES}
        columns |= {"key": keys, "pair": keys, "position": np.array(span), "instruction": texts}
        columns |= {"row": np.full(len(span), -1), "text_row": np.full(len(span), -1)}
        columns |= {"status": ["pending"] * len(span)}
        index.keep(number, pa.table(columns, SAMPLES))


def write_cache(folder: Path, samples: int) -> list[str]:
    """A dataset, and a cache that says that it is encoded; returns the command that encodes it."""
    import datasets  # here, so that the processes whose memory is measured do not have diffusers in it
    from encode_again import FEATURES
    from PIL import Image
    from synthetic import build

    from tiny import checkpoint

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    (folder / "data").mkdir()
    image = {"bytes": file.getvalue(), "path": None}
    for first in range(0, samples, 2**17):
        numbers = range(first, min(first + 2**17, samples))
        columns = {"input_image": [image] * len(numbers), "edited_image": [image] * len(numbers)}
        columns |= {"edit_prompt": [f"{number:032x}" for number in numbers]}
        table = datasets.Dataset.from_dict(columns, features=FEATURES)
        table.to_parquet(folder / "data" / f"train-{first:08d}.parquet")
    flags = {
        "pretrained_model_name_or_path": checkpoint(folder / "model"),
        "dataset_name": folder / "data",
        "cache": folder / "cache",
        "cache_dir": folder / "downloads",
        "resolution": PIXELS,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    model = Checkpoint(folder / "model")
    shapes = row_shapes(model.latent_channels, (PIXELS // model.vae_scale_factor,) * 2, *model.text_shape())
    build(folder / "cache", samples, shapes, folder / "model", parse(EncodeConfig, words, "bench"))
    return [sys.executable, "-m", "ip2p.encode", *words]


def encode(command: list[str]) -> float:
    """Seconds that the whole command takes, from its start to its end; it must find nothing to do."""
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "nothing to encode" in done.stdout, done.stdout
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
