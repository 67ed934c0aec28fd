"""A run that goes on: from which checkpoint, what comes back from it, and what becomes of a branch that is left."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...encode.base.console import say
from ...encode.base.errors import CacheMismatch, SettingsError, TrainError, explained
from ...encode.base.files import whole
from ...encode.cache.format import differences
from ..agree import agreed
from ..config import TrainConfig
from ..learning import Lora
from ..unet.fit import Misfit, fit
from .averages import AVERAGES
from .best import go_back
from .checkpoint import ABANDONED, AVERAGE, INCOMPLETE, MODEL, PROGRESS, SCALE, Parts, abandon, checkpoints, take_up

METRICS, SETTINGS = "metrics.jsonl", "train.yaml"


@dataclasses.dataclass
class Progress:
    """How far a run has come; saved in every checkpoint."""

    cache: dict[str, Any]  # identity of the cache that the run trains on
    seed: int
    step: int = 0  # optimizer steps
    samples: int = 0  # seen by all processes
    seen: list[int] = dataclasses.field(default_factory=lambda: [0])  # of each shape, in this lap: the position
    selection: str = ""  # identity of what positions count (`data/order.py`)
    lap: int = 0  # how often that has changed
    files: list[str] = dataclasses.field(default_factory=list)  # that its checkpoints consist of
    trains: str = Lora().described  # which weights
    told: str = ""  # for the card (`public.py`)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; Misfit: something is missing; CacheMismatch and SettingsError: it is another run's."""
        position = {"seen": None, "selection": None, "lap": 0}  # older ones knew a single shape
        fit(state, {"cache": {}, "seed": 0, "step": 0, "samples": 0} | (position if position.keys() & state else {}))
        if lines := differences(state, vars(self), ["cache"], ("in the checkpoint", "in --cache")):
            raise CacheMismatch("the checkpoint was trained on another cache: give that one\n" + "\n".join(lines))
        if (found := state.get("trains", Lora().described)) != self.trains:  # older checkpoints did not say
            raise SettingsError(f"the checkpoint has trained {found}, and this run {self.trains}: go on with its flags")
        self.seed, self.step, self.samples = state["seed"], state["step"], state["samples"]
        seen, self.lap = state.get("seen", [self.samples]), state.get("lap", 0)
        self.told = state.get("told", "")
        if state.get("selection", self.selection) == self.selection:
            fit({"seen": seen}, {"seen": self.seen})
            self.seen = seen
        else:  # counts of other samples would let those that are new catch up alone
            self.lap += 1
            say("the samples are others than the checkpoint's: they are gone through anew, in an order of their own")


def resume(config: TrainConfig, parts: Parts) -> Path | None:
    """Go on from the checkpoint that the flags ask for, if they do, and return its folder.

    Raises SettingsError if there is none, or it is damaged or of another run, CacheMismatch if it is of another cache.
    """
    folder = agreed(lambda: find(config.saving.output_dir, config.saving.resume_from_checkpoint))
    if folder:
        load(folder, parts)
        if config.steps.seed not in (None, seed := parts[PROGRESS].seed):
            raise SettingsError(f"--seed {config.steps.seed}: {folder} was trained with seed {seed}, leave it out")
    return folder


def find(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from, or None to start anew.

    It is known by its path or name; by the folder that it lies in, of whose checkpoints the newest is taken; as the
    newest one here by `latest` and `auto`.

    Raises SettingsError: there is no such checkpoint; or there are some, and nobody said what shall become of them.
    """
    there = checkpoints(output_dir)
    newest = there[-1][1] if there else None
    left = sorted(path.name for path in output_dir.glob(f"{ABANDONED}*"))
    if left and not newest and wanted in (None, "auto"):
        raise SettingsError(
            f"{output_dir} holds {', '.join(left)} alone: continue with --resume_from_checkpoint {left[-1]}, "
            "or name another --output_dir"
        )
    if wanted == "auto" or (wanted == "latest" and newest):
        return newest
    places = [Path(wanted), output_dir / wanted] if wanted and wanted != "latest" else []
    place = next((path for path in places if path.is_dir() and not path.name.endswith(INCOMPLETE)), None)
    found = inside[-1][1] if place and (inside := checkpoints(place)) else place
    if newest and (not wanted or (found and not found.parent.samefile(output_dir))):
        raise SettingsError(
            f"{output_dir} holds {newest.name} already: continue with --resume_from_checkpoint latest, "
            "or name another --output_dir"
        )
    if wanted and not found:
        names = sorted(path.name for path in output_dir.glob("*checkpoint-*") if path.suffix != INCOMPLETE)
        holds = f"{output_dir} holds {', '.join(names) or 'no checkpoint'}"
        mend = "name one of these" if names else "leave the flag out to begin, or name another --output_dir"
        raise SettingsError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {holds}: {mend}")
    return found


def load(folder: Path, parts: Parts) -> None:
    """Load a checkpoint into the parts of a run; raises as `resume` does.

    Nothing else reads one. What it consists of is written in it, since a run may do without an average, or without a
    scale of its loss; older versions did not write that.
    """
    written = [name for name in parts if name not in (SCALE, AVERAGES)]
    for name, part in parts.items():
        file = folder / name
        if part and (name in written or file.is_file()):
            with _usable(file):
                part.load_state_dict(state := _read(file))
            written = state.get("files", written) if name == PROGRESS else written
        elif (flag := {AVERAGE: "--use_ema", AVERAGES: "--ema_power"}.get(name)) and part:
            say(f"{folder.name} was trained without {flag}: the average begins with its weights")
            if name == AVERAGE:
                part.load_state_dict({"optimization_step": 0, "shadow_params": parts[MODEL].masters})
        elif flag and file.is_file():
            say(f"{folder.name} was trained with {flag}: without it, its average of the weights ends here")


def _read(file: Path) -> Any:
    """What a file of a checkpoint holds; Misfit where it cannot be read."""
    try:
        return load_file(file) if file.name == MODEL else torch.load(file, "cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise Misfit("is missing") from None
    except OSError as error:
        raise Misfit(f"cannot be read ({error.strerror or error})") from None
    except Exception:  # whatever is wrong with it; what the libraries say of that would mislead
        kind = "safetensors" if file.name == MODEL else "torch.save"
        raise Misfit(f"cannot be read: its {file.stat().st_size:,} bytes are no whole file of {kind}") from None


@contextlib.contextmanager
def _usable(file: Path) -> Iterator[None]:
    """Say of a file that does not fit what mends it: the checkpoint before this one."""
    try:
        yield
    except Misfit as problem:
        own = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
        before = [path for step, path in checkpoints(file.parent.parent) if own and step < int(own[1])]
        left = sorted(path.name for path in file.parent.parent.glob(f"{ABANDONED}*"))
        mend = f"there is none before{', but ' if left else ''}{', '.join(left)}"
        if before:
            mend = f"resume from the one before, --resume_from_checkpoint {before[-1]}"
        without = " (or the run was trained without --use_ema: leave that out)" if file.name == AVERAGE else ""
        raise SettingsError(f"{file} {problem}: that checkpoint is damaged{without}; {mend}") from None
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from None
    except CacheMismatch as error:
        raise CacheMismatch(f"{file}: {error}") from None


def history(file: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to a step, without what a kill tore; none if there is no such file."""
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and line.get("step", math.inf) <= step]


def pictures(output_dir: Path) -> list[tuple[int, Path]]:
    """Validation pictures of a run, oldest first, as (step, file)."""
    found = (re.fullmatch(r"step-(\d+)\.png", path.name) for path in output_dir.glob("validation/step-*"))
    return sorted((int(match[1]), output_dir / "validation" / match[0]) for match in found if match)


def go_on(output_dir: Path, origin: Path | None, step: int) -> None:
    """Let an output folder tell of the branch that goes on from a checkpoint alone, or of none yet; raises TrainError.

    What was saved beyond it is renamed, so that it is never counted, resumed from by `latest`, or deleted; each takes
    the metrics of its branch along, and holds the best pipeline of it. One that was renamed and is taken up again gets
    its name back. The newest goes first and metrics.jsonl is cut last, so after a kill at any moment the same command,
    or `latest`, does the rest. This is done by the main process, once all is loaded and the first step is next: a run
    that fails before that changes nothing, and one that fails later can be gone on with by `latest`.
    """
    metrics = output_dir / METRICS
    with explained(TrainError, f"{output_dir} cannot be written", OSError):
        if not origin:  # what lies here is of a run without a checkpoint
            metrics.unlink(missing_ok=True)
            return go_back(output_dir, None)
        known = history(kept if (kept := origin / METRICS).is_file() else origin.parent / METRICS, step)
        there = checkpoints(output_dir)
        ours = any(folder.samefile(origin) for _, folder in there)
        for folder in [folder for number, folder in reversed(there) if number > step or not ours]:
            if metrics.is_file():
                shutil.copy2(metrics, folder)
            left = abandon(folder)
            for number, picture in pictures(output_dir):
                if number > step:
                    (left / "validation").mkdir(exist_ok=True)
                    shutil.move(picture, left / "validation")
            say(f"{folder.name} is not of the run that goes on from {origin.name}: it is {left.name} from now on")
        go_back(output_dir, origin)
        if origin.name.startswith(ABANDONED) and origin.parent.samefile(output_dir):
            take_up(origin, step)
            say(f"{origin.name} is checkpoint-{step} again")
        with whole(metrics) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in known), encoding="utf-8")
