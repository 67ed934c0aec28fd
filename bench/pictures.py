"""Pairs of pictures to encode, about as detailed as photographs: `python bench/pictures.py FOLDER FIRST COUNT SIDE`."""

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

FEATURES = datasets.Features(
    input_image=datasets.Image(), edited_image=datasets.Image(), edit_prompt=datasets.Value("string")
)


def write_pairs(folder: Path, first: int, count: int, side: int) -> None:
    """Add a Parquet file with the pairs from `first` on, JPEG files of `side` pixels, no two alike."""
    random = np.random.default_rng(first)
    columns: dict[str, Any] = {
        "input_image": [_jpeg(random, side) for _ in range(count)],
        "edited_image": [_jpeg(random, side) for _ in range(count)],
        "edit_prompt": [f"turn the sky into day {number}" for number in range(first, first + count)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(folder / f"train-{first:06d}.parquet")


def _jpeg(random: np.random.Generator, side: int) -> dict[str, bytes | None]:
    file, coarse = io.BytesIO(), random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    return {"bytes": file.getvalue(), "path": None}


if __name__ == "__main__":
    write_pairs(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
