"""The model card: what a run has trained, on what, and how it is used."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ...encode.base.errors import TrainError, explained
from ...encode.cache.format import Cache
from ...encode.models.checkpoint import Checkpoint, read_index
from ...encode.models.hub import is_hub_id
from ..config import TrainConfig
from .public import licence, public, settings
from .resume import METRICS, Progress, history, pictures

TEXT = """---
{header}
---

# {name}

An [InstructPix2Pix](https://arxiv.org/abs/2211.09800) model, trained from {base} with ip2p: it edits a picture by a
written instruction. {licence}

```python
from diffusers import {pipeline}
from diffusers.utils import load_image
from PIL import ImageOps

pipeline = {pipeline}.from_pretrained("{name}")
image = ImageOps.contain(load_image("picture.png"), ({size}, {size}))  # as large as it was trained
edit = pipeline("make it snowy", image=image, num_inference_steps=20, image_guidance_scale=1.5, guidance_scale=10)
edit.images[0].save("edited.png")
```
{checker}{adapters}{pictures}
## Data

| dataset | samples trained on | samples held out | encoded by |
|---|---|---|---|
{data}

At {size} px ({mode}{shapes}; views: {views}): {steps:,} steps, {seen:,} samples seen.
Trained by {versions}.

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

CHECKER = """
The safety checker of {base} is not part of it. With these lines the pipeline has it:

```python
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor

checker = StableDiffusionSafetyChecker.from_pretrained("{base}", subfolder="safety_checker")
extractor = CLIPImageProcessor.from_pretrained("{base}", subfolder="feature_extractor")
pipeline.register_modules(safety_checker=checker, feature_extractor=extractor)
```
"""

ADAPTERS = """
It is LoRA of rank {flags.lora_rank} and alpha {flags.alpha} on {layers}, and of full rank on `conv_in`, fused into the
weights above. The adapters alone, for {base}, are in two small files here:

```python
from diffusers import {pipeline}, UNet2DConditionModel
{fetching}from safetensors.torch import load_file

wide = {{"in_channels": 8, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}}
unet = UNet2DConditionModel.from_pretrained("{base}", subfolder="unet", sample_size={sample_size}, **wide)
unet.conv_in.load_state_dict(load_file({conv_in}))
pipeline = {pipeline}.from_pretrained("{base}", unet=unet{options})
pipeline.load_lora_weights("{name}", weight_name="pytorch_lora_weights.safetensors")
```
"""
LAYERS = {"attn": "all attention", "all": "all layers of its blocks"}
UNKNOWN = "an earlier version of ip2p, which did not keep its number"


def write_card(
    config: TrainConfig, base: Checkpoint, caches: Sequence[Cache], progress: Progress, repository: str | None = None
) -> None:
    """Write README.md into the output folder: licence, data, versions, settings, losses, pictures; no places.

    Raises TrainError where it cannot be written.

    Args:
        base: the model that was trained.
        progress: of the run that has trained it, with what `public.told` says of that.
        repository: the full name of the pipeline on the Hub, where that is known.
    """
    manifest, output_dir = caches[0].manifest, config.saving.output_dir  # the others agree with it in what is read
    repository = repository or config.saving.hub_model_id
    name = config.model.pretrained_model_name_or_path
    index = json.loads((output_dir / "model_index.json").read_text(encoding="utf-8"))
    names = {"name": repository or output_dir.resolve().name, "base": public(name), "pipeline": index["_class_name"]}
    told, terms, last = json.loads(progress.told), licence(config, base), dict[str, float]()
    lora = ["lora"] if config.lora.lora_rank else []
    header = ModelCardData(
        base_model=name if is_hub_id(name) else None,  # the Hub knows ids alone, and refuses others
        datasets=list(dict.fromkeys(part["name"] for part in told["data"] if part["on_hub"])) or None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "image-to-image", *lora],
        **terms,
    )
    for line in history(output_dir / METRICS, progress.step):
        last |= line
    drawn = [path for step, path in pictures(output_dir) if step <= progress.step]
    text = TEXT.format(
        **names,
        header=header.to_yaml(),
        licence=licence_line(config, names["base"], terms),
        checker=CHECKER.format(**names) if has_checker(base) else "",
        adapters=adapters(config, names, on_hub=bool(repository)) if lora else "",
        pictures=f"\n![Validation pictures](validation/{drawn[-1].name})\n" if drawn else "",
        data="\n".join(map(row, told["data"])),
        size=manifest["encoding"]["resolution"],
        mode=manifest["encoding"]["resize_mode"],
        shapes=f" in {told['shapes']} shapes" if told["shapes"] > 1 else "",
        views=", ".join(dict.fromkeys(view for cache in caches for view in cache.views)),
        steps=progress.step,
        seen=progress.samples,
        versions="; then ".join(told["versions"]) or UNKNOWN,
        identity=table(manifest["identity"]),
        losses=table({name: f"{value:.4f}" for name, value in last.items() if "loss" in name or "validation" in name}),
        settings=table(settings(output_dir)),
    )
    with explained(TrainError, f"{output_dir}/README.md cannot be written", OSError):
        ModelCard(text).save(output_dir / "README.md")


def has_checker(base: Checkpoint) -> bool:
    """Whether a base has a safety checker, which the pipelines of `make_pipeline` lack."""
    return bool(read_index(base.folder).get("safety_checker", [None])[-1])


def licence_line(config: TrainConfig, base: str, terms: Mapping[str, str]) -> str:
    """What a card says of the licence."""
    if not terms.get("license"):
        return f"The licence of {base}, which is not known here, holds for it as well."
    called = terms.get("license_name", terms["license"])
    return f"Its licence is {called}{'' if config.saving.hub_license else f', that of {base}'}."


def row(data: Mapping[str, Any]) -> str:
    """The row of a dataset in the table of a card."""
    name = data["name"].replace("|", r"\|")
    name = f"[{name}](https://huggingface.co/datasets/{name})" if data["on_hub"] else f"{name} (a local dataset)"
    return f"| {name} | {data['trained']:,} | {data['held_out']:,} | {data['encoder']} |"


def adapters(config: TrainConfig, names: Mapping[str, str], *, on_hub: bool) -> str:
    """What a card says of LoRA: how it was trained, and how diffusers alone puts it onto the base model."""
    unet = json.loads((config.saving.output_dir / "unet" / "config.json").read_text(encoding="utf-8"))
    said = {"flags": config.lora, "layers": LAYERS[config.lora.lora_targets], "sample_size": unet["sample_size"]}
    said["options"] = ", force_zeros_for_empty_prompt=False" if "XL" in names["pipeline"] else ""  # as `make_pipeline`
    said["fetching"] = "from huggingface_hub import hf_hub_download\n" if on_hub else ""
    file = f'"{names["name"]}/conv_in.safetensors"'
    said["conv_in"] = f'hf_hub_download("{names["name"]}", "conv_in.safetensors")' if on_hub else file
    return ADAPTERS.format(**names, **said)


def table(values: Mapping[str, Any]) -> str:
    """Rows of a Markdown table, in which a bar would end a cell, and a line break the row."""
    shown = {name: str(value).replace("|", r"\|") for name, value in values.items() if value is not None}
    return "\n".join(f"| {name} | {' '.join(cell.split())} |" for name, cell in shown.items())
