"""What a run ends with: a pipeline of the trained UNet and the base model's frozen parts, its card, and an upload."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from ...encode.base.errors import TrainError, explained
from ...encode.cache.format import Cache
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.weights import dtype_of
from ..config import TrainConfig
from ..unet.lora import save_adapters
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
pipeline("make it snowy", image, num_inference_steps=20, image_guidance_scale=1.5, guidance_scale=10)
```
{pictures}
## Data

{samples:,} samples of {datasets} at {encoding[resolution]} px ({encoding[resize_mode]}; views: {views}),
{steps:,} steps, {seen:,} samples seen.

| encoder | hash of its weights or vocabulary |
|---|---|
{identity}

## Result

| loss | value |
|---|---|
{losses}

## Settings

| flag | value |
|---|---|
{settings}
"""


def export(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, resolution: int, output_dir: Path
) -> None:
    """Save the finished pipeline, its frozen parts in the precision in which they were found.

    Adapters, if there are any, are saved for themselves and then fused into the UNet. Raises TrainError where it cannot
    be written.
    """
    unet.register_to_config(sample_size=resolution // checkpoint.vae_scale_factor)
    hint = ": make space and repeat with --resume_from_checkpoint latest, the training is done"
    with explained(TrainError, f"no pipeline can be written to {output_dir}", hint=hint):
        if hasattr(unet, "peft_config"):
            save_adapters(unet, changes(scheduler), output_dir)
            unet.fuse_lora()
            unet.unload_lora()
        make_pipeline(unet, scheduler, checkpoint, dtypes(checkpoint)).save_pretrained(output_dir)


def make_pipeline(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, dtype: torch.dtype | dict[str, Any]
) -> Any:
    """The pipeline that a UNet in training belongs to, with the base model's frozen parts."""
    parts: dict[str, Any] = {"unet": unet, "scheduler": checkpoint.scheduler()}
    for name in ("vae", *checkpoint.text_encoders):
        parts[name] = checkpoint.network(name, dtype[name] if isinstance(dtype, dict) else dtype)
    parts |= {name: checkpoint.tokenizer(name) for name in checkpoint.tokenizers}
    if checkpoint.is_sdxl:
        # Training drops text to the encoding of "", so that is what guidance must use, not zeros.
        pipeline: Any = StableDiffusionXLInstructPix2PixPipeline(**parts, force_zeros_for_empty_prompt=False)
    else:
        absent: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionInstructPix2PixPipeline(**parts, **absent)
    if changed := changes(scheduler):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    return pipeline


def changes(scheduler: DDPMScheduler) -> dict[str, Any]:
    """Settings of a noise schedule that training changed: inference must end where training did."""
    names = ("rescale_betas_zero_snr", "timestep_spacing") if scheduler.config["rescale_betas_zero_snr"] else ()
    return {name: scheduler.config[name] for name in names}


def dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The precision of each frozen part's weight files."""
    folders = {name: checkpoint.folder / name for name in checkpoint.text_encoders} | {"vae": checkpoint.vae_folder}
    return {name: dtype_of(folder, checkpoint.variant) for name, folder in folders.items()}


def write_card(config: TrainConfig, caches: Sequence[Cache], progress: Progress) -> None:
    """Write README.md into the output folder: data, cache identity, settings, losses, pictures; places by name alone.

    Raises TrainError where it cannot be written.
    """
    manifest, saving = caches[0].manifest, config.saving  # the others agree with it in all that is not summed up here
    settings = yaml.safe_load((saving.output_dir / SETTINGS).read_text(encoding="utf-8"))
    base, last = config.model.pretrained_model_name_or_path, dict[str, float]()
    for line in history(saving.output_dir / METRICS, progress.step):
        last |= line
    header = ModelCardData(
        base_model=base if named(base) == base else None,  # the Hub knows ids alone, and refuses others
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "image-to-image"],
    )
    drawn = [path for step, path in pictures(saving.output_dir) if step <= progress.step]
    text = TEXT.format(
        header=header.to_yaml(),
        name=saving.hub_model_id or saving.output_dir.resolve().name,
        ip2p=manifest["ip2p"],
        base=named(base),
        pipeline=json.loads((saving.output_dir / "model_index.json").read_text(encoding="utf-8"))["_class_name"],
        pictures=f"\n![Validation pictures](validation/{drawn[-1].name})\n" if drawn else "",
        samples=sum(cache.manifest["counts"]["ok"] for cache in caches),
        datasets=" and ".join(dict.fromkeys(str(named(cache.manifest["dataset"]["name"])) for cache in caches)),
        encoding=manifest["encoding"],
        views=", ".join(dict.fromkeys(view for cache in caches for view in cache.views)),
        steps=progress.step,
        seen=progress.samples,
        identity=table(manifest["identity"]),
        losses=table({name: f"{value:.4f}" for name, value in last.items() if "loss" in name}),
        settings=table({name: named(value) for name, value in settings.items()}),
    )
    with explained(TrainError, f"{saving.output_dir}/README.md cannot be written", OSError):
        ModelCard(text).save(saving.output_dir / "README.md")


def named(value: Any) -> Any:
    """A value as a card shows it: the name of what lies on this machine instead of its place, all else as it is."""
    if isinstance(value, list):
        return [named(item) for item in value]
    local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).resolve().name if local else value


def table(values: Mapping[str, Any]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {name} | {value} |" for name, value in values.items() if value is not None)


def push(config: TrainConfig) -> str:
    """Upload the pipeline, its card and its validation pictures; returns the address, or raises TrainError."""
    api, folder = HfApi(token=config.saving.hub_token), config.saving.output_dir
    name = config.saving.hub_model_id or folder.resolve().name
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Trained with ip2p",
            ignore_patterns=["*checkpoint-*", f"{config.watching.logging_dir}/*", ".lock"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TrainError(
            f"--push_to_hub {name}: {' '.join(str(error).split())}\n"
            f"The pipeline is in {folder}: mend that (perhaps --hub_token or --hub_model_id) and repeat with "
            "--resume_from_checkpoint latest"
        ) from None
    return repository
