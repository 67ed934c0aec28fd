"""Writes a pipeline into one .safetensors file in Stable Diffusion's original layout, as other programs read it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..encode.base.console import amount, say
from ..encode.base.errors import EditError, SettingsError, explained
from ..encode.base.files import check_file, whole
from .editing import MODEL, PRECISION, Weights

# The rest is imported once flags are read: torch takes seconds to import, and --help shall not.


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write an InstructPix2Pix pipeline into one file in the original layout of Stable Diffusion.

    ComfyUI and stable-diffusion.cpp read those of SD 1.x and SDXL, A1111 those of SD 1.x; diffusers'
    `from_single_file(FILE, config=MODEL)` and `ip2p-encode --single_file_config MODEL` read all three, SD 2.x too.
    The file holds weights alone; MODEL, of which only the small files are needed, says what else there is.
    `--config run.yaml` stands for the flags that the file holds; later flags win.
    """

    model: str = dataclasses.field(metadata=MODEL)
    """Folder that ip2p-train saved, or Hub id of an InstructPix2Pix pipeline; with --lora, what these are added to.
    Also --pretrained_model_name_or_path."""
    output: Path
    """The file to write, NAME.safetensors."""
    dtype: Literal["float16", "bfloat16", "float32"] = dataclasses.field(default="float16", metadata=PRECISION)
    """Precision of all weights in it; also --mixed_precision no, fp16, bf16."""
    weights: Weights = dataclasses.field(default_factory=Weights)

    def __post_init__(self) -> None:
        if self.output.suffix != ".safetensors":
            raise SettingsError(f"--output {self.output}: expected a name that ends in .safetensors")
        check_file(self.output, "--output")

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        yield from self.weights.idle([self.model])


def export(config: ExportConfig) -> int:
    """Write the file, and say how large it is; the exit status is 0.

    Raises:
        EditError: there is no such pipeline, or adapters do not fit it; or the file cannot be written, or not in this
            precision.
        ModelError: its UNet is of a kind that the original layout has no names for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ..encode.models.original import original
    from ..encode.models.weights import not_finite
    from .models import load

    given = config.weights
    pipeline = load(config.model, "cpu", config.dtype, **vars(given))
    state = original(pipeline.components)
    if name := not_finite(state):
        raise EditError(f"--dtype {config.dtype} cannot hold the numbers of {name}: give --dtype float32 or bfloat16")
    failed = f"--output {config.output} cannot be written"
    with explained(EditError, failed, OSError, SafetensorError), whole(config.output) as unfinished:
        save_file(state, unfinished, {"format": "pt"})
    say(f"{config.output}: {amount(config.output.stat().st_size)} in {config.dtype}")
    return 0
