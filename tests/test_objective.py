"""Tests of train/objective.py: what training computes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import tiny
from ip2p.train.learning import Objective as Flags
from ip2p.train.objective import Batch, Draws, Null, Objective, drop_conditioning, edit_weights, target_latents

SCALING = 0.18215
EVEN = (0.05, 0.05, 0.05)


def scheduler(prediction_type: Any = "epsilon") -> Any:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def batch(size: int = 4, *, dtype: torch.dtype = torch.float16, sdxl: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator).to(dtype)

    if sdxl:
        return Batch(normal(4, 8, 8), normal(8, 8, 8), normal(77, 48), normal(32), torch.full((size, 6), 16.0))
    return Batch(normal(4, 8, 8), normal(8, 8, 8), normal(77, 16))


def null(*, sdxl: bool = False) -> Null:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, 77, 48 if sdxl else 16, generator=generator).half()
    return Null(text, torch.randn(1, 32, generator=generator).half() if sdxl else None)


def objective(kind: str = "epsilon", *, sdxl: bool = False, **options: Any) -> Objective:
    return Objective(scheduler(kind), null(sdxl=sdxl), SCALING, Flags(**options))


def draw(samples: Batch, timesteps: int, *position: int) -> Draws:
    """Draws for a schedule of some number of timesteps."""
    return Objective(DDPMScheduler(timesteps), Null(torch.zeros(1)), 1.0, Flags()).draw(samples, *position)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny.unet(8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_equals_a_reference_made_of_diffusers_own_calls(unet: UNet2DConditionModel, kind: str) -> None:
    """Given latents and draws, the loss is what diffusers' script computes, to 1e-6 in float32."""
    samples, nothing, noising = batch(), null(), scheduler(kind)
    draws = draw(samples, 1000, 3, 0, 0, 0)._replace(dropout=torch.tensor([0.02, 0.07, 0.12, 0.9]))

    posterior = DiagonalGaussianDistribution(samples.edited.float())
    latents = (posterior.mean + posterior.std * draws.posterior) * SCALING
    noisy = noising.add_noise(latents, draws.noise, draws.timesteps)
    text = samples.text.float().clone()
    text[:2] = nothing.text.float()  # 0.02 drops the text, 0.07 both
    image = samples.original.float().clone()
    image[1:3] = 0  # 0.07 drops both, 0.12 the image
    wanted = draws.noise if kind == "epsilon" else noising.get_velocity(latents, draws.noise, draws.timesteps)
    predicted = unet(torch.cat([noisy, image], dim=1), draws.timesteps, text).sample
    reference = F.mse_loss(predicted.float(), wanted.float(), reduction="mean")

    ours = objective(kind).loss(unet, samples, draws)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(reference.item(), abs=1e-6)


def test_sdxl_loss_equals_a_reference_and_drops_the_pooled_text_with_the_text() -> None:
    """SDXL's pooled embedding is replaced exactly where the text is."""
    torch.manual_seed(0)
    unet = tiny.unet(8, sdxl=True)
    samples, nothing, noising = batch(sdxl=True), null(sdxl=True), scheduler()
    assert samples.pooled is not None
    assert nothing.pooled is not None
    draws = draw(samples, 1000, 3, 0, 0, 0)._replace(dropout=torch.tensor([0.02, 0.07, 0.12, 0.9]))
    text, pooled = samples.text.float().clone(), samples.pooled.float().clone()
    text[:2], pooled[:2] = nothing.text.float(), nothing.pooled.float()
    image = samples.original.float().clone()
    image[1:3] = 0
    latents = target_latents(samples.edited, draws.posterior, SCALING)
    noisy = noising.add_noise(latents, draws.noise, draws.timesteps)
    added = {"text_embeds": pooled, "time_ids": samples.time_ids}
    predicted = unet(torch.cat([noisy, image], 1), draws.timesteps, text, added_cond_kwargs=added).sample
    ours = objective(sdxl=True).loss(unet, samples, draws)
    assert ours.item() == pytest.approx(F.mse_loss(predicted, draws.noise).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("uniform", "no_text", "no_image"),
    [
        (0.0, True, False),
        (0.0499, True, False),
        (0.05, True, True),
        (0.0999, True, True),
        (0.1, False, True),
        (0.1499, False, True),
        (0.1501, False, False),
        (0.999, False, False),
    ],
)
def test_each_dropout_band_drops_what_it_should(uniform: float, no_text: bool, no_image: bool) -> None:
    """[0, p) drops the text, [p, 2p) both, [2p, 3p) the image, as in diffusers' script."""
    samples, nothing = batch(1), null()
    text, image, _ = drop_conditioning(samples, nothing, torch.tensor([uniform], dtype=torch.float64), EVEN)
    assert torch.equal(text, nothing.text if no_text else samples.text)
    assert torch.equal(image, torch.zeros_like(image) if no_image else samples.original.float())


@pytest.mark.parametrize("dropout", [EVEN, (0.1, 0.02, 0.3), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.0, 0.0)])
def test_dropout_frequencies_over_100_000_draws_are_the_probabilities(dropout: tuple[float, float, float]) -> None:
    """Text alone, both and image alone are dropped as often as asked for, within five standard deviations."""
    count = 100_000
    small = Batch(torch.ones(count, 1, 1, 1), torch.ones(count, 2, 1, 1), torch.ones(count, 1, 1))
    uniform = draw(small, 1000, 11, 0, 0, 0).dropout
    text, image, _ = drop_conditioning(small, Null(torch.zeros(1, 1, 1)), uniform, dropout)
    no_text, no_image = text.flatten() == 0, image.flatten() == 0
    found = [(no_text & ~no_image), (no_text & no_image), (~no_text & no_image)]
    for mask, probability in zip(found, dropout, strict=True):
        spread = 5 * np.sqrt(probability * (1 - probability) / count)
        assert mask.float().mean().item() == pytest.approx(probability, abs=spread + 1e-9)


def test_two_draws_of_a_sample_differ_and_have_the_cached_mean_and_variance() -> None:
    """The target is drawn afresh from the cached posterior each time, never a frozen sample."""
    moments = torch.cat([torch.full((1, 4, 8, 8), 1.5), torch.full((1, 4, 8, 8), np.log(0.25))], dim=1).half()
    samples = Batch(torch.zeros(1, 4, 8, 8), moments, torch.zeros(1, 77, 16))
    drawn = [target_latents(moments, draw(samples, 1000, 5, step, 0, 0).posterior, SCALING) for step in range(400)]
    assert not torch.equal(drawn[0], drawn[1])
    values = torch.cat(drawn) / SCALING  # 400 * 256 numbers
    assert values.mean().item() == pytest.approx(1.5, abs=0.01)
    assert values.var().item() == pytest.approx(0.25, abs=0.01)


def test_draws_are_a_function_of_position() -> None:
    """Seed, step, micro-batch and rank each change the draws, and nothing else does."""
    samples = batch()
    reference = draw(samples, 1000, 1, 2, 3, 4)
    torch.randn(100)  # the global generator does not matter
    for first, second in zip(reference, draw(samples, 1000, 1, 2, 3, 4), strict=True):
        assert torch.equal(first, second)
    for other in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]:
        assert not torch.equal(reference.noise, draw(samples, 1000, *other).noise)
    assert not torch.equal(reference.noise, reference.posterior)


def test_timesteps_cover_the_whole_schedule_evenly() -> None:
    """Timesteps are uniform over 0 to T - 1, both ends included."""
    small = Batch(torch.ones(50_000, 1, 1, 1), torch.ones(50_000, 2, 1, 1), torch.ones(50_000, 1, 1))
    timesteps = draw(small, 10, 1, 0, 0, 0).timesteps
    assert timesteps.bincount(minlength=10).float().div(50_000).tolist() == pytest.approx([0.1] * 10, abs=0.01)


def test_noising_is_float32_even_when_the_unet_is_not(unet: UNet2DConditionModel) -> None:
    """Half precision enters in the UNet alone: its input is made in float32."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, sample: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
            seen.append(sample.dtype)
            return (sample[:, :4].bfloat16(),)

    samples = batch()
    value = objective().loss(Spy(), samples, draw(samples, 1000, 1, 0, 0, 0))
    assert seen == [torch.float32]
    assert value.dtype == torch.float32


def test_guidance_is_trained_unless_it_is_switched_off() -> None:
    """Without a word each condition is dropped with the probability of the paper; diffusers' scripts drop none."""
    assert Flags().dropout == EVEN


@pytest.mark.parametrize(("given", "bands"), [((0.1,), (0.1, 0.1, 0.1)), ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3))])
def test_one_probability_stands_for_three(given: tuple[float, ...], bands: tuple[float, float, float]) -> None:
    """`--conditioning_dropout_prob` takes one number, or one for text alone, both, image alone."""
    assert Flags(conditioning_dropout_prob=given).dropout == bands


def test_draws_have_the_shapes_that_their_comments_say() -> None:
    """Each draw has one entry per sample."""
    draws = draw(batch(3), 1000, 0, 0, 0, 0)
    assert isinstance(draws, Draws)
    assert [tuple(part.shape) for part in draws] == [(3, 4, 8, 8), (3, 4, 8, 8), (3,), (3,)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_timesteps_as_in_its_paper(unet: UNet2DConditionModel, kind: str) -> None:
    """Each sample's error is multiplied by min(SNR, 5) / SNR, for velocity by min(SNR, 5) / (SNR + 1)."""
    samples, noising = batch(), scheduler(kind)
    draws = draw(samples, 1000, 7, 0, 0, 0)._replace(timesteps=torch.tensor([1, 200, 600, 999]))
    alphas = noising.alphas_cumprod[draws.timesteps]
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / (snr + (kind == "v_prediction"))
    expected = (objective(kind).losses(unet, samples, draws) * weights).mean()
    assert weights[0] < 1
    found = objective(kind, snr_gamma=5).loss(unet, samples, draws)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def pictures(size: int, where: tuple[slice, slice], change: float = 3.0) -> Batch:
    """Samples of which each pair differs in some place, and in a little everywhere."""
    plain = batch(size)
    edited = plain.edited.clone()
    edited[:, :4] = plain.original
    edited[:, :4, *where] += change
    return plain._replace(edited=edited)


def test_the_edit_weighs_more_where_the_latents_differ() -> None:
    """In the place and one around it, `weight` to 1, with a mean of 1: the size of the loss stays."""
    weights = edit_weights(pictures(2, (slice(2, 4), slice(3, 6))), 3)
    assert weights.shape == (2, 1, 8, 8)
    assert weights.mean(dim=(2, 3)).flatten().tolist() == pytest.approx([1, 1])
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[1:5, 2:7] = True
    assert torch.equal(weights[0, 0] > 1, inside)
    assert (weights[0, 0, 3, 4] / weights[0, 0, 7, 0]).item() == pytest.approx(3)


@pytest.mark.parametrize("where", [(slice(0, 0), slice(0, 0)), (slice(None), slice(None))])
def test_pictures_that_are_equal_or_all_changed_weigh_the_same_everywhere(where: tuple[slice, slice]) -> None:
    """No place is lifted above others where none is the edit, or all are."""
    weights = edit_weights(pictures(2, where), 5)
    assert weights.flatten().tolist() == pytest.approx([1] * 128, abs=1e-6)


def test_a_picture_that_changes_everywhere_by_chance_weighs_nearly_the_same_everywhere() -> None:
    """What surrounds each place above the mean covers nearly all of the picture."""
    plain = batch(64)
    assert edit_weights(plain, 3).std().item() < 0.2


def test_the_edit_is_where_the_mask_says_whatever_the_latents_do(unet: UNet2DConditionModel) -> None:
    """Where a half of a place is edited, half of the weight is added; 1 is off to the bit, with masks or without."""
    plain = pictures(2, (slice(2, 4), slice(3, 6)))
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float16)
    mask[0, 0, 6], mask[0, 0, 7] = 1, 0.5
    masked = plain._replace(mask=mask)
    weights = edit_weights(masked, 3)
    assert (weights[0, 0] / weights[0, 0, 0, 0]).mean(dim=1).tolist() == pytest.approx([1] * 6 + [3, 2])
    assert weights.mean(dim=(2, 3)).flatten().tolist() == pytest.approx([1, 1])
    assert torch.equal(weights[1], torch.ones(1, 8, 8))
    draws = draw(plain, 1000, 7, 0, 0, 0)
    assert torch.equal(objective().loss(unet, masked, draws), objective().loss(unet, plain, draws))
    whole = plain._replace(mask=torch.ones_like(mask))
    loss = objective(edit_weight=4.0).loss(unet, whole, draws)
    assert torch.equal(loss, objective().loss(unet, plain, draws))
    assert not torch.equal(loss, objective(edit_weight=4.0).loss(unet, plain, draws))
    assert torch.equal(objective(edit_weight=4.0).losses(unet, masked, draws), objective().losses(unet, plain, draws))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_edit_weight_multiplies_squared_errors_and_1_is_off_to_the_bit(
    unet: UNet2DConditionModel, kind: str
) -> None:
    """Together with min-SNR, too; the unweighted losses, which validation shows, stay."""
    samples = pictures(4, (slice(1, 3), slice(5, 7)))
    draws = draw(samples, 1000, 7, 0, 0, 0)
    plain, weighted = objective(kind), objective(kind, edit_weight=4.0)
    assert torch.equal(plain.loss(unet, samples, draws), objective(kind, edit_weight=1.0).loss(unet, samples, draws))
    assert torch.equal(plain.losses(unet, samples, draws), weighted.losses(unet, samples, draws))
    errors = plain.errors(unet, samples, draws) * edit_weights(samples, 4)
    assert weighted.loss(unet, samples, draws).item() == pytest.approx(errors.mean().item(), rel=1e-6)
    snr = plain.scheduler.alphas_cumprod[draws.timesteps] / (1 - plain.scheduler.alphas_cumprod[draws.timesteps])
    shares = snr.clamp(max=5) / (snr + (kind == "v_prediction"))
    both = objective(kind, edit_weight=4.0, snr_gamma=5).loss(unet, samples, draws)
    assert both.item() == pytest.approx((errors.mean(dim=(1, 2, 3)) * shares).mean().item(), rel=1e-6)


def test_offset_noise_is_shared_by_a_channel_and_leaves_the_other_draws_alone() -> None:
    """An offset adds one number per sample and channel to the noise."""
    samples = batch()
    plain, offset = objective().draw(samples, 1, 2, 3, 4), objective(noise_offset=0.1).draw(samples, 1, 2, 3, 4)
    difference = offset.noise - plain.noise
    assert difference.std(dim=(2, 3)).max() < 1e-6
    assert difference.mean(dim=(2, 3)).std().item() == pytest.approx(0.1, rel=0.6)
    assert torch.equal(offset.posterior, plain.posterior)
    assert torch.equal(offset.timesteps, plain.timesteps)
