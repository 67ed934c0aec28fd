"""What a training step needs of a GPU's memory, by simulation (`ip2p.train.memory`), beside what a GPU has read.

The steps are those whose peak memory `bench/gpu.py` has measured, with the average: bfloat16 copies of float32 masters,
AdamW, and the kernels for norms.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, parser, report
from shapes import SIZES, make_unet

from ip2p.train.memory import Shapes, simulate
from ip2p.train.unet.weights import Precision

STEP = re.compile(r"(\w+), (\d+) px, batch (\d+): (?:cached(, gradient checkpointing)?, )?peak memory")
MOMENTS, AVERAGE = 8, 4  # bytes of each weight


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--only", default="", help="steps whose names match, for instance 'sd15, 256'")
    args = flags.parse_args()
    rows = list[Row]()
    for name, measured in readings(args.results if (args.results / "gpu.jsonl").is_file() else RESULTS).items():
        if (found := STEP.fullmatch(name)) and re.search(args.only, name):
            size, resolution, batch, checkpointing = found.groups()
            predicted = gib(size, int(resolution), int(batch), checkpointing=bool(checkpointing))
            step = name.removesuffix(", peak memory").removesuffix(": peak memory")
            rows.append(Row(f"{step}: predicted", predicted, "GiB"))
            rows.append(Row(f"{step}: read on the GPU", measured, "GiB"))
            rows.append(Row(f"{step}: predicted / read", predicted / measured, "times", 0.97, 1.03))
    report("memory", args, rows)


def readings(results: Path) -> dict[str, float]:
    """The newest reading of each figure of bench/gpu.py on a GPU."""
    found: dict[str, Any] = {}
    for line in (results / "gpu.jsonl").read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        found |= data["rows"] if data["machine"]["gpu"] else {}
    return {name: row["value"] for name, row in found.items()}


def gib(size: str, resolution: int, batch: int, *, checkpointing: bool) -> float:
    """What a step takes at most."""
    shape = SIZES[size]
    with torch.device("meta"):
        config = dict(make_unet(shape).config)
    rows = shape.rows(resolution)
    shapes = Shapes((8, resolution // 8, resolution // 8), (77, rows["text"]["text"][-1]), shape.pooled)
    found = simulate(config, shapes, batch, Precision("bf16", copies=True), checkpointing=checkpointing)
    return (found.static + found.peak + (MOMENTS + AVERAGE) * found.numbers) / 2**30


if __name__ == "__main__":
    main()
