"""Which column plays which role: by flag, as known of the dataset, by its usual name, else by what its name says."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import Image

from ..base.console import say
from ..base.errors import SampleError, SourceError, did_you_mean
from .messages import is_message

IMAGES, TEXT, VALUES = "images", "string", "numbers, booleans or text"
ENDING = re.compile(r"([._-](file_?name|file|path|images?|imgs?|jpe?g|png|webp|txt|json))+$")


class Role(NamedTuple):
    """What a column may be needed for, and how it is recognized where nothing else names it.

    Its `names` are in lower case, without endings such as _image or .jpg; the first is the usual one, as it is: of
    diffusers' script, or for captions of the original project's dataset.
    """

    flag: str
    what: str
    holds: str
    names: str
    beside: bool = False  # the pairs: what identifies a dataset leaves it out


# fmt: off
ORIGINAL = Role("original_image_column", "original images", IMAGES,
                "input_image image file_name original input local_input source src before")
EDITED = Role("edited_image_column", "edited images", IMAGES,
              "edited_image edited output target tgt after cartoonized")
PROMPT = Role("edit_prompt_column", "edit instructions", TEXT,
              "edit_prompt edit_instruction editing_instruction instruction prompt edit text txt")
INVERSE = Role("inverse_prompt_column", "instructions that lead back", TEXT,
               "inverse_edit inverse_edit_prompt inverse_prompt inverse_instruction inverse")
MASK = Role("mask_column", "masks", IMAGES, "mask edit_mask")
BEFORE = Role("original_caption_column", "captions of the originals", TEXT,
              "original_prompt original_caption source_caption input_caption", beside=True)
AFTER = Role("edited_caption_column", "captions of the edited images", TEXT,
             "edited_prompt edited_caption target_caption output_caption", beside=True)
# fmt: on

Columns = Mapping[Role, str]
Kinds = Mapping[str, Collection[str]]
"""What each column may hold, by its first values, the most frequent first: `IMAGES`, `TEXT` or anything else."""
Pick = Callable[..., dict[Role, str]]
"""`choose` for one dataset: takes what the columns hold, and maybe what is known of them."""


class Rows:
    """What every kind of dataset offers. It is copied into worker processes, so it holds no open files.

    Attributes:
        columns: the column of each role that has one, in the order in which the roles were asked for.
    """

    columns: Columns

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        """What a row holds in these roles: image files as bytes (None where one is missing), texts as they are.

        Raises:
            SampleError: something of that cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        raise NotImplementedError

    def texts(self, role: Role) -> Iterable[Any]:
        """What all rows hold in a role of text, None where that cannot be read; no image is read."""
        for row in range(len(self)):
            try:
                yield self.read(row, role)[0]
            except SampleError:
                yield None

    def name(self, row: int) -> str | None:
        """The path of the original image's own file, if it has one."""

    def group(self, row: int) -> str | None:
        """The prompt that a row belongs to, if that is not its instruction."""


def preset(*names: str, mask: str | None = None) -> Columns:
    """The columns of a dataset: original, edited image, instruction, and maybe the one that leads back, and masks."""
    return dict(zip((ORIGINAL, EDITED, PROMPT, INVERSE), names, strict=False)) | ({MASK: mask} if mask else {})


CAPTIONS = {BEFORE: "input", AFTER: "output"}  # as the original project calls them
PRESETS: dict[str, Columns] = {
    "fusing/instructpix2pix-1000-samples": preset("input_image", "edited_image", "edit_prompt"),
    "timbrooks/instructpix2pix-clip-filtered": preset("original_image", "edited_image", "edit_prompt"),
    "osunlp/MagicBrush": preset("source_img", "target_img", "instruction", mask="mask_img"),
    "BleachNick/UltraEdit": preset("source_image", "edited_image", "edit_prompt"),
    "BleachNick/UltraEdit_500k": preset("source_image", "edited_image", "edit_prompt"),
    "BleachNick/UltraEdit_Region_Based_100k": preset("source_image", "edited_image", "edit_prompt", mask="mask_image"),
    "UCSC-VLAA/HQ-Edit": {**preset("input_image", "output_image", "edit", "inverse_edit"), **CAPTIONS},
    "McGill-NLP/AURORA": preset("input", "output", "instruction"),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": preset("src_img", "edited_img", "edited_prompt_list"),
    "Bin1117/AnyEdit": {**preset("image_file", "edited_file", "edit_instruction"), **CAPTIONS},
    "instruction-tuning-sd/cartoonization": preset("original_image", "cartoonized_image", "edit_prompt"),
}
"""Columns of the datasets that people bring."""

EVALUATION_ONLY = ("sayakpaul/instructpix2pix-demo", "facebook/emu_edit_test_set", "stepfun-ai/GEdit-Bench")
"""Sets of original images and instructions without any edited image."""


def known_columns(name: str) -> Columns:
    """What is known of a dataset: a Hub id, or a folder that is called like the repository."""
    return {_repository(known): columns for known, columns in PRESETS.items()}.get(_repository(name), {})


def evaluation_only(name: str) -> bool:
    """Whether a dataset is known to hold no edited images."""
    return _repository(name) in map(_repository, EVALUATION_ONLY)


def choose(
    flags: Mapping[Role, str | None],
    name: str,
    kinds: Kinds,
    needed: Collection[Role],
    wanted: Collection[Role] = (),
    known: Columns | None = None,
) -> dict[Role, str]:
    """A column for each role, in their order; a role that is merely wanted goes without where no column fits.

    A flag wins, then what is known (of the dataset called `name`, unless it is given), then the usual name, then the
    only column that is called like that; what was guessed so is said. A column that is named may hold what is meant
    next to other things, as text may name a file; for a guess it must hold that in the first place.

    Raises:
        SourceError: no such column, none or several that may be meant, or one that holds something else.
    """
    if not kinds:
        raise SourceError(f"{name} holds no samples")
    known = known_columns(name) if known is None else known
    chosen: dict[Role, str] = {}
    guessed: list[str] = []
    for role in (*needed, *wanted):
        names = role.names.split()
        fitting = [column for column, found in kinds.items() if next(iter(found)) == role.holds]
        there = kinds if role in needed else fitting
        column = flags.get(role) or next((c for c in (known.get(role), names[0]) if c in there), None)
        if column is None:
            found = [column for column in fitting if ENDING.sub("", column.lower()) in names]
            if not found and role not in needed:
                continue
            column = _only(role, found, name, kinds)
            guessed.append(f"{role.what} in {column} (--{role.flag})")
        _check(role, column, name, kinds)
        chosen[role] = column
    if guessed:
        say(f"{name}: found {', '.join(guessed)}")
    return chosen


def kinds_of(values: Iterable[Any], folder: Path | None = None) -> list[str]:
    """What values may be, the most frequent first; paths are relative to `folder`, without one text names no file."""
    return [kind for kind, _ in Counter(kind for value in values for kind in _kinds(value, folder)).most_common()]


def image_columns(columns: Columns) -> list[str]:
    """Those that hold images."""
    return [column for role, column in columns.items() if role.holds == IMAGES]


def is_image_name(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return Path(name).suffix.lower() in Image.registered_extensions()


def _repository(name: str) -> str:
    return PurePath(name).name.lower()


def _only(role: Role, found: list[str], name: str, kinds: Kinds) -> str:
    if len(found) == 1:
        return found[0]
    how = f"may be in {', '.join(found)}" if found else "are in no column that is known by its name"
    raise SourceError(f"{name}: the {role.what} {how}; it has {', '.join(kinds)}: choose with --{role.flag}")


def _check(role: Role, column: str, name: str, kinds: Kinds) -> None:
    if column not in kinds:
        how = f"choose with --{role.flag}{did_you_mean(column, kinds)}"
        raise SourceError(f"{name} has no column {column}; it has {', '.join(kinds)}: {how}")
    fits = [c for c, found in kinds.items() if (set(found) - {IMAGES} if role.holds == VALUES else role.holds in found)]
    if column not in fits:
        choice = f"choose from {', '.join(fits)} with --{role.flag}" if fits else "no column does"
        held = next(iter(kinds[column]))
        raise SourceError(f"column {column} of {name} holds {held}, expected {role.holds}: {choice}")


def _kinds(value: Any, folder: Path | None) -> list[str]:
    """What a value may be: text that ends like the name of a picture is either, unless such a file is there."""
    while isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes) or (isinstance(value, dict) and {"bytes", "path"} <= value.keys()):
        return [IMAGES]
    if not isinstance(value, str):
        return ["messages", TEXT] if is_message(value) else [] if value is None else [type(value).__name__]
    if folder and value and os.path.isfile(folder / value):
        return [IMAGES]
    if folder is None or not is_image_name(value):
        return [TEXT] if value else []
    return ["urls" if "://" in value else IMAGES if folder.is_dir() else "paths", TEXT]
