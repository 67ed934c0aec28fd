"""Tests of train/unet/weights.py: the average is diffusers', in one pass, and stays where it lies."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel

from ip2p.train.unet.weights import Average


@pytest.mark.parametrize("decay", [0.9999, 0.6, 0.3, 0.0, 1.0])
def test_it_is_that_of_diffusers(decay: float) -> None:
    """With the warm-up, to rounding: while the decay is below a half, `lerp` counts from the other end."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((40, 30), (7,))]
    average, reference = Average(weights, decay), EMAModel(weights, decay=decay, foreach=True)
    for _ in range(60):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator))
        average.step(weights)
        reference.step(weights)
        for mine, theirs in zip(average.tensors, reference.shadow_params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert average.state_dict()["optimization_step"] == reference.state_dict()["optimization_step"]


def test_above_a_half_one_pass_gives_the_same_bits() -> None:
    """`lerp` by a small share and diffusers' two subtractions round alike."""
    generator = torch.Generator().manual_seed(0)
    mean, weight = torch.randn(2, 10_000, generator=generator)
    reference = EMAModel([torch.nn.Parameter(mean)], decay=0.999, foreach=True)
    average = Average([mean], 0.999)
    average.updates = reference.optimization_step = 10**6
    average.step([weight])
    reference.step([torch.nn.Parameter(weight)])
    assert torch.equal(average.tensors[0], reference.shadow_params[0])
    assert not torch.equal(average.tensors[0], mean)


def test_it_goes_on_from_a_checkpoint_and_from_one_of_diffusers() -> None:
    """Tensors and the number of updates come back, without the caller's tensors being taken."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    reference = EMAModel(weights, decay=0.9)
    reference.step([torch.nn.Parameter(torch.full((3,), 5.0))])
    saved = copy.deepcopy(reference.state_dict())
    average = Average(weights, 0.9)
    average.load_state_dict(saved)
    assert average.updates == 1
    average.step(weights)
    assert torch.equal(saved["shadow_params"][0], torch.full((3,), 5.0))
    reference.step(weights)
    torch.testing.assert_close(average.tensors, reference.shadow_params)


def test_it_stays_on_its_device_through_a_checkpoint() -> None:
    """A checkpoint is read into the CPU's memory; an average that followed it there could not be moved on."""
    average = Average([torch.ones(3)], 0.9, torch.device("meta"))
    average.load_state_dict({"optimization_step": 4, "shadow_params": [torch.zeros(3)]})
    assert {tensor.device.type for tensor in average.tensors} == {"meta"}
    average.step([torch.ones(3)])  # weights elsewhere than the average are fetched


def test_while_it_warms_up_its_length_is_a_share_of_the_training() -> None:
    """0.09, as docs/performance.md says: by the moments of the times that it counts."""
    average, updates = Average([torch.zeros(2)], 0.9999), 2000
    for update in range(1, updates + 1):
        time = update / updates
        average.step([torch.tensor([time, time**2])])
    mean, square = average.tensors[0].double().tolist()
    assert (square - mean**2) ** 0.5 == pytest.approx(0.0905, rel=0.01)
