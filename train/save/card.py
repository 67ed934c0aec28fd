"""The model card of a finished run, and its way to the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from ...encode.base.errors import TrainError, reason
from ...encode.base.flags import dump
from ...encode.cache.format import Cache
from ..config import TrainConfig

TEXT = """---
{header}
---

# {name}

An [InstructPix2Pix](https://arxiv.org/abs/2211.09800) model: it edits a picture by a written instruction.
Trained with ip2p {version} from {base}.

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{name}")
pipeline("make it snowy", image, num_inference_steps=20, image_guidance_scale=1.5, guidance_scale=10)
```
{pictures}
## Data

{samples:,} samples of {datasets} at {resolution} px ({resize_mode}; views: {views}), {steps:,} steps,
{seen:,} samples seen.

| encoder | hash of its weights or vocabulary |
|---|---|
{identity}

## Result

{losses}

## Settings

{settings}
"""


def write_card(config: TrainConfig, caches: Sequence[Cache], steps: int, seen: int) -> None:
    """Write README.md into the output folder: data, cache identity, settings, losses, pictures."""
    manifest = caches[0].manifest  # the others agree with it in all that is not summed up here
    index = json.loads((config.saving.output_dir / "model_index.json").read_text(encoding="utf-8"))
    header = ModelCardData(
        base_model=config.model.pretrained_model_name_or_path,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "image-to-image"],
    )
    drawn = sorted((config.saving.output_dir / "validation").glob("*.png"))
    text = TEXT.format(
        header=header.to_yaml(),
        name=config.saving.hub_model_id or config.saving.output_dir.name,
        version=manifest["ip2p"],
        base=config.model.pretrained_model_name_or_path,
        pipeline=index["_class_name"],
        pictures=f"\n![Validation pictures](validation/{drawn[-1].name})\n" if drawn else "",
        samples=sum(cache.manifest["counts"]["ok"] for cache in caches),
        datasets=" and ".join(dict.fromkeys(cache.manifest["dataset"]["name"] for cache in caches)),
        resolution=manifest["encoding"]["resolution"],
        resize_mode=manifest["encoding"]["resize_mode"],
        views=", ".join(dict.fromkeys(view for cache in caches for view in cache.views)),
        steps=steps,
        seen=seen,
        identity=table(manifest["identity"]),
        losses=last_losses(config.saving.output_dir / "metrics.jsonl"),
        settings="| flag | value |\n|---|---|\n" + table(dump(config)),
    )
    ModelCard(text).save(config.saving.output_dir / "README.md")


def table(values: Mapping[str, Any]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {name} | {value} |" for name, value in values.items() if value is not None)


def last_losses(metrics: Path) -> str:
    """The last training loss and the last validation losses, as a table."""
    last: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    losses = {name: f"{value:.4f}" for name, value in last.items() if "loss" in name}
    return "| loss | value |\n|---|---|\n" + table(losses)


def push(config: TrainConfig) -> str:
    """Upload the pipeline, its card and its validation pictures; returns the address.

    Raises:
        TrainError: the Hub refused; everything is still in the output folder.
    """
    api = HfApi(token=config.saving.hub_token)
    name = config.saving.hub_model_id or config.saving.output_dir.resolve().name
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=config.saving.output_dir,
            commit_message="Trained with ip2p",
            ignore_patterns=["checkpoint-*", f"{config.watching.logging_dir}/*", ".lock"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TrainError(
            f"--push_to_hub {name}: {reason(error)}; the pipeline is in {config.saving.output_dir}: mend "
            "--hub_token or --hub_model_id and repeat with --resume_from_checkpoint latest"
        ) from None
    return repository
