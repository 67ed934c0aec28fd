"""What describes the parts of a model in diffusers' layout, read as it was saved or refused by the name of the file.

The libraries take the default of a class for a key that is missing, and that may be another model's value.
"""

import contextlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version

from ..base.errors import ModelError, explained


class Kind(NamedTuple):
    """A kind of part, by what its configuration says."""

    key: str  # which names the kind
    name: str  # regular expression of what it says
    needed: str  # keys that all releases of Stable Diffusion 1.x, 2.x and SDXL have
    younger: Mapping[str, str] = {}  # keys that early ones lack: since that diffusers; before, its default holds
    file: str = "config.json"


TEXT = (
    "eos_token_id hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads "
    "num_hidden_layers vocab_size"
)
KINDS = {
    "vae": Kind(
        "_class_name",
        "AutoencoderKL",
        "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block out_channels "
        "up_block_types",
        {
            "norm_num_groups": "0.4",
            "scaling_factor": "0.13",
            "force_upcast": "0.19",
            "latents_mean": "0.27",
            "latents_std": "0.27",
            "shift_factor": "0.29",
        },
    ),
    "unet": Kind(
        "_class_name",
        "UNet2DConditionModel",
        "act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim down_block_types "
        "downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps "
        "norm_num_groups out_channels sample_size up_block_types",
    ),
    "text_encoder": Kind("model_type", "clip_text_model", TEXT),
    "text_encoder_2": Kind("model_type", "clip_text_model", f"{TEXT} projection_dim"),
    "scheduler": Kind(
        "_class_name",
        r"\w+Scheduler",
        "beta_end beta_schedule beta_start num_train_timesteps",
        {"prediction_type": "0.10"},
        "scheduler_config.json",
    ),
    "tokenizer": Kind(
        "tokenizer_class",
        "CLIPTokenizer(Fast)?",
        "bos_token eos_token model_max_length pad_token unk_token",
        file="tokenizer_config.json",
    ),
}
KINDS["tokenizer_2"] = KINDS["tokenizer"]
NONE_IS_MEANT = ("latents_mean", "latents_std", "shift_factor")  # by null: latents are not shifted
POINTER = b"version https://git-lfs"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a ModelError names the file where it holds none."""
    refuse_pointer(file)
    with explained(ModelError, f"{file} cannot be read", OSError, ValueError, RecursionError):
        values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise ModelError(f"{file} cannot be read: it holds no object with the settings of a model")
    return values


def refuse_pointer(file: Path) -> None:
    """Refuse what a clone without Git LFS leaves in the place of a large file."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ModelError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in the model's folder")


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part in its folder; a ModelError if it is of another kind, or not all of it is there."""
    kind = KINDS[part]
    file = folder / kind.file
    config = read_json(file)
    found = str(config.get(kind.key))
    if not re.fullmatch(kind.name, found):
        raise ModelError(f"{file} describes a {found}, expected {kind.name} (Stable Diffusion 1.x, 2.x or SDXL)")
    needed = [*kind.needed.split(), *(key for key, since in kind.younger.items() if _is_from(config, since))]
    if missing := [key for key in needed if config.get(key) is None and not (key in NONE_IS_MEANT and key in config)]:
        raise ModelError(f"{file} describes a {found} without {', '.join(missing)}: fetch or save the model again")
    return config


def read_index(folder: Path) -> dict[str, Any]:
    """What model_index.json says of a pipeline: its class, and library and class of each part."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ModelError(
            f"{folder} is not a checkpoint in diffusers' layout: it has no model_index.json (expected a "
            "Hub id, such a folder, or a .safetensors file)"
        )
    index = read_json(file)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{file} does not say of which class the pipeline is: fetch or save the model again")
    return index


def _is_from(config: Mapping[str, Any], since: str) -> bool:
    """Whether this version of diffusers, or a later one, wrote a configuration; true where it does not say."""
    try:
        return Version(config["_diffusers_version"]) >= Version(since)
    except (KeyError, TypeError, InvalidVersion):
        return True


def check_complete(file: Path) -> None:
    """Refuse what this version of diffusers has written without a key that it always writes."""
    import diffusers

    config = read_json(file)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind and config.get("_diffusers_version") in (None, diffusers.__version__):
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        written = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
        if missing := [name for name in written if name not in config]:
            raise ModelError(f"{file} describes a {kind.__name__} without {', '.join(missing)}: save the model again")
