"""What is fetched from the Hub: the parts that are needed of a pipeline, and one file of weights for each."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base.errors import ModelError, of_hub


def is_place(name: str) -> bool:
    """Whether a model can be at `name`: a folder, or what looks like a Hub id."""
    return Path(name).is_dir() or is_hub_id(name)


def is_hub_id(name: str) -> bool:
    """Whether a name looks like a Hub id, and nothing on this machine has it."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def check_name(name: str, what: str, flag: str) -> None:
    """Raise ModelError for a name that neither a model on the Hub has, nor a folder or a file of this machine."""
    if not (is_place(name) or os.path.isfile(name)):
        expected = "a folder or a .safetensors file here, or an id on the Hub"
        raise ModelError(f"{what}{name} is not there: expected {expected} ({flag})")


def fetch_pipeline(
    name: str,
    revision: str | None,
    variant: str | None,
    cache_dir: Path | None = None,
    without: Sequence[str] = (),
    flag: str = "--pretrained_model_name_or_path",
) -> Path:
    """The folder of a pipeline, fetched but for the parts named in `without`; a ModelError where there is none."""
    from diffusers import DiffusionPipeline  # seconds to import, and needed for downloads alone

    options = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    with fetching(f"{name} is neither a folder nor a .safetensors file here", flag):
        return Path(DiffusionPipeline.download(name, **options, **dict.fromkeys(without)))


def fetch_configs(name: str, revision: str | None, cache_dir: Path | None, flag: str) -> Path:
    """The folder of a model of which what describes it is fetched alone; a ModelError where there is none."""
    from huggingface_hub import snapshot_download  # not needed to look at names

    patterns = ["model_index.json", "config.json", "*/config.json"]
    with fetching(f"{name} is neither a folder nor a .safetensors file here", flag):
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))


def fetch_vae(name: str, variant: str | None, cache_dir: Path | None) -> Path:
    """The folder of a VAE, or of a pipeline whose VAE alone was fetched; of its weight files the first that fits."""
    from huggingface_hub import snapshot_download  # not needed to look at names

    folder = Path()
    with fetching(f"the VAE {name} is neither a folder nor a file here", "--pretrained_vae_model_name_or_path"):
        for infix in ([f".{variant}"] if variant else []) + [""]:
            for suffix in ("safetensors", "bin"):
                files = ["config.json", f"diffusion_pytorch_model{infix}.{suffix}"]
                patterns = [*files, *(f"vae/{file}" for file in files)]
                folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
                if any(folder.glob(f"**/{files[1]}")):
                    return folder
    return folder


@contextlib.contextmanager
def fetching(what: str, flag: str) -> Iterator[None]:
    """Say what fails, and all of the Hub's answer, to which libraries may only point: it tells who may fetch what."""
    try:
        yield
    except (OSError, ValueError) as error:
        answer = " ".join(str(error.__cause__ or error).split())
        answer = re.sub(r" For more information check: \S+/Web/HTTP/\S+", "", answer)  # what a status means in general
        raise ModelError(f"{what}, nor a model that the Hub answers for: {answer} ({flag}){of_hub(error)}") from None
