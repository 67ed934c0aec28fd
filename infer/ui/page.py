"""What happens on the page of `ip2p-infer --ui`: edits, comparison, the history of a session."""

import dataclasses
import functools
import html
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ...encode.base.errors import EditError, Ip2pError
from ...encode.base.flags import changed
from ...encode.data.pictures import open_mask, open_picture
from ..batch import blacked_out, edit_with, load_editor
from ..config import InferConfig
from ..jobs import find_jobs
from ..outputs import model_stamp, save, settings_of
from .layout import ORIGINAL, Layout

PROGRESS = gr.Progress(track_tqdm=True)  # gradio finds it as a default value, and then shows the bars of tqdm
EXAMPLES = 8  # of the pictures of --image or --table
SHOWN = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what every browser shows; others are shown as PNG


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edited picture of a session."""

    controls: tuple[Any, ...]  # what `Layout.controls` said
    model: str
    path: str  # its PNG, with the settings inside

    @property
    def caption(self) -> str:
        """The instruction and the settings in a line."""
        _, _, prompt, steps, image, text, seed = self.controls
        return f"{prompt} · seed {seed} · {steps} steps · image {image:g} · text {text:g}"


class Page:
    """What happens when the page is used. Handlers return new values by component, as gradio takes them.

    Args:
        config: where the controls start, and what holds for all that has no control.
        folder: where pictures are kept.
    """

    def __init__(self, config: InferConfig, folder: Path) -> None:
        self.config = changed(config, num_images=1, batch_size=1)
        self.folder = folder
        self.names = list(dict.fromkeys([config.model, *config.page.compare]))
        # Each model is loaded when it is first asked for, and kept: the first one now.
        self.editor = functools.cache(lambda model: load_editor(changed(self.config, model=model)))
        self.editor(config.model)
        self.layout = Layout(config, self.names, self._examples())
        at = self.layout
        with at.blocks:
            at.picture.upload(self.check, at.picture, [at.picture, at.note])
            at.mask.upload(self.check_mask, at.mask, [at.mask, at.note])
            gr.on(
                [at.edit.click, at.prompt.submit],
                self.edit,
                [at.shelf, at.models, at.fresh, *at.controls],
                [*at.everything, at.shelf, at.history],
                concurrency_limit=1,  # requests wait in line for the one device
                show_progress_on=at.result,
            )
            at.history.select(self.look, at.shelf, [*at.everything, at.shelf, at.history])
            gr.on([at.left.input, at.right.input], self.compare, [at.pictures, at.left, at.right], at.result)
            at.reset.click(self.start, None, at.everything)

    def check(self, path: str | None) -> Any:
        """Look at an upload at once, and turn what browsers cannot show into a PNG."""
        at = self.layout
        try:
            if path is not None:
                picture = open_picture(path)
                path = path if picture.format in SHOWN else self._save(picture, Path(path).stem)
            return {at.picture: path, at.note: ""}
        except Ip2pError as error:
            return {at.picture: None, at.note: _problem(error)}

    def check_mask(self, path: str | None) -> Any:
        """Look at a mask at once, and show what counts of it: white where the picture may change."""
        at = self.layout
        try:
            if path is not None:
                path = self._save(Image.fromarray((255 * open_mask(path)).round().astype("uint8")), Path(path).stem)
            return {at.mask: path, at.note: ""}
        except Ip2pError as error:
            return {at.mask: None, at.note: _problem(error)}

    def edit(self, _progress: Any = PROGRESS, *values: Any) -> Any:
        """Edit with each chosen model; one that fails is named, and the others' pictures are shown."""
        at, (shelf, models, fresh, *settings, seed) = self.layout, values
        seed = secrets.randbelow(2**31) if fresh or seed is None else seed
        made: list[Edit] = []
        problems: list[Ip2pError] = [] if models else [EditError("choose a model")]
        for model in models:
            try:
                made.append(self._edit(model, (*settings, seed)))
            except Ip2pError as error:
                problems.append(error)
        note = "<br>".join(dict.fromkeys(map(_problem, problems)))  # what all models say is said once
        shown = self._show([*made, *shelf], made[0]) | {at.seed: seed} if made else {}
        return shown | {at.note: note}

    def look(self, shelf: list[Edit], event: gr.SelectData) -> Any:
        """Bring an earlier edit back, with the settings that made it."""
        at, chosen = self.layout, shelf[event.index]
        settings = dict(zip(at.controls, chosen.controls, strict=True))
        return settings | {at.fresh: False, at.note: ""} | self._show(shelf, chosen)

    def compare(self, pictures: dict[str, str], left: str, right: str) -> tuple[str, str]:
        """Put two of the pictures within reach side by side."""
        return pictures[left], pictures[right]

    def start(self) -> Any:
        """Everything as it was at first, but for the history."""
        at, hidden = self.layout, gr.Dropdown(visible=False)
        return {part: part.value for part in at.everything} | {at.left: hidden, at.right: hidden}

    def _edit(self, model: str, controls: tuple[Any, ...]) -> Edit:
        path, mask, prompt, steps, image, text, seed = controls
        if not path:
            raise EditError("choose a picture")
        if not prompt.strip():
            raise EditError('say what to change, such as "make it snowy"')
        scales = {"image_guidance_scale": image, "guidance_scale": text}
        config = changed(self.config, model=model, num_inference_steps=steps, seed=seed, **scales)
        shares = open_mask(mask) if mask else None
        (edited,) = edit_with(self.editor(model), config, [open_picture(path)], [prompt], [shares])
        if blacked_out(edited):
            raise EditError(f"the safety checker of {model} blacked this out: another seed or instruction may do")
        (settings,) = settings_of(
            config, model_stamp(model), Path(path).read_bytes(), prompt, mask and Path(mask).read_bytes()
        )
        return Edit(controls, model, self._save(edited, f"{prompt} {seed}", settings))

    def _show(self, shelf: list[Edit], chosen: Edit) -> dict[Any, Any]:
        """Fill the places for results: the chosen edit beside its original, the other models' within reach."""
        at, original, several = self.layout, chosen.controls[0], len(self.names) > 1
        found = {edit.model: edit.path for edit in reversed(shelf) if edit.controls == chosen.controls}
        return {
            at.result: (original, chosen.path),
            at.caption: f"<span>{html.escape(chosen.caption)}</span>",
            at.pictures: {ORIGINAL: original} | found,
            at.left: gr.Dropdown([ORIGINAL, *found], value=ORIGINAL, visible=several),
            at.right: gr.Dropdown(list(found), value=chosen.model, visible=several),
            at.shelf: shelf,
            at.history: [(edit.path, edit.caption + several * f" · {edit.model}") for edit in shelf],
        }

    def _examples(self) -> list[tuple[str, str]]:
        jobs = find_jobs(self.config)[:EXAMPLES]
        return [(self._save(open_picture(job.image()), job.stem), job.prompt) for job in jobs]

    def _save(self, picture: Image.Image, title: str, settings: str = "") -> str:
        """Write a PNG in a folder of its own, under a name that is good to download."""
        name = re.sub(r"\W+", "-", title).strip("-")[:60] or "picture"
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"{name}.png"
        save(picture, path, settings)
        return str(path)


def _problem(error: Ip2pError) -> str:
    return f'<span role="alert">{html.escape(str(error))}</span>'
