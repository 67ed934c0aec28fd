"""Draws how well averages of different lengths edit, each made after the training (`ip2p-train --ema_length`).

Trains the demo's recipe with `--ema_power`, as it is and with a constant learning rate, and saves a pipeline of each
length; what each reaches on held-out emoji is a point of the picture, beside diffusers' own average. What was measured
before is kept: whoever repeats the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from PIL import Image

from compare import encoded, loss, prepare
from ip2p.infer.score.curve import draw_curve
from recipe import DEMO, Recipe, edit, score, train

LENGTHS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
PLAIN = 0.09  # of diffusers' average, while (1 + n) / (10 + n) is less than its decay
RATES = {"cosine rate": (), "constant rate": ("--lr_scheduler", "constant_with_warmup")}
SHOWN = {"loss": "loss on held-out pairs", "accuracy": "accuracy"}


def measure(model: Path, data: Path, held_out: Path, seed: int) -> dict[str, float]:
    """What a pipeline reaches on held-out pairs; edits and scores lie beside it."""
    record = model / "measured.json"
    if not record.is_file():
        edit(model, data, model / "edits", seed)
        scores = score(data, model / "edits", model)["all"]
        values = {name: scores[name] for name in ("accuracy", "psnr", "unchanged")} | {"loss": loss(model, held_out)}
        record.write_text(json.dumps(values, indent=2) + "\n")
    return json.loads(record.read_text())


def lengths(recipe: Recipe, rate: str, seed: int, output: Path) -> dict[str, dict[str, float]]:
    """What each length reaches after one training, and diffusers' average, which is called `plain`."""
    data = prepare(recipe, output)
    cache, held_out = encoded(data, ""), encoded(data, "--split test")
    plain, flags = output / f"{rate.replace(' ', '-')}-{seed}", (*RATES[rate], "--ema_power")
    train(recipe, cache, plain / "model", seed, *flags)
    found = {"plain": measure(plain / "model", data, held_out, seed)}
    for length in LENGTHS:
        model = plain / f"length-{length}"
        if not (model / "measured.json").is_file():
            again = ("--resume_from_checkpoint", plain / "model", "--ema_length", f"{length}")
            train(recipe, cache, model, seed, *flags, *again)
        found[f"{length}"] = measure(model, data, held_out, seed)
    return found


def draw(found: dict[str, list[dict[str, dict[str, float]]]]) -> Image.Image:
    """The means over the seeds, a plot for each of `SHOWN`, one above the other."""
    plots = []
    for measure_name, title in SHOWN.items():
        lines = {}
        for rate, runs in found.items():
            means = {name: statistics.fmean(run[name][measure_name] for run in runs) for name in runs[0]}
            lines[rate] = [(float(name), value, "") for name, value in means.items() if name != "plain"]
            lines[f"{rate}, --use_ema"] = [(PLAIN, means["plain"], "")]
        plots.append(draw_curve(lines, "length of the average, as a share of the training", title))
    picture = Image.new("RGB", (plots[0].width, sum(plot.height for plot in plots)), "white")
    for number, plot in enumerate(plots):
        picture.paste(plot, (0, number * plot.height))
    return picture


def table(found: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Means and ranges over the seeds, as the rows of a Markdown table."""
    names = list(next(iter(found.values()))[0]["plain"])
    lines = ["| rate | length | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for rate, runs in found.items():
        for length in runs[0]:
            columns = [[run[length][name] for run in runs] for name in names]
            cells = [f"{statistics.fmean(each):.4g} ({max(each) - min(each):.2g})" for each in columns]
            lines.append(f"| {rate} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the trainings (default 0 1)")
    parser.add_argument("--steps", type=int, default=DEMO.steps, help="of each (default: the demo's)")
    parser.add_argument("--output", type=Path, default=Path("build/lengths"), help="folder for everything")
    args = parser.parse_args()
    recipe = DEMO._replace(steps=args.steps)
    found = {rate: [lengths(recipe, rate, seed, args.output) for seed in args.seeds] for rate in RATES}
    draw(found).save(args.output / "lengths.png")
    print(table(found))


if __name__ == "__main__":
    main()
