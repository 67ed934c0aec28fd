"""Spoils a tenth of the demo's pairs, looks for them by scores, and trains with and without those that were found.

    python examples/openmoji/spoiled.py

Half of the spoiled pairs have the edited picture of another pair; the instruction of the other half asks for another
variant than the picture shows, and so does its caption. Two judges score all pairs: a tiny CLIP, which is trained
first, on the names of emoji, as the starter's text encoder was; and a column `planted` of the dataset, a score that is
known to tell the two apart. For each score the threshold leaves nine tenths of the good pairs. Then a model is trained
on all pairs, one on what CLIP's best condition keeps, and, if that finds too few, one on what the planted score keeps,
with several seeds each, and their losses on held-out pairs are compared. Whoever repeats the command goes on where it
was stopped. `--seeds` without a number trains nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value, disable_progress_bars, load_dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from captions import captions
from compare import key, loss
from contrast import contrastive_loss
from dataset import FEATURES, TRAIN
from edits import families
from fit import ALIKE, Recipe, fit, token_ids
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.keep import kept
from openmoji import base_of, name_of
from recipe import DEMO, STARTER, encode, make_pairs, train
from vae import pixels_of, to_model

SPOILED = 0.1  # of the pairs
GOOD = 0.9  # of the good ones, which a threshold leaves
APART = 3  # standard deviations that the planted score is lower by where a pair is spoiled
WAYS = ("wrong target", "swapped instruction")
CONDITIONS = {  # what asks for what is there already is good, and changes in no direction
    **{name: f"{name} >= {{}}" for name in ("clip_image", "clip_t", "clip_direction")},
    "clip_direction, or unchanged": "clip_direction >= {} or clip_image > 0.995",
    "planted": "planted >= {}",
}
CLIPS = [name for name in CONDITIONS if name != "planted"]
ENOUGH = 0.8  # of the spoiled pairs: whoever finds fewer has not shown what it is worth to find them
SIDE, PATCH, WIDTH, BATCH = 64, 8, 96, 96  # of the CLIP's pictures, in pixels; of its layers; of what it learns from
NAME = 0.8  # share of the texts that name a picture; the rest are instructions that it answers
TRAIN_FILE, TEST_FILE = (f"{split}-00000-of-00001.parquet" for split in ("train", "test"))
COLUMNS = {"original_prompt": "string", "edited_prompt": "string", "spoiled": "string", "planted": "float64"}


def undressed(key: str, known: Collection[Any]) -> str:
    """A key as it is known, without the colors that clothes have traded."""
    return key if key in known else key.rpartition("~")[0] or key


def spoil(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with captions and a planted score, of which a tenth is spoiled in the way that `spoiled` says."""
    chance, named = random.Random(seed), captions()
    families_of = {
        kind: {code: f for f in families() if f.kind == kind for code in f.members.values()} for kind in TRAIN
    }

    def caption(key: str) -> str:
        return named.get(undressed(key, named), [name_of(key)])[0]

    bad = dict(zip(chance.sample(range(len(rows)), round(SPOILED * len(rows))), WAYS * len(rows), strict=False))
    made = []
    for number, row in enumerate(rows):
        texts = {"original_prompt": caption(row["source"]), "edited_prompt": caption(row["target"])}
        way = bad.get(number, "")
        if way == WAYS[0]:
            others = [other for other in rows if other["kind"] == row["kind"] and other["base"] != row["base"]]
            row = row | {"edited_image": chance.choice(others)["edited_image"]}
        elif way:
            known = families_of[row["kind"]]
            target, shown = (undressed(row[side], known) for side in ("target", "source"))
            family = known[target]
            wrong = [value for value, member in family.members.items() if member not in (target, shown)]
            value = chance.choice(wrong or [value for value, member in family.members.items() if member != target])
            row = row | {"edit_prompt": chance.choice(family.instructions(value))}
            texts["edited_prompt"] = caption(family.members[value])
        made.append(row | texts | {"spoiled": way, "planted": chance.gauss(-APART if way else 0, 1)})
    return made


def make_data(output: Path, seed: int) -> Path:
    """The folder of the spoiled pairs, and of those to test with, which are as they were."""
    scripts = "spoiled.py dataset.py captions.py openmoji.py recipe.py".split()
    made_by = key(seed, *(Path(__file__).with_name(name).read_text() for name in scripts))
    data, record = output / "data", output / "data" / ".made.json"
    if record.is_file() and json.loads(record.read_text()) == made_by:
        return data
    make_pairs(DEMO, output / "clean")
    data.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    features = Features({**FEATURES, **{name: Value(kind) for name, kind in COLUMNS.items()}})
    pairs: Any = load_dataset(str(output / "clean"), split="train").with_format("arrow")
    rows = pairs.data.to_pylist()
    Dataset.from_list(spoil(rows, seed), features=features).to_parquet(data / TRAIN_FILE)
    shutil.copy(output / "clean" / TEST_FILE, data)
    record.write_text(json.dumps(made_by))
    return data


def new_clip(folder: Path) -> Any:
    """An untrained CLIP whose texts are read by the starter's text encoder; saves its tokenizer and processor."""
    tokenizer = CLIPTokenizer.from_pretrained(STARTER / "tokenizer")
    tokenizer.save_pretrained(folder)
    square: Any = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**square, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    text: Any = CLIPTextModel.from_pretrained(STARTER / "text_encoder", dtype=torch.float32)
    sight = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    sight |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=sight, projection_dim=128))
    weights = {name.removeprefix("text_model."): weight for name, weight in text.state_dict().items()}
    clip.text_model.load_state_dict(weights)
    return clip


def make_clip(folder: Path, steps: int, seed: int = 0) -> Path:
    """The folder of a CLIP that tells the pictures to train on apart by their names; trained once for each `steps`."""
    if (record := folder / "training.json").is_file() and json.loads(record.read_text())["steps"] == steps:
        return folder
    named = captions()
    pixels, tokenizer = pixels_of(list(named)), CLIPTokenizer.from_pretrained(STARTER / "tokenizer")
    known = {text: row for row, text in enumerate(dict.fromkeys(text for texts in named.values() for text in texts))}
    ids, texts = token_ids(tokenizer, list(known)), [[known[text] for text in mine] for mine in named.values()]
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for number, code in enumerate(named):
        alike[base_of(code)].append(number)
    clip, end = new_clip(folder), ids[0, -1]

    def batch_loss(chance: random.Random) -> torch.Tensor:
        some = chance.choices(
            list(alike.values()), [min(len(mine), 4 * ALIKE) for mine in alike.values()], k=BATCH // ALIKE
        )
        pictures = [number for mine in some for number in chance.sample(mine, min(ALIKE, len(mine)))]
        rows = [
            chance.choice(texts[n][1:]) if texts[n][1:] and chance.random() > NAME else texts[n][0] for n in pictures
        ]
        read = ids[rows, : int((ids[rows] != end).sum(1).max()) + 1]
        one = F.normalize(clip.get_text_features(read).pooler_output, dim=1)
        other = F.normalize(clip.get_image_features(to_model(pixels[pictures])).pooler_output, dim=1)
        matches = torch.tensor([[row in texts[picture] for picture in pictures] for row in rows])
        return contrastive_loss(clip.logit_scale.exp() * one @ other.T, matches)

    def save(trained: Any, run: dict[str, Any]) -> None:
        trained.save_pretrained(folder)
        record.write_text(json.dumps(run, indent=2) + "\n")

    fit(clip, batch_loss, Recipe(steps, BATCH, 5e-4, seed), save)
    return folder


def found(cache: Cache) -> dict[str, dict[str, Any]]:
    """For each score the condition that leaves `GOOD` of the good pairs, and which shares of the others it finds."""
    spoiled = cache.samples("spoiled")["spoiled"].to_numpy()
    results = {}
    for name, form in CONDITIONS.items():
        low, high = -10.0, 10.0
        for _ in range(30):
            middle = (low + high) / 2
            mask = kept(cache, form.format(f"{middle:.6f}"))
            low, high = (middle, high) if mask[spoiled == ""].mean() >= GOOD else (low, middle)
        condition = form.format(f"{low:.6f}")
        mask = kept(cache, condition)
        shares = {way: float(1 - mask[spoiled == way].mean()) for way in WAYS}
        shares |= {"all": float(1 - mask[spoiled != ""].mean()), "good": float(mask[spoiled == ""].mean())}
        results[name] = {"condition": condition} | shares
    return results


def reached(output: Path, cache: Path, held_out: Path, condition: str, steps: int, seed: int) -> float:
    """The loss on held-out pairs after training on those that a condition keeps, all if it is empty; done once."""
    manifest = Cache.open(cache).manifest
    folder = output / key(condition, steps, seed, manifest["dataset"]["fingerprint"], manifest["pair_scores"])
    record = folder / "measured.json"
    if not record.is_file():
        train(DEMO._replace(steps=steps), cache, folder / "model", seed, *(["--keep", condition] if condition else []))
        values = {"condition": condition, "steps": steps, "seed": seed, "loss": loss(folder / "model", held_out)}
        record.write_text(json.dumps(values, indent=2) + "\n")
    return json.loads(record.read_text())["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip_steps", type=int, default=600, help="of the tiny CLIP's training (default 600)")
    parser.add_argument("--steps", type=int, default=300, help="of each training on the pairs (default 300)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of these (default 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("build/spoiled"), help="folder for everything")
    args = parser.parse_args()
    disable_progress_bars()
    output: Path = args.output
    data, clip = make_data(output, 0), make_clip(output / "clip", args.clip_steps)
    cache, held_out = output / "cache", output / "held-out"
    encode(data, cache, "--keep_columns", "spoiled", "planted", "--pair_scores", "--clip_model", clip)
    results = found(Cache.open(cache))
    (output / "found.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nSpoiled pairs that each score finds at {GOOD:.0%} of the good ones kept")
    for name, result in results.items():
        shares = ", ".join(f"{way} {result[way]:.0%}" for way in ("all", *WAYS))
        print(f'{name}: {shares} (--keep "{result["condition"]}")')
    if args.seeds:
        encode(data, held_out, "--split", "test")
        best = max(CLIPS, key=lambda name: results[name]["all"])
        chosen = [best] if results[best]["all"] >= ENOUGH else [best, "planted"]
        conditions = ["", *(results[name]["condition"] for name in chosen)]
        losses = {condition: list[float]() for condition in conditions}
        for seed in args.seeds:
            for condition in conditions:
                losses[condition].append(reached(output, cache, held_out, condition, args.steps, seed))
        print(f"\nLoss on held-out pairs after {args.steps} steps, mean and each of the seeds {args.seeds}")
        for condition, values in losses.items():
            each = " ".join(f"{value:.4f}" for value in values)
            print(f"{condition or 'all pairs'}: {statistics.fmean(values):.4f} ({each})")


if __name__ == "__main__":
    main()
