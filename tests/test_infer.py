"""`Editor`: pictures and prompts in, the right pictures out, on tiny real pipelines."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from PIL import Image

import tiny
from ip2p.infer import EditError, Editor
from ip2p.infer.drawing import denoise
from ip2p.infer.drawing.guidance import Guidance, Told, guided
from ip2p.infer.models import scheduler_like

STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny SD and SDXL InstructPix2Pix pipeline, trained at 16 pixels with a VAE that halves."""
    return {name: tiny.pipeline(tmp_path_factory.mktemp("models") / name) for name in ("sd", "sdxl")}


@pytest.fixture(params=["sd", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def editor(models: dict[str, Path], kind: str) -> Editor:
    return quiet(Editor(models[kind]))


@pytest.fixture
def bare(models: dict[str, Path], kind: str) -> Any:
    """The pipeline as diffusers loads it, without ip2p."""
    pipeline = DiffusionPipeline.from_pretrained(models[kind])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quiet(editor: Editor) -> Editor:
    editor.pipeline.set_progress_bar_config(disable=True)
    return editor


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Noise, (width, height): no two alike, and every wrong pairing shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any channel, in levels of 255."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


def edit_by_hand(pipeline: Any, image: Image.Image, prompt: str, text: float, keep: float) -> Image.Image:
    """A reference for SD without the pipeline's `__call__`: three separate passes, equation 3 of the paper."""

    def encode(words: str) -> torch.Tensor:
        tokens = pipeline.tokenizer(words, padding="max_length", max_length=77, return_tensors="pt")
        return pipeline.text_encoder(tokens.input_ids)[0]  # (1, 77, d)

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        words, none = encode(prompt), encode("")
        condition = pipeline.vae.encode(pixels).latent_dist.mode()
        latents = torch.randn(condition.shape, generator=torch.Generator().manual_seed(0))
        pipeline.scheduler.set_timesteps(STEPS)
        for t in pipeline.scheduler.timesteps:
            both, kept, free = (
                pipeline.unet(torch.cat([latents, c], 1), t, encoder_hidden_states=w).sample
                for c, w in ((condition, words), (condition, none), (0 * condition, none))
            )
            noise = free + keep * (kept - free) + text * (both - kept)
            latents = pipeline.scheduler.step(noise, t, latents).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return Image.fromarray(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def test_editor_and_bare_pipeline_agree_bit_for_bit(editor: Editor, bare: Any, kind: str) -> None:
    """On a picture of fitting size nothing stands between the caller and diffusers' own result."""
    size = {"width": 16, "height": 16} if kind == "sdxl" else {}
    expected = bare(
        image=picture(1),
        prompt="make it red",
        negative_prompt="blue",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        image_guidance_scale=1.2,
        **size,
    ).images[0]
    (edited,) = editor.edit(
        picture(1),
        "make it red",
        negative_prompt="blue",
        seed=5,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        image_guidance_scale=1.2,
    )
    assert apart(edited, expected) == 0


# numpy 2 warns about how diffusers' Euler schedulers turn tensors into arrays.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedulers_of_every_kind_are_driven_as_diffusers_does(editor: Editor, bare: Any, kind: str) -> None:
    """With two calls of the UNet a step, with noise in each, with a memory; also where one pass is left out."""
    size = {"width": 16, "height": 16} if kind == "sdxl" else {}
    for scheduler in ("HeunDiscrete", "EulerAncestralDiscrete", "UniPCMultistep"):
        bare.scheduler = scheduler_like(bare.scheduler, scheduler)
        editor.pipeline.scheduler = scheduler_like(editor.pipeline.scheduler, scheduler)
        for text, keep in ((7.5, 1.5), (4, 1), (3, 3)):
            scales = {"guidance_scale": text, "image_guidance_scale": keep, "num_inference_steps": 5}
            generator = torch.Generator().manual_seed(5)
            (expected,) = bare(image=picture(1), prompt="make it red", generator=generator, **scales, **size).images
            assert apart(editor.edit(picture(1), "make it red", seed=5, **scales)[0], expected) <= 1


def test_two_prompts_with_two_images_each_are_paired(editor: Editor, bare: Any, kind: str) -> None:
    """Several pictures of several pairs come out side by side, each with its own input, prompt and seed."""
    size = {"width": 16, "height": 16} if kind == "sdxl" else {}
    pairs = [(picture(1), "make it red"), (picture(2), "turn the sky blue")]
    expected = [
        bare(
            image=image,
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=STEPS,
            guidance_scale=10.0,
            image_guidance_scale=1.5,
            **size,
        ).images[0]
        for image, prompt in pairs
        for seed in (0, 1)
    ]
    images, prompts = zip(*pairs, strict=True)
    edited = editor.edit(images, prompts, num_images=2, num_inference_steps=STEPS)
    assert [apart(*both) <= 1 for both in zip(edited, expected, strict=True)] == [True] * 4
    assert min(apart(edited[i], edited[j]) for i in range(4) for j in range(i)) > 1


def test_a_seed_gives_the_same_picture_alone_in_a_batch_and_again(editor: Editor) -> None:
    """What else is edited beside a picture, in which order and how many at once, does not matter."""
    images = [picture(seed, size) for seed, size in enumerate([(16, 16), (20, 10), (16, 16), (7, 30), (20, 10)])]
    prompts = [f"make it {color}" for color in ("red", "green", "blue", "snowy", "night")]
    alone = [editor.edit(*pair, num_inference_steps=STEPS)[0] for pair in zip(images, prompts, strict=True)]
    for batch_size in (1, 2, 8):
        batch = editor.edit(images, prompts, num_inference_steps=STEPS, batch_size=batch_size)
        # Kernels may round otherwise at another batch size: that is one level at most.
        assert all(apart(*both) <= 1 for both in zip(batch, alone, strict=True))
    again = editor.edit(images, prompts, num_inference_steps=STEPS, batch_size=8)
    assert all(apart(*both) == 0 for both in zip(batch, again, strict=True))


@pytest.mark.parametrize(("text", "keep"), [(10, 0.5), (10, 0), (1, 1.5), (0.5, 1), (0, 0), (1, 1), (7.5, 1.5)])
@pytest.mark.parametrize("kind", ["sd"])
def test_guidance_is_computed_at_every_scale(editor: Editor, bare: Any, text: float, keep: float) -> None:
    """Scales at which the pipelines silently drop all guidance give what the paper's equation says."""
    (edited,) = editor.edit(
        picture(3), "make it red", num_inference_steps=STEPS, guidance_scale=text, image_guidance_scale=keep
    )
    assert apart(edited, edit_by_hand(bare, picture(3), "make it red", text, keep)) <= 1


def test_guidance_leaves_the_pipeline_as_it_was(editor: Editor, bare: Any) -> None:
    """An edit leaves nothing behind that would change what the caller does with the pipeline afterwards."""
    editor.edit(picture(3), "make it red", num_inference_steps=1, image_guidance_scale=0.5)
    arguments = {"image": picture(3), "prompt": "make it red", "num_inference_steps": STEPS}
    arguments |= {"width": 16, "height": 16} if "XL" in type(bare).__name__ else {}
    pipelines: list[Any] = [editor.pipeline, bare]
    mine, fresh = (run(**arguments, generator=torch.Generator().manual_seed(0)) for run in pipelines)
    assert apart(mine.images[0], fresh.images[0]) == 0


@pytest.mark.parametrize("kind", ["sdxl"])
def test_guidance_rescale_is_that_of_the_sdxl_pipeline(editor: Editor, bare: Any) -> None:
    """Where diffusers can rescale, ours is the same to the bit; SD takes the same path."""
    expected = bare(
        image=picture(4),
        prompt="make it red",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        guidance_scale=10.0,
        image_guidance_scale=1.5,
        guidance_rescale=0.7,
        width=16,
        height=16,
    ).images[0]
    (edited,) = editor.edit(picture(4), "make it red", num_inference_steps=STEPS, guidance_rescale=0.7)
    assert apart(edited, expected) == 0
    (plain,) = editor.edit(picture(4), "make it red", num_inference_steps=STEPS)
    assert apart(edited, plain) > 0


def guide(noise: torch.Tensor, guidance: Guidance) -> tuple[torch.Tensor, int]:
    """The guided noise of predictions (3B, 4, h, w) from text and picture, picture, none; and how many are computed."""
    both, kept, free = noise.chunk(3)
    yes, no, computed = torch.ones_like(both), torch.zeros_like(both), 0

    def unet(sample: torch.Tensor, _: object, text: torch.Tensor, **__: object) -> tuple[torch.Tensor]:
        nonlocal computed
        computed = len(sample)
        seen = zip(sample[:: len(both), 4, 0, 0].tolist(), text[:: len(both), 0, 0, 0].tolist(), strict=True)
        return (torch.cat([{(1, 1): both, (1, 0): kept, (0, 0): free}[told] for told in seen]),)

    return guided(unet, no, torch.tensor(0), Told((yes, yes, no), (yes, no, no), {}), guidance), computed


def test_full_rescaling_gives_guided_noise_the_spread_of_the_conditional_one() -> None:
    """At 1, each sample's guided noise has the standard deviation of its prediction from text and picture."""
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, _ = guide(noise, Guidance(text=9.0, image=2.0, rescale=1.0))  # (2, 4, 8, 8)
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), noise[:2].std(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("text", "image", "rescale", "passes"),
    [(10, 1.5, 0, 3), (10, 1, 0, 2), (3, 3, 0, 2), (1, 1, 0, 1), (0, 0, 0, 1), (0, 1, 0, 1), (0, 1, 0.5, 2)],
)
def test_what_weighs_nothing_is_not_computed(text: float, image: float, rescale: float, passes: int) -> None:
    """The sum is equation 3 of the paper nevertheless, in float32 where the UNet computes in half precision."""
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    found, computed = guide(noise, Guidance(text, image, rescale))
    both, kept, free = noise.float().chunk(3)
    expected = free + image * (kept - free) + text * (both - kept)
    torch.testing.assert_close(found, rescale_noise_cfg(expected, both, rescale) if rescale else expected)
    assert computed == passes * len(both)


def test_outside_the_interval_one_pass_is_enough(editor: Editor) -> None:
    """There the prediction from text and picture is taken as it is: no interval is no guidance."""
    rows: list[int] = []
    editor.pipeline.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))

    def edit(*interval: float, **scales: Any) -> Image.Image:
        rows.clear()
        options: dict[str, Any] = {"num_inference_steps": 10, "guidance_interval": interval, "guidance_rescale": 0.5}
        return editor.edit(picture(4), "make it red", **options | scales)[0]

    part = edit(0.2, 0.7)
    assert rows == [1] * 2 + [3] * 5 + [1] * 3
    whole = edit(0, 1)
    assert rows == [3] * 10
    none = edit(0, 0.01)
    assert rows == [1] * 10
    assert apart(none, edit(0, 1, guidance_scale=1, image_guidance_scale=1)) == 0
    assert min(apart(part, whole), apart(part, none), apart(whole, none)) > 0


def test_what_was_encoded_is_known_for_the_next_scale_alone(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another picture, prompt or negative prompt is encoded anew, and by itself an editor keeps nothing."""
    encoded: list[str] = []
    encode = denoise.encode
    monkeypatch.setattr(denoise, "encode", lambda *given: encoded.append(given[2][0]) or encode(*given))
    scales: list[dict[str, Any]] = [{}, {"image_guidance_scale": 2.0}, {"negative_prompt": "blue"}]
    plain = [editor.edit(picture(4), "make it red", num_inference_steps=STEPS, **more)[0] for more in scales]
    assert len(encoded) == 3
    editor.known = {}
    again = [editor.edit(picture(4), "make it red", num_inference_steps=STEPS, **more)[0] for more in scales]
    assert len(encoded) == 5
    assert [apart(*both) for both in zip(again, plain, strict=True)] == [0] * 3
    for seed in range(denoise.KEPT + 2):
        editor.edit(picture(seed), "make it blue", num_inference_steps=1)
    assert len(editor.known) == denoise.KEPT


def test_half_precision_edits_nearly_as_float32(editor: Editor, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's VAE, which overflows in it, is in float32 for the time of an edit; nothing is summed in halves."""
    randn: Any = torch.randn  # PyTorch 2.7 draws other noise where halves are asked for
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, **options: randn(*size, **options).to(dtype))
    (whole,) = editor.edit(picture(4), "make it red", num_inference_steps=STEPS)
    for part in ("vae", "unet", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")):
        torch.nn.Module.to(getattr(editor.pipeline, part), torch.float16)
    seen: list[torch.dtype] = []
    for part in (editor.pipeline.vae.encoder, editor.pipeline.vae.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    (halves,) = editor.edit(picture(4), "make it red", num_inference_steps=STEPS)
    assert 0 < apart(halves, whole) <= 4
    assert seen == [torch.float32 if kind == "sdxl" else torch.float16] * 2
    assert editor.pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("size", "working"),
    [((16, 16), (16, 16)), ((400, 200), (16, 8)), ((3, 6), (8, 16)), ((100, 98), (16, 16)), ((900, 20), (16, 2))],
)
def test_pictures_are_edited_at_the_trained_size_without_squashing(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], working: tuple[int, int]
) -> None:
    """The long side becomes what the UNet was trained for, the aspect stays, the result has the input's size."""
    shapes: list[torch.Size] = []
    encode = editor.pipeline.vae.encode
    monkeypatch.setattr(editor.pipeline.vae, "encode", lambda x: shapes.append(x.shape) or encode(x))
    (edited,) = editor.edit(picture(5, size), "make it red", num_inference_steps=1)
    assert (shapes[0][3], shapes[0][2]) == working
    assert edited.size == size


def test_resolution_sets_the_long_side(editor: Editor) -> None:
    """A resolution overrides the trained one, and one that the VAE cannot divide is refused."""
    assert editor.resolution == 16
    assert editor.working_size((400, 100), 64) == (64, 16)
    for wrong in (33, 0, -16):
        with pytest.raises(EditError, match=f"resolution {wrong} is not a multiple of 2"):
            editor.edit(picture(5), "make it red", resolution=wrong)


# numpy 2 warns about how diffusers' Euler schedulers turn tensors into arrays.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sd"])
def test_a_scheduler_is_chosen_by_diffusers_name(models: dict[str, Path], editor: Editor) -> None:
    """With or without "Scheduler", in any case; it keeps the configuration, draws from the seed, and matters."""
    chosen = quiet(Editor(models["sd"], scheduler="eulerancestraldiscrete"))
    assert type(chosen.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert chosen.pipeline.scheduler.config.beta_end == editor.pipeline.scheduler.config.beta_end
    images, prompts = [picture(7), picture(8)], ["make it red", "make it blue"]
    both = chosen.edit(images, prompts, num_inference_steps=STEPS)
    assert apart(both[1], chosen.edit(images[1], prompts[1], num_inference_steps=STEPS)[0]) <= 1
    assert apart(both[1], editor.edit(images[1], prompts[1], num_inference_steps=STEPS)[0]) > 1
    with pytest.raises(EditError, match=r"no scheduler Eular: expected one of .*EulerDiscrete"):
        Editor(models["sd"], scheduler="Eular")


@pytest.mark.parametrize("kind", ["sd"])
def test_a_loaded_pipeline_is_taken_as_it_is(editor: Editor, bare: Any) -> None:
    """Training can hand over the pipeline that it holds, and a 4-channel one is refused like a folder."""
    assert Editor(bare).pipeline is bare
    bare.unet = tiny.unet(4)
    with pytest.raises(EditError, match="conv_in takes 4 channels, 8 expected; train one with ip2p-train"):
        Editor(bare)


@pytest.mark.parametrize("kind", ["sd"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": " "}, "the prompt is empty"),
        ({"prompts": ["a", "b", "c"], "images": [b"", b""]}, "2 pictures and 3 prompts"),
        ({"images": b"no picture"}, "the image cannot be decoded"),
        ({"images": "nowhere.png"}, r"nowhere\.png cannot be read: No such file"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 1000"),
        ({"num_images": 0}, "expected at least 1"),
        ({"batch_size": 0}, "expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": -0.1}, "guidance_scale is -0.1, expected a number from 0 up"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale is nan"),
        ({"guidance_rescale": 1.1}, "guidance_rescale is 1.1, expected 0 to 1"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is 0.8 0.2, expected two shares from 0 to 1, the lower"),
        ({"guidance_interval": (0, float("nan"))}, "guidance_interval is 0 nan"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(editor: Editor, settings: dict[str, Any], message: str) -> None:
    """A wrong picture, prompt or setting is said in the caller's words before anything is computed."""
    arguments: dict[str, Any] = {"images": picture(9), "prompts": "make it red"} | settings
    with pytest.raises(EditError, match=message) as caught:
        editor.edit(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sd"])
def test_a_scheduler_that_cannot_do_so_few_steps_is_named(models: dict[str, Path], editor: Editor) -> None:
    """PNDM's warm-up needs four steps here, and diffusers would fail on shapes."""
    with pytest.raises(EditError, match="PNDMScheduler cannot do 2 num_inference_steps"):
        Editor(models["sd"], scheduler="PNDM").edit(picture(9), "make it red", num_inference_steps=2)


@pytest.mark.parametrize("kind", ["sd"])
def test_running_out_of_memory_names_the_flags_that_help(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too small is no bug of ours: the message says what to lower."""

    def too_much(_images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(editor.pipeline.vae, "encode", too_much)
    with pytest.raises(EditError, match="2 pictures of 16 x 16 at once: lower --batch_size or --resolution"):
        editor.edit([picture(1), picture(2)], "make it red")


def test_a_vae_that_shifts_is_no_part_of_these_pipelines(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """They would not undo it; that of SDXL undoes a mean."""
    folder = shutil.copytree(models[kind], tmp_path / kind)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    for more, fits in (({"shift_factor": 0.1}, False), ({"latents_mean": [0.1] * 4}, kind == "sdxl")):
        file.write_text(json.dumps(config | more))
        if fits:
            Editor(folder)
        else:
            with pytest.raises(EditError, match=r"config\.json shifts latents"):
                Editor(folder)
