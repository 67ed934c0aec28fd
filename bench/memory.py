"""What a training step needs of a GPU's memory, by simulation (`ip2p.train.memory`, `need`): a table, and a check.

The check: steps whose peak memory `bench/gpu.py` has measured, with the average, bfloat16 copies of float32 masters,
AdamW, and the kernels for norms. The table: with which flags a model fits on which card.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, parser, report
from shapes import SIZES, make_unet

from ip2p.encode.base.flags import build
from ip2p.train.config import TrainConfig
from ip2p.train.memory import Shapes, simulate
from ip2p.train.need import Model, needed
from ip2p.train.unet.weights import Precision

# With the average, but on the host.
SAVING = {"gradient_checkpointing": True, "use_ema": True, "ema_device": "cpu", "mixed_precision": "bf16"}
FITS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "sd15, 256 px, batch 4, --use_8bit_adam": ("sd15", 256, 12, {"use_8bit_adam": True, "train_batch_size": 4}),
    "sd15, 512 px, batch 4, --use_8bit_adam": ("sd15", 512, 12, {"use_8bit_adam": True, "train_batch_size": 4}),
    "sd15, 512 px, batch 4, --weights bf16": ("sd15", 512, 12, {"weights": "bf16", "train_batch_size": 4}),
    "sd15, 512 px, batch 4, --lora_rank 16": ("sd15", 512, 8, {"lora_rank": 16, "train_batch_size": 4}),
    "sdxl, 1024 px, batch 1, --lora_rank 16": ("sdxl", 1024, 12, {"lora_rank": 16, "train_batch_size": 1}),
    "sdxl, 1024 px, batch 1, --weights bf16": ("sdxl", 1024, 24, {"weights": "bf16", "train_batch_size": 1}),
    "sdxl, 1024 px, batch 4, --weights bf16 --use_8bit_adam": (
        *("sdxl", 1024, 24),
        {"weights": "bf16", "use_8bit_adam": True, "train_batch_size": 4},
    ),
}
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
    for name, (size, resolution, card, given) in FITS.items():
        if re.search(args.only, name):
            places = {"pretrained_model_name_or_path": "model", "cache": "cache", "output_dir": "out"}
            config = build(TrainConfig, {**places, **SAVING, **given})
            need = needed(config, Model(*shape_of(size, resolution)))
            rows.append(Row(f"{name}: a card of", need.card / 2**30, "GiB", at_most=card))
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
    config, shapes = shape_of(size, resolution)
    found = simulate(config, shapes, batch, Precision("bf16", copies=True), checkpointing=checkpointing)
    return (found.static + found.peak + (MOMENTS + AVERAGE) * found.numbers) / 2**30


def shape_of(size: str, resolution: int) -> tuple[dict[str, Any], Shapes]:
    """The configuration of a UNet, and what it is given."""
    shape, side = SIZES[size], resolution // 8
    with torch.device("meta"):
        config = dict(make_unet(shape).config)
    return config, Shapes((8, side, side), (77, shape.text_width), shape.pooled)


if __name__ == "__main__":
    main()
