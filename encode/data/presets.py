"""Columns of the datasets that people bring, by the name of the dataset."""

from pathlib import PurePath
from typing import NamedTuple


class Preset(NamedTuple):
    """Columns of a known dataset."""

    original: str
    edited: str
    prompt: str
    inverse: str | None = None  # the instruction that leads back from the edited image


_ULTRAEDIT = Preset("source_image", "edited_image", "edit_prompt")

PRESETS = {
    "fusing/instructpix2pix-1000-samples": Preset("input_image", "edited_image", "edit_prompt"),
    "timbrooks/instructpix2pix-clip-filtered": Preset("original_image", "edited_image", "edit_prompt"),
    "osunlp/MagicBrush": Preset("source_img", "target_img", "instruction"),
    "BleachNick/UltraEdit": _ULTRAEDIT,
    "BleachNick/UltraEdit_500k": _ULTRAEDIT,
    "BleachNick/UltraEdit_Region_Based_100k": _ULTRAEDIT,
    "UCSC-VLAA/HQ-Edit": Preset("input_image", "output_image", "edit", "inverse_edit"),
    "McGill-NLP/AURORA": Preset("input", "output", "instruction"),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": Preset("src_img", "edited_img", "edited_prompt_list"),
    "Bin1117/AnyEdit": Preset("image_file", "edited_file", "edit_instruction"),
    "instruction-tuning-sd/cartoonization": Preset("original_image", "cartoonized_image", "edit_prompt"),
}

EVALUATION_ONLY = (
    "sayakpaul/instructpix2pix-demo",
    "facebook/emu_edit_test_set",
    "stepfun-ai/GEdit-Bench",
)
"""Sets of original images and instructions without any edited image."""


def find(name: str) -> Preset | None:
    """The preset of a dataset: a Hub id, or a folder that is called like the repository."""
    return {_repository(known): preset for known, preset in PRESETS.items()}.get(_repository(name))


def evaluation_only(name: str) -> bool:
    """Whether a dataset is known to hold no edited images."""
    return _repository(name) in map(_repository, EVALUATION_ONLY)


def _repository(name: str) -> str:
    return PurePath(name).name.lower()
