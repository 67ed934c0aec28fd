"""What the page of `ip2p-infer --ui` looks like: its controls, its places for results, its colors."""

import html

import gradio as gr

from ..config import InferConfig

ORIGINAL = "Original"
PROMPTS = ("make it snowy", "turn it into a watercolor", "as if at sunset", "make it a pencil drawing")

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
#top h1 { margin: 0; font-size: 1.5rem; }
#top p, #caption * { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#note:not(:has([role])), #caption:not(:has(span)), #history:not(:has(img)) { display: none; }
#note { background: var(--error-background-fill); border-radius: var(--radius-md); }
#note * { color: var(--error-icon-color); }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#result .empty { min-height: min(80vw, 440px); }
#history .grid-wrap { height: auto; min-height: 0; max-height: 480px; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); padding-top: 2rem; }
#history .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#history .thumbnail-item img { height: auto; aspect-ratio: 1; }
#history .caption-label { position: static; max-width: none; border: 0; text-align: start; white-space: normal;
  overflow-wrap: anywhere; }
"""
# Of this font's weights, 600 is a fragment in gradio's package; browsers take 700 for it.
FONT = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
# Quiet colors, and a font that gradio brings along: the page fetches nothing from elsewhere.
THEME = gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=FONT)


class Layout:
    """The components of the page, in a `gradio.Blocks` that a caller adds events to.

    Args:
        config: where the controls start.
        models: names to choose from.
        examples: pictures' files and prompts to try; none: prompts alone.

    Attributes:
        blocks: the whole.
        controls: picture, mask, prompt, steps, image guidance, text guidance, seed: what an edit depends on.
        everything: all that a reset puts back.
    """

    def __init__(self, config: InferConfig, models: list[str], examples: list[tuple[str, str]]) -> None:
        several = len(models) > 1
        with gr.Blocks(title="ip2p", analytics_enabled=False) as self.blocks:
            name = "" if several else f" &middot; {html.escape(models[0])}"
            gr.HTML(f"<h1>ip2p</h1><p>Edits pictures by instruction{name}</p>", elem_id="top")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._inputs()
                    if not examples:
                        gr.Examples([[prompt] for prompt in PROMPTS], self.prompt, elem_id="examples")
                    self.models = gr.CheckboxGroup(
                        models, value=models, label="Models", visible=several, elem_id="models"
                    )
                    with gr.Row():
                        self.edit = gr.Button("Edit", variant="primary", scale=2, min_width=120)
                        self.reset = gr.Button("Reset", scale=1, min_width=80)
                    self.note = gr.HTML(elem_id="note")
                    self._settings(config)
                with gr.Column(scale=3, min_width=320):
                    self._results()
                    if examples:
                        gr.Examples([list(pair) for pair in examples], [self.picture, self.prompt], elem_id="examples")
        self.controls = (self.picture, self.mask, self.prompt, self.steps, self.keep, self.follow, self.seed)
        results = (self.result, self.caption, self.pictures, self.left, self.right)
        self.everything = [*self.controls, self.fresh, self.models, self.note, *results]

    def _inputs(self) -> None:
        self.picture = gr.Image(
            label="Picture", type="filepath", sources=["upload", "clipboard"], buttons=[], height=300, elem_id="picture"
        )
        # gradio would open the file before any code here sees it, and call a broken one a mere "Error".
        self.picture.preprocess = lambda payload: payload and payload.path
        label = "Mask: where it may change, white or transparent (optional)"
        self.mask = gr.Image(label=label, type="filepath", sources=["upload"], buttons=[], height=120, elem_id="mask")
        self.mask.preprocess = self.picture.preprocess
        self.prompt = gr.Textbox(label="Instruction", placeholder="make it snowy", elem_id="instruction")

    def _settings(self, config: InferConfig) -> None:
        steps, keep = config.editing.num_inference_steps, config.editing.image_guidance_scale
        follow, seed = config.editing.guidance_scale, config.editing.seed
        labels = "Image guidance: keep to the picture", "Text guidance: follow the instruction"
        with gr.Group():
            self.steps = gr.Slider(1, max(100, steps), steps, step=1, label="Steps", elem_id="steps")
            self.keep = gr.Slider(0, max(5, keep), keep, step=0.05, label=labels[0], elem_id="keep")
            self.follow = gr.Slider(0, max(20, follow), follow, step=0.1, label=labels[1], elem_id="follow")
            with gr.Row():
                self.seed = gr.Number(seed, precision=0, label="Seed", min_width=120, elem_id="seed")
                self.fresh = gr.Checkbox(label="New seed each time", min_width=120, elem_id="fresh")

    def _results(self) -> None:
        self.shelf, self.pictures = gr.State([]), gr.State({})
        self.result = gr.ImageSlider(label="Before and after", interactive=False, max_height=560, elem_id="result")
        self.caption = gr.HTML(elem_id="caption")
        with gr.Row():
            self.left = gr.Dropdown([ORIGINAL], value=ORIGINAL, label="Left", visible=False, elem_id="left")
            self.right = gr.Dropdown([], label="Right", visible=False, elem_id="right")
        label = "This session: click to bring one back"
        self.history = gr.Gallery(
            label=label, object_fit="contain", allow_preview=False, interactive=False, buttons=[], elem_id="history"
        )
