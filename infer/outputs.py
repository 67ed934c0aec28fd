"""Names and writes edited pictures, each with its settings inside, and knows which are there already."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..encode.base.errors import EditError, SettingsError
from ..encode.base.files import check_file, check_folder, whole
from ..encode.base.flags import dump
from .config import InferConfig
from .editing import Editing
from .jobs import Job

# The PNG text chunk that holds the settings as JSON: `Image.open("out.png").info["ip2p"]`.
CHUNK = "ip2p"

# What a picture depends on, beside its input, prompt and seed. Batch size and device are not among them.
SETTINGS = (
    "model", "revision", "variant", "dtype", "scheduler", "num_inference_steps", "image_guidance_scale",
    "guidance_scale", "guidance_rescale", "negative_prompt", "resolution",
)  # fmt: skip


def output_place(output: str) -> tuple[Path, str | None]:
    """The folder that `--output` means, and the stem of the one picture in it, or None where each has its input's.

    It is a file if it ends as pictures do, unless a folder of that name is there or a slash follows; else a folder.

    Raises:
        EditError: an ending other than .png.
        SettingsError: that cannot be written.
    """
    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir() or path.suffix.lower() not in Image.registered_extensions():
        check_folder(path, "--output")
        return path, None
    if path.suffix.lower() != ".png":
        raise EditError(f"--output {path}: expected a folder, or a name that ends in .png; a folder ends in a slash")
    check_file(path, "--output")
    return path.parent, path.stem


def output_paths(config: InferConfig, jobs: Sequence[Job]) -> list[list[Path]]:
    """The files of each job's pictures, `config.outputs.num_images` each.

    Raises:
        EditError: one file for several inputs, an ending other than .png, a folder in a file's place, or an input would
            be overwritten.
        SettingsError: the place cannot be written, or lies among the inputs.
    """
    output = config.outputs.output
    folder, stem = output_place(output)
    if stem and len(jobs) > 1:
        raise EditError(f"--output {output} is one file for {len(jobs)} inputs: give a folder")
    endings = [""] if config.outputs.num_images == 1 else [f"_{k}" for k in range(config.outputs.num_images)]
    paths = [[folder / f"{stem or job.stem}{ending}.png" for ending in endings] for job in jobs]
    if there := next(filter(Path.is_dir, itertools.chain(*paths)), None):
        raise EditError(f"--output {output}: {there} is a folder where an edited picture belongs: give another place")
    inputs = {job.path.resolve() for job in jobs if job.path}
    if taken := next((path for path in itertools.chain(*paths) if path.resolve() in inputs), None):
        raise EditError(f"--output {output} would overwrite the input {taken}: give another folder or name")
    for path, flag in ((paths[0][0], "--output"), (config.outputs.sheet, "--sheet")):
        if path:
            _check_place(config, Path(path), flag)
    return paths


def _check_place(config: InferConfig, path: Path, flag: str) -> None:
    """Refuse a picture that the next run would take for an input."""
    if pattern := next((pattern for pattern in config.inputs.image if _finds(pattern, path)), None):
        why = f"lies among the inputs --image {pattern}, of which the next run would take it for one"
        raise SettingsError(f"{flag} {path} {why}: name another folder")


def _finds(pattern: str, path: Path) -> bool:
    """Whether a folder or pattern of `--image` stands for a picture, once that is there."""
    if os.path.isdir(pattern):
        return Path(pattern).resolve() == path.parent.resolve()
    root, deep, _ = pattern.partition("**")
    if deep:
        return path.absolute().is_relative_to(Path(root).absolute()) and path.match(Path(pattern).name)
    return any(letter in pattern for letter in "*?[") and path.absolute().match(str(Path(pattern).absolute()))


def settings_of(
    config: InferConfig, model: str | None, picture: bytes, prompt: str, mask: bytes | None = None
) -> list[str]:
    """What each of a job's pictures was made with, as JSON; `model` is the stamp of `config.model`."""
    flags = dump(config)
    made = {name: flags[name] for name in SETTINGS}
    if config.outputs.sweep:
        made["image_guidance_scale"] = config.outputs.sweep_image_guidance_scale
        made["guidance_scale"] = config.outputs.sweep_guidance_scale
    if flags["guidance_interval"] != list(Editing.guidance_interval):  # as before there was one
        made["guidance_interval"] = flags["guidance_interval"]
    if lora := config.loading.lora:
        stamps = [_stamp(Path(folder), Path(folder).glob("*.safetensors")) for folder in lora]
        made |= {"lora": lora, "lora_weights": config.loading.lora_weights, "lora_files": stamps}
    made |= {"mask": hashlib.sha256(mask).hexdigest()} if mask else {}
    made |= {"model_files": model, "input": hashlib.sha256(picture).hexdigest(), "prompt": prompt}
    seeds = range(config.editing.seed, config.editing.seed + config.outputs.num_images)
    return [json.dumps(made | {"seed": seed}, ensure_ascii=False) for seed in seeds]


def model_stamp(model: str) -> str | None:
    """A hash of names, sizes and times of a local model's files: trained further, its pictures are redone.

    A model on the Hub has none: its name and `--revision` stand for it.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    # The pipeline's own parts: a training folder also holds checkpoints and logs, which do not matter here.
    found = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    parts = [path for path in found if (path.parent / "config.json").is_file()]
    return _stamp(folder, [*parts, *folder.glob("scheduler/*")])


def _stamp(folder: Path, files: Iterable[Path]) -> str:
    stamps = sorted((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def settings_in(path: Path) -> str | None:
    """The settings that the picture at `path` was made with; None where there is no such picture."""
    try:
        with Image.open(path) as image:
            return image.info.get(CHUNK)
    except Exception:  # whatever broken bytes lead Pillow to
        return None


def save(picture: Image.Image, path: Path, settings: str) -> None:
    """Write a PNG whole or not at all, so that a file that is there is a finished one."""
    info = PngInfo()
    info.add_itxt(CHUNK, settings)
    with whole(path) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)
