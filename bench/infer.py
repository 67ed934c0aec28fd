"""Edits in a second: `Editor` against the pipeline of diffusers, in turns, with random weights.

What guidance weighs with zero is not computed: two passes of the UNet where three are at image scale 1 and at equal
scales, one in the steps outside an interval. Without a GPU one thread computes, and its own seconds count, so that
what else runs on the machine disturbs little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, DTYPES, GPU, Results, Row, parser, ratios, rounds_of
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from PIL import Image
from shapes import SIZES, make_unet, save

from ip2p.infer import Editor

INTERVAL = (0.2, 0.8)
SCALES = {"default scales": (1.5, 10.0), "image scale 1": (1.0, 10.0), "equal scales": (3.0, 3.0)}


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--size", choices=[size for size in SIZES if "xl" not in size], default="small")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--batch_size", type=int, default=2)
    flags.add_argument("--precision", choices=DTYPES, default="no")
    args = flags.parse_args()
    torch.set_num_threads(torch.get_num_threads() if GPU else 1)
    pipeline, results = load(args), Results("infer", args)
    cases: dict[str, Callable[[], float]] = {}
    for name, (image, text) in SCALES.items():
        scales = {"image_guidance_scale": image, "guidance_scale": text}
        cases[f"Editor, {name}"] = lambda scales=scales: edit(pipeline, args, **scales)
        cases[f"diffusers, {name}"] = lambda scales=scales: bare(pipeline, args, **scales)
    cases["Editor, an interval"] = lambda: edit(pipeline, args, guidance_interval=INTERVAL)
    for case in cases.values():  # what is done once only
        case()
    for found in rounds_of(args.rounds, cases):
        results.add(*rows(found, args.steps))


def rows(found: dict[str, list[float]], steps: int) -> list[Row]:
    """Rates, and how they compare."""
    rates = [Row.of(name, values, "edits/s") for name, values in found.items()]
    inside = round(INTERVAL[1] * steps) - round(INTERVAL[0] * steps)
    fewer = 3 * steps / (2 * inside + steps)
    bars = {"default scales": 0.98, "image scale 1": 1.4, "equal scales": 1.4}
    return [
        *rates,
        *(
            Row.of(f"Editor / diffusers, {name}", ratios(found, f"Editor, {name}", f"diffusers, {name}"), "times", bar)
            for name, bar in bars.items()
        ),
        Row.of(
            f"an interval of {INTERVAL[0]:g} to {INTERVAL[1]:g} / default",
            ratios(found, "Editor, an interval", "Editor, default scales"),
            "times",
            0.93 * fewer,
        ),
        Row("the same by passes", fewer, "times"),
    ]


def load(args: argparse.Namespace) -> Any:
    """The pipeline of a UNet of random weights, with the parts that are frozen in training."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        saved = save(SIZES[args.size], Path(folder) / "model", make_unet(SIZES[args.size], in_channels=4))
        parts = DiffusionPipeline.from_pretrained(saved).components
    parts["unet"] = make_unet(SIZES[args.size])
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("vae", "unet", "text_encoder"):
        torch.nn.Module.to(parts[name], DEVICE, DTYPES[args.precision])  # diffusers' own `to` warns of nothing
    return pipeline


def given(args: argparse.Namespace) -> tuple[list[Image.Image], list[str]]:
    """Gray pictures and prompts: what they show takes no time."""
    picture = Image.new("RGB", (args.resolution, args.resolution), "gray")
    return [picture] * args.batch_size, ["make it snowy"] * args.batch_size


def edit(pipeline: Any, args: argparse.Namespace, **scales: Any) -> float:
    """Edits of `Editor` in a second."""
    options = {"num_inference_steps": args.steps, "batch_size": args.batch_size, "resolution": args.resolution}
    return rate(args, lambda: Editor(pipeline).edit(*given(args), **options, **scales))


def bare(pipeline: Any, args: argparse.Namespace, **scales: Any) -> float:
    """Edits of the pipeline in a second."""
    images, prompts = given(args)
    generators = [torch.Generator().manual_seed(0) for _ in images]
    options = {"num_inference_steps": args.steps, "generator": generators}
    return rate(args, lambda: pipeline(image=images, prompt=prompts, **options, **scales))


def rate(args: argparse.Namespace, work: Callable[[], object]) -> float:
    """How many edits are made in a second; both give pictures, so nothing is left to wait for."""
    clock = time.perf_counter if GPU else time.process_time
    began = clock()
    work()
    return args.batch_size / (clock() - began)


if __name__ == "__main__":
    main()
