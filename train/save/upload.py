"""What becomes of a finished pipeline: its card, and all that others may have of it on the Hub."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ...encode.base.console import say
from ...encode.base.errors import TrainError
from ...encode.cache.format import Cache
from ...encode.models.checkpoint import Checkpoint
from ...infer.lora import ADAPTERS, CONV_IN
from ..config import TrainConfig
from .card import has_checker, write_card
from .public import settings
from .resume import METRICS, SETTINGS, Progress


def publish(config: TrainConfig, base: Checkpoint, caches: Sequence[Cache], progress: Progress) -> None:
    """Write the card of the pipeline in the output folder, and upload both if that is asked for; raises TrainError."""
    saving, folder = config.saving, config.saving.output_dir
    write_card(config, base, caches, progress)
    say(f"saved the pipeline in {folder}: try `ip2p-infer --model {folder} …`")
    if has_checker(base):
        say("the safety checker of the base is not part of it: README.md in that folder has the lines that add it")
    if not saving.push_to_hub:
        return
    api, name = HfApi(token=saving.hub_token), saving.hub_model_id or folder.resolve().name
    try:
        repository = api.create_repo(name, private=saving.hub_private_repo or None, exist_ok=True).repo_id
        if saving.hub_private_repo and not api.repo_info(repository).private:  # one that was there stays as it was
            raise ValueError(f"{repository} is there and public, so --hub_private_repo cannot make it private")
        write_card(config, base, caches, progress, repository)  # whose lines have its full name
        operations = [CommitOperationAdd(file, content) for file, content in contents(config).items()]
        api.create_commit(repository, operations, commit_message="Trained with ip2p")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TrainError(
            f"--push_to_hub {name}: {' '.join(str(error).split())}\n"
            f"The pipeline is in {folder}: mend that (perhaps --hub_token or --hub_model_id) and repeat with "
            "--resume_from_checkpoint latest"
        ) from None
    say(f"uploaded to {repository}")


def contents(config: TrainConfig) -> dict[str, Path | bytes]:
    """What is uploaded, by its name there: the pipeline, adapters, card, pictures, losses, and settings without places.

    Whatever else lies in the output folder stays there: checkpoints, logs, averages, and files of others.
    """
    folder = config.saving.output_dir
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    adapters = [ADAPTERS, CONV_IN] if config.lora.lora_rank else []
    names = ["model_index.json", "README.md", METRICS, *adapters, *(f"{part}/*" for part in (*parts, "validation"))]
    files = sorted(file for name in names for file in folder.glob(name) if file.is_file())
    shown = yaml.safe_dump(settings(folder), sort_keys=False)
    return {str(file.relative_to(folder)): file for file in files} | {SETTINGS: shown.encode()}
