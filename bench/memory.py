"""What training needs of a GPU's memory, by simulation (`ip2p.train.memory`, `need`): a table, and a check.

The check: steps whose peak memory `bench/gpu.py` has measured, with the average, bfloat16 copies of float32 masters,
AdamW, and the kernels for norms. The table: with which flags a model fits on which card.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, parser, report
from shapes import SIZES, make_unet, make_vae

from ip2p.encode.base.flags import parse
from ip2p.train.config import TrainConfig
from ip2p.train.memory import Shapes, simulate
from ip2p.train.need import Model, Need, needed
from ip2p.train.unet.weights import Precision
from ip2p.train.watch.frozen import Frozen

# All with validation, and with the average, but that on the host.
SAVING = "--gradient_checkpointing --mixed_precision bf16 --use_ema --ema_device cpu --num_validation_samples 4"
FITS: list[tuple[int, str, int, int, str]] = [  # GB of a card, model, pixels, samples in a batch, flags
    (8, "sd15", 512, 4, "--lora_rank 16"),
    (8, "sd15", 512, 4, "--weights bf16 --use_8bit_adam"),
    (8, "sdxl", 512, 4, "--lora_rank 16"),
    (12, "sd15", 256, 4, "--use_8bit_adam"),
    (12, "sd15", 512, 4, "--use_8bit_adam"),
    (12, "sdxl", 1024, 1, "--lora_rank 16"),
    (12, "sdxl", 1024, 1, "--weights bf16 --optimizer adafactor --fused_backward --max_grad_norm inf"),
    (16, "sd15", 512, 16, "--use_8bit_adam"),
    (16, "sdxl", 1024, 4, "--lora_rank 16"),
    (16, "sdxl", 1024, 1, "--weights bf16 --use_8bit_adam --fused_backward --max_grad_norm inf"),
    (24, "sd15", 512, 16, ""),
    (24, "sdxl", 1024, 4, "--weights bf16 --use_8bit_adam"),
    (24, "sdxl", 1024, 1, "--weights bf16"),
    (32, "sdxl", 1024, 4, "--use_8bit_adam"),
    (48, "sdxl", 512, 4, ""),
    (48, "sdxl", 1024, 4, ""),
]
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
    for card, size, resolution, batch, words in FITS:
        name = ", ".join(filter(None, [size, f"{resolution} px", f"batch {batch}", words]))
        if re.search(args.only, name):
            rows += list(fits(name, card, needed(config_of(batch, words), model_of(size, resolution))))
    report("memory", args, rows)


def config_of(batch: int, words: str) -> TrainConfig:
    """A run with `SAVING` and some flags more."""
    places = "--pretrained_model_name_or_path model --cache cache --output_dir out"
    return parse(TrainConfig, f"{places} {SAVING} --train_batch_size {batch} {words}".split(), "ip2p-train")


def fits(name: str, card: int, need: Need) -> Iterator[Row]:
    """What a run takes in a step and when it draws pictures, and the card that it asks for."""
    static = need.weights + need.moments + need.average
    yield Row(f"{name}: a step", (static + need.gradients + need.activations) / 2**30, "GiB")
    yield Row(f"{name}: a validation", (static + need.validation) / 2**30, "GiB")
    yield Row(f"{name}: a card of", need.card / 2**30, "GiB", at_most=card)


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


def model_of(size: str, resolution: int) -> Model:
    """A whole model by its configurations; SDXL with its own VAE, which half precision is too small for."""
    shape = SIZES[size]
    with torch.device("meta"):
        vae = dict(make_vae(shape).config)
    return Model(*shape_of(size, resolution), Frozen(vae, shape.text, vae_overflows=size == "sdxl"))


if __name__ == "__main__":
    main()
