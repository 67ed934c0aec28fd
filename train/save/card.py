"""The model card: what a run has trained, on what, and how it is used."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ...encode.base.errors import TrainError, explained
from ...encode.cache.format import Cache
from ..config import TrainConfig
from .resume import METRICS, SETTINGS, Progress, history, pictures

TEXT = """---
{header}
---

# {name}

An [InstructPix2Pix](https://arxiv.org/abs/2211.09800) model: it edits a picture by a written instruction.
Trained with ip2p {ip2p} from {base}.

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{name}")
pipeline("make it snowy", image=image, num_inference_steps=20, image_guidance_scale=1.5, guidance_scale=10)
```
{adapters}{pictures}
## Data

{samples:,} samples of {datasets} at {encoding[resolution]} px ({encoding[resize_mode]}{shapes}; views: {views}),
{steps:,} steps, {seen:,} samples seen.

| encoder | hash of its weights or vocabulary |
|---|---|
{identity}

## Result

| loss or score | value |
|---|---|
{losses}

## Settings

| flag | value |
|---|---|
{settings}
"""

ADAPTERS = """
It is LoRA of rank {flags.lora_rank} and alpha {flags.alpha} on {layers}, and of full rank on `conv_in`, fused into the
weights above. The adapters alone, for {base}, are in two small files here:

```python
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

wide = {{"in_channels": 8, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}}
unet = UNet2DConditionModel.from_pretrained("{base}", subfolder="unet", sample_size={sample_size}, **wide)
unet.conv_in.load_state_dict(load_file("{name}/conv_in.safetensors"))
pipeline = {pipeline}.from_pretrained("{base}", unet=unet{options})
pipeline.load_lora_weights("{name}", weight_name="pytorch_lora_weights.safetensors")
```
"""
LAYERS = {"attn": "all attention", "all": "all layers of its blocks"}


def write_card(config: TrainConfig, caches: Sequence[Cache], progress: Progress) -> None:
    """Write README.md into the output folder: data, cache identity, settings, losses, pictures; places by name alone.

    Raises TrainError where it cannot be written.
    """
    manifest, saving = caches[0].manifest, config.saving  # the others agree with it in all that is not summed up here
    settings = yaml.safe_load((saving.output_dir / SETTINGS).read_text(encoding="utf-8"))
    base, last = config.model.pretrained_model_name_or_path, dict[str, float]()
    for line in history(saving.output_dir / METRICS, progress.step):
        last |= line
    lora = ["lora"] if config.lora.lora_rank else []
    header = ModelCardData(
        base_model=base if named(base) == base else None,  # the Hub knows ids alone, and refuses others
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "image-to-image", *lora],
    )
    index = json.loads((saving.output_dir / "model_index.json").read_text(encoding="utf-8"))
    names = {"name": saving.hub_model_id or saving.output_dir.resolve().name, "base": named(base)}
    names["pipeline"] = index["_class_name"]
    drawn = [path for step, path in pictures(saving.output_dir) if step <= progress.step]
    text = TEXT.format(
        **names,
        header=header.to_yaml(),
        ip2p=manifest["ip2p"],
        adapters=adapters(config, names) if lora else "",
        pictures=f"\n![Validation pictures](validation/{drawn[-1].name})\n" if drawn else "",
        samples=sum(cache.manifest["counts"]["ok"] for cache in caches),
        datasets=" and ".join(dict.fromkeys(str(named(cache.manifest["dataset"]["name"])) for cache in caches)),
        encoding=manifest["encoding"],
        shapes=f" in {len(progress.seen)} shapes" if len(progress.seen) > 1 else "",
        views=", ".join(dict.fromkeys(view for cache in caches for view in cache.views)),
        steps=progress.step,
        seen=progress.samples,
        identity=table(manifest["identity"]),
        losses=table({name: f"{value:.4f}" for name, value in last.items() if "loss" in name or "validation" in name}),
        settings=table({name: named(value) for name, value in settings.items()}),
    )
    with explained(TrainError, f"{saving.output_dir}/README.md cannot be written", OSError):
        ModelCard(text).save(saving.output_dir / "README.md")


def adapters(config: TrainConfig, names: Mapping[str, str]) -> str:
    """What a card says of LoRA: how it was trained, and how diffusers alone puts it onto the base model."""
    unet = json.loads((config.saving.output_dir / "unet" / "config.json").read_text(encoding="utf-8"))
    options = ", force_zeros_for_empty_prompt=False" if "XL" in names["pipeline"] else ""  # as in `make_pipeline`
    said = {"flags": config.lora, "layers": LAYERS[config.lora.lora_targets], "sample_size": unet["sample_size"]}
    return ADAPTERS.format(**names, **said, options=options)


def named(value: Any) -> Any:
    """A value as a card shows it: the name of what lies on this machine instead of its place, all else as it is."""
    if isinstance(value, list):
        return [named(item) for item in value]
    local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).resolve().name if local else value


def table(values: Mapping[str, Any]) -> str:
    """Rows of a Markdown table, in which a bar would end a cell, and a line break the row."""
    shown = {name: str(value).replace("|", r"\|") for name, value in values.items() if value is not None}
    return "\n".join(f"| {name} | {' '.join(cell.split())} |" for name, cell in shown.items())
