"""Compares one setting with another by the demo's recipe: same pairs, same steps, several seeds, one table.

    python examples/openmoji/compare.py --train="--snr_gamma 5"

trains with and without, and says what each reached on characters that neither has seen: accuracy and PSNR of edits,
where they change a picture and where not, and the loss with noise that is the same for all. A difference counts where
it is larger than the range of either's seeds. `--train` may be given again for further settings, each of which is
compared with the recipe as it is. What was measured before is kept: whoever repeats the command goes on where it was
stopped, or adds seeds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.encode.config import Model
from ip2p.encode.models.checkpoint import find_checkpoint
from ip2p.train.data.batches import gather, null_conditioning
from ip2p.train.learning import Objective as Flags
from ip2p.train.objective import Objective, noise_scheduler
from recipe import DEMO, STARTER, Recipe, edit, encode, make_pairs, score, train

# With the digits that are shown. PSNR also `inside` and `outside` of what the true edit changes, and of what was asked
# to stay `unchanged`: how much of a picture is kept.
MEASURES = {"accuracy": 3, "psnr": 2, "inside": 2, "outside": 2, "unchanged": 2, "loss": 4}
BANDS = 4  # of timesteps: each held-out pair is looked at in each
BATCH = 32


class Setting(NamedTuple):
    """Flags that are added to those of the recipe, for each of the commands."""

    encode: str = ""
    train: str = ""
    infer: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, self)) or "as it is"


def key(*values: object) -> str:
    """What a folder is named after that holds what `values` lead to."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


@functools.cache
def prepare(recipe: Recipe, output: Path) -> Path:
    """The folder of the pairs, which are drawn if they are not there."""
    make_pairs(recipe, output / "data")
    return output / "data"


@functools.cache
def encoded(data: Path, flags: str) -> Path:
    """A cache of the pairs that was made with `flags`; what is encoded already stays."""
    cache = data.parent / f"cache-{key(flags)}"
    encode(data, cache, *shlex.split(flags))
    return cache


def measure(setting: Setting, recipe: Recipe, seed: int, output: Path) -> dict[str, float]:
    """What one training with a setting reaches on held-out pairs; all of it is in `output`, and is done once."""
    made_by = [path.read_text() for path in (STARTER / "training.json", Path(__file__).with_name("recipe.py"))]
    folder = output / key(setting, recipe, seed, *made_by)
    record = folder / "measured.json"
    if not record.is_file():
        data = prepare(recipe, output)
        held_out, cache = encoded(data, "--split test"), encoded(data, setting.encode)
        train(recipe, cache, folder / "model", seed, *shlex.split(setting.train))
        edit(folder / "model", data, folder / "edits", seed, *shlex.split(setting.infer))
        scores = score(data, folder / "edits", folder)["all"]
        values = {name: scores.get(name, math.nan) for name in MEASURES} | {"loss": loss(folder / "model", held_out)}
        record.write_text(json.dumps({"setting": setting._asdict(), "seed": seed} | values, indent=2) + "\n")
    return json.loads(record.read_text())


@torch.no_grad()
def loss(model: Path, held_out: Path) -> float:
    """The mean loss of a trained model over the pairs of a cache: the same noise for all, both conditions kept."""
    base, reader = find_checkpoint(Model(str(STARTER))), Reader(Cache.open(held_out))
    samples, cpu = Samples.of_all(reader, None), torch.device("cpu")
    scheduler, null = noise_scheduler(Flags(), base), null_conditioning(reader, cpu)
    objective = Objective(scheduler, null, base.scaling_factor, Flags())
    unet = UNet2DConditionModel.from_pretrained(model / "unet").eval()  # pyright: ignore[reportAttributeAccessIssue]
    width, losses = len(scheduler.alphas_cumprod) // BANDS, list[torch.Tensor]()
    for numbers in np.array_split(np.arange(len(samples.rows)), max(1, len(samples.rows) // BATCH)):
        batch = gather(reader, samples, numbers, cpu)
        draws = objective.draw(batch, int(numbers[0]))
        for band in range(BANDS):
            timesteps, kept = band * width + draws.timesteps % width, torch.ones_like(draws.dropout)
            losses.append(objective.losses(unet, batch, draws._replace(timesteps=timesteps, dropout=kept)))
    return torch.cat(losses).mean().item()


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Lines of text: each setting's mean and range over the seeds, and its difference from the first setting.

    The difference is marked where it is larger than the range of either, which tells it from chance.
    """
    width = max(map(len, [*measured, "difference"]))
    first, *others = measured.items()
    lines = [row(width, "", list(MEASURES)), row(width, first[0], spread(first[1]))]
    for name, runs in others:
        lines += [row(width, name, spread(runs)), row(width, "difference", differences(first[1], runs))]
    return "\n".join([*lines, "* beyond the range of the seeds"])


def row(width: int, name: str, cells: list[str]) -> str:
    """A line of the table."""
    return f"{name:{width}}" + "".join(f"  {cell:>18}" for cell in cells)


def spread(runs: list[dict[str, float]]) -> list[str]:
    """The mean and the range of each measure over the seeds."""
    columns = {name: [run[name] for run in runs] for name in MEASURES}
    return [
        f"{statistics.fmean(values):.{MEASURES[name]}f} (range {max(values) - min(values):.{MEASURES[name]}f})"
        for name, values in columns.items()
    ]


def differences(first: list[dict[str, float]], runs: list[dict[str, float]]) -> list[str]:
    """Of the means from those of the first setting; with a star beyond the range of the seeds."""
    cells = []
    for name, digits in MEASURES.items():
        columns = [[run[name] for run in some] for some in (first, runs)]
        apart = statistics.fmean(columns[1]) - statistics.fmean(columns[0])
        counts = abs(apart) > max(max(values) - min(values) for values in columns)
        cells.append(f"{apart:+.{digits}f}{'*' if counts else ' '}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encode", default="", help="flags to add to ip2p-encode's, in quotes")
    parser.add_argument("--train", action="append", help="flags to add to ip2p-train's; again for a further setting")
    parser.add_argument("--infer", default="", help="flags to add to ip2p-infer's")
    parser.add_argument("--steps", type=int, default=300, help="of training, each time (default 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="two or more (default 0 1)")
    parser.add_argument("--output", type=Path, default=Path("build/compare"), help="folder for everything")
    args = parser.parse_args()
    settings = {Setting(): []} | {Setting(args.encode, flags, args.infer): [] for flags in args.train or [""]}
    if len(settings) < 2:
        parser.error("name the setting to compare: --train, --encode or --infer with its flags")
    for seed in args.seeds:
        for setting, runs in settings.items():
            runs.append(measure(setting, DEMO._replace(steps=args.steps), seed, args.output))
    print(f"\n{args.steps} steps, seeds {' '.join(map(str, args.seeds))}")
    print(table({setting.name: runs for setting, runs in settings.items()}))


if __name__ == "__main__":
    main()
