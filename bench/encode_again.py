"""How long `ip2p-encode` takes where nothing, or little, is left to encode."""

import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from common import Row, parser, report
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import checkpoint

PIXELS = 16
FEATURES = datasets.Features(
    input_image=datasets.Image(), edited_image=datasets.Image(), edit_prompt=datasets.Value("string")
)


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--samples", type=int, default=100_000, help="in the dataset (default: 100000)")
    flags.add_argument("--more", type=int, default=100, help="by how many it grows (default: 100)")
    flags.add_argument("--folder", type=Path, help="where dataset and cache lie for the time being")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint(folder / "model")
        write_pairs(folder, 0, args.samples)
        first = encode(folder)
        again = [encode(folder) for _ in range(args.rounds)]
        before = shards(folder)
        write_pairs(folder, args.samples, args.more)
        grown = encode(folder)
        touched = sum(shards(folder).get(path) != when for path, when in before.items())
    rows = [
        Row("first encode", first, "s"),
        Row.of("the same again", again, "s", at_most=5),
        Row(f"with {args.more:,} more samples", grown, "s"),
        Row("finished shards that changed", touched, f"of {len(before):,}", at_most=0),
    ]
    report("encode_again", args, rows)


def write_pairs(folder: Path, first: int, count: int) -> None:
    """Add a Parquet file of `count` pairs of small noisy pictures, no two alike."""
    random = np.random.default_rng(first)
    columns = {
        "input_image": [_png(random) for _ in range(count)],
        "edited_image": [_png(random) for _ in range(count)],
        "edit_prompt": [f"turn the sky into day {number}" for number in range(first, first + count)],
    }
    (folder / "data").mkdir(exist_ok=True)
    path = folder / "data" / f"train-{first:08d}.parquet"
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(path)


def _png(random: np.random.Generator) -> dict[str, bytes | None]:
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def encode(folder: Path) -> float:
    """Seconds that the whole command takes, from its start to its end."""
    flags = {
        "pretrained_model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "cache": folder / "cache",
        "cache_dir": folder / "downloads",
        "resolution": PIXELS,
        "encode_batch_size": 256,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ip2p.encode", *words], check=True)
    return time.perf_counter() - began


def shards(folder: Path) -> dict[Path, int]:
    """When each shard and each commit record was last written."""
    files = [*(folder / "cache" / "data.zarr").glob("*/c/**/*"), *(folder / "cache" / "commits").iterdir()]
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


if __name__ == "__main__":
    main()
