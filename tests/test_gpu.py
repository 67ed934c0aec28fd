"""What can be seen on a CUDA device alone: numbers against the CPU's, steps that wait for nothing, exact resuming.

Nothing but ip2p, what it depends on and pytest is imported, so that a machine with a GPU and little else runs it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import tiny
from configs import train_config
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.train.__main__ import main, preload
from ip2p.train.data.batches import Batches
from ip2p.train.data.order import make_order
from ip2p.train.save.checkpoint import HostCopies
from ip2p.train.unet import make, norm
from ip2p.train.unet.load import check_gradients
from ip2p.train.unet.make import disagreement, takes_one_pass
from ip2p.train.unet.optimizers import optimizer_over
from ip2p.train.unet.update import LossScale, Update
from ip2p.train.unet.weights import Average, Weights
from ip2p.train.watch.metrics import Metrics
from test_train import assert_same, flags, states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # diffusers' and torch's own, which depend on the GPU at hand
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CUDA = torch.device("cuda")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _settings_of_a_new_process() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def error(found: Tensor, expected: Tensor) -> float:
    """Size of the difference over the size of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("precision", "bound"), [("no", 5e-3), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_a_cache_encoded_on_the_gpu_is_that_of_the_cpu(
    sd: Path, data: Path, tmp_path: Path, encode: Callable[..., None], monkeypatch: Any, precision: str, bound: float
) -> None:
    """Latents and text, row for row, to the precision that was asked for."""
    encode(sd, data, tmp_path / "gpu", mixed_precision=precision, encode_batch_size=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    encode(sd, data, tmp_path / "cpu")
    for kind in ("images", "text"):
        mine, theirs = (Cache.open(tmp_path / name).arrays(kind) for name in ("gpu", "cpu"))
        for name, array in mine.items():
            found, expected = (torch.from_numpy(np.asarray(one[:])) for one in (array, theirs[name]))
            assert error(found, expected) < bound, name


def test_batches_of_several_shapes_are_those_of_the_cpu(sd: Path, tmp_path: Path, encode: Callable[..., None]) -> None:
    """What is copied ahead as a whole, and then seen in its shape, holds the same numbers bit for bit."""
    data = tiny.dataset(tmp_path / "data", tiny.pairs(21, sizes=tiny.SIDES))
    encode(sd, data, tmp_path / "cache", bucket_step=4)
    cache = Cache.open(tmp_path / "cache")
    reader, samples = Reader(cache), Samples.of(cache, None)
    order = make_order(train_config(cache=(cache.folder,)), samples, seed=1)
    mine, theirs = (
        Batches(reader, samples, order.batches([0] * len(order.orders), 4), device, batch_size=4)
        for device in (CUDA, torch.device("cpu"))
    )
    shapes = set()
    for _ in range(12):
        found, expected = next(mine), next(theirs)
        shapes.add(found.edited.shape)
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(one.cpu(), other)  # type: ignore[union-attr]
    assert len(shapes) == 3
    mine.close()
    theirs.close()


@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16], ids=["no", "fp16", "bf16"])
def test_norms_in_channels_last_are_pytorchs(half: torch.dtype | None, capsys: Any) -> None:
    """The kernels are taken, and nothing is said."""
    unet: Any = tiny.unet(8)
    norm.choose_norms(unet, CUDA, half or torch.float32)
    assert isinstance(unet.conv_norm_out, norm.Norm)
    assert capsys.readouterr().out == ""
    bound = {None: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}
    assert norm.disagreement(CUDA, half or torch.float32) < bound[half]


def gradients(device: torch.device, half: torch.dtype | None, *, norms: bool = True) -> list[Tensor]:
    """Of a tiny UNet on given numbers."""
    torch.manual_seed(0)
    unet: Any = tiny.unet(8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if norms:
        norm.choose_norms(unet, device, half or torch.float32)
    sample, text, target = torch.randn(4, 8, 8, 8), torch.randn(4, 77, 16), torch.randn(4, 4, 8, 8)
    weights = Weights(unet.to(device), half)
    timesteps = torch.tensor([1, 250, 600, 999], device=device)
    prediction = unet(sample.to(device), timesteps, text.to(device), return_dict=False)[0]
    (prediction.float() - target.to(device)).square().mean().backward()
    return [weight.grad.float() for weight in weights.parameters]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("half", "bound"), [(None, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 8e-2)], ids=["no", "fp16", "bf16"]
)
def test_gradients_on_the_gpu_are_those_of_the_cpu(half: torch.dtype | None, bound: float) -> None:
    """In float32 closely, in half precision to its digits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found, expected = gradients(CUDA, half), gradients(torch.device("cpu"), None)
    both = (torch.cat([part.cpu().flatten() for part in parts]) for parts in (found, expected))
    assert error(*both) < bound


@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16], ids=["no", "fp16", "bf16"])
def test_one_pass_over_the_weights_does_what_pytorch_does(half: torch.dtype | None, capsys: Any) -> None:
    """The kernel is taken, and nothing is said."""
    assert disagreement(CUDA, half) < 1e-5
    assert takes_one_pass(CUDA, half)
    assert capsys.readouterr().out == ""


FEW_BITS = [(torch.bfloat16, "adamw"), (torch.bfloat16, "adamw8bit"), (None, "adamw8bit")]


@pytest.mark.parametrize(("half", "name"), FEW_BITS)
def test_one_pass_rounds_at_random_as_pytorchs_functions_do(half: torch.dtype | None, name: str, capsys: Any) -> None:
    """The kernel is taken for bfloat16 weights and for moments in 8 bits, and nothing is said."""
    assert disagreement(CUDA, half, name, rounded=half is not None) < 1e-5
    assert takes_one_pass(CUDA, half, name, rounded=half is not None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("half", "name"), [(None, "adamw"), *FEW_BITS])
def test_steps_inside_the_backward_pass_are_the_ordinary_ones(
    half: torch.dtype | None, name: str, one_pass: bool
) -> None:
    """Bit for bit, by the kernel and without it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = []
    for backwards in (False, True):
        torch.manual_seed(0)
        weights = Weights(on_gpu(), half, rounded=half is not None)
        optimizer = optimizer_over(weights.masters, name, lr=1e-2)
        update = Update(weights, optimizer, math.inf, fused=one_pass, backwards=backwards)
        for step in range(3):
            sums = [(weight.float() * (step + number)).sin().sum() for number, weight in enumerate(weights.parameters)]
            update.backward(torch.stack(sums).sum())
            update()
        found.append({"weights": weights.state_dict()} | update.state_dict())
    assert_same(*found)


def test_an_average_on_the_host_takes_no_second_copy_of_the_weights() -> None:
    """Tensor by tensor, and it is where it shall be."""
    weights = [torch.randn(2**20, device=CUDA, dtype=torch.bfloat16) for _ in range(64)]
    average = Average(weights, 0.9, torch.device("cpu"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    average.step(weights)
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * 2**20
    assert {mean.device.type for mean in average.tensors} == {"cpu"}


def test_an_overflow_changes_nothing_and_halves_the_scale() -> None:
    """Where a gradient of float16 is infinite."""
    weights = Weights(on_gpu(), torch.float16)
    scale = LossScale(CUDA)
    update = Update(weights, torch.optim.AdamW(weights.masters, fused=True), 1.0, scale=scale, fused=True)
    before = [weight.clone() for weight in weights.masters]
    for weight in weights.parameters:
        weight.grad = torch.full_like(weight, torch.inf)
    assert update()[1] == 1
    assert scale.value == 2.0**15
    assert all(torch.equal(one, other) for one, other in zip(before, weights.masters, strict=True))


def on_gpu() -> Any:
    """A tiny UNet there."""
    unet: Any = tiny.unet(8)
    return unet.to(CUDA)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_learns_in_every_precision(sd: Path, cache: Path, tmp_path: Path, precision: str) -> None:
    """The loss over the same noise falls, also where a scale that is far too high makes the first steps overflow."""
    seen: list[float] = []

    class High(LossScale):
        def __init__(self, device: torch.device):
            super().__init__(device)
            self.value.fill_(2.0**34)

    changed = {"max_train_steps": 120, "learning_rate": 2e-3, "lr_scheduler": "constant", "mixed_precision": precision}
    changed |= {"num_validation_samples": 3, "validation_steps": 60, "train_batch_size": 4, "logging_steps": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "LossScale", High)
        patch.setattr("ip2p.train.watch.validate.Validation.draw", lambda *_: None)
        main(flags(sd, cache, tmp_path, **changed))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert seen[-1] < seen[0]
    skipped = [line["skipped_steps"] for line in lines if "skipped_steps" in line][-1]
    assert (skipped > 5) == (precision == "fp16")


BACKWARDS = {"fused_backward": True, "max_grad_norm": "inf"}


@pytest.mark.parametrize(
    "given",
    [
        *({"mixed_precision": precision} for precision in ("no", "fp16", "bf16")),
        {"weights": "bf16"},
        {"weights": "bf16", "use_8bit_adam": True, "ema_device": "cpu"},
        {"weights": "bf16"} | BACKWARDS,
        {"use_8bit_adam": True, "mixed_precision": "bf16"} | BACKWARDS,
        {"optimizer": "adafactor", "weights": "bf16"},
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(sd: Path, cache: Path, tmp_path: Path, given: dict) -> None:
    """With --deterministic, bit for bit: weights, average, moments, schedule and scale."""
    changed = given | {"deterministic": True, "max_train_steps": 8, "checkpointing_steps": 4}
    changed |= {"checkpoints_total_limit": 0}
    main(flags(sd, cache, tmp_path / "straight", **changed))
    (tmp_path / "resumed").mkdir()
    (tmp_path / "straight" / "checkpoint-4").rename(tmp_path / "resumed" / "checkpoint-4")
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, tmp_path / "resumed", resume_from_checkpoint="latest", **changed))
    assert_same(states(tmp_path / "resumed" / "checkpoint-8"), states(tmp_path / "straight" / "checkpoint-8"))


@pytest.mark.parametrize(
    "given",
    [
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "use_8bit_adam": True},
        {"weights": "bf16"},
        {"weights": "bf16", "use_8bit_adam": True} | BACKWARDS,
        {"weights": "bf16", "optimizer": "adafactor"},
    ],
)
def test_no_step_waits_for_the_gpu(sd: Path, cache: Path, tmp_path: Path, given: dict) -> None:
    """From the second step on, until something is reported, PyTorch sees nothing that would synchronize."""
    steps: list[int] = []

    def step(self: Metrics, number: int, *rest: Any, original: Callable[..., None] = Metrics.step) -> None:
        original(self, number, *rest)
        steps.append(number)
        torch.cuda.set_sync_debug_mode("error" if 2 <= number <= 10 else "default")

    changed = given | {"max_train_steps": 12, "checkpointing_steps": 12, "logging_steps": 12}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "step", step)
        main(flags(sd, cache, tmp_path, **changed))
    assert steps == list(range(1, 13))


def test_copies_for_a_checkpoint_are_exact_and_pinned() -> None:
    """Whatever the order of their numbers, and while the GPU goes on."""
    weight = torch.randn(64, 32, 3, 3, device=CUDA).to(memory_format=torch.channels_last)
    copies = HostCopies()
    taken = copies.take({"weight": weight, "step": torch.tensor(3.0, device=CUDA)})
    expected = weight.cpu()
    weight.zero_()
    torch.cuda.synchronize()
    assert torch.equal(taken["weight"], expected)
    assert taken["step"] == 3
    assert copies._pinned


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_compiled_unet_passes_its_check(precision: str) -> None:
    """By inductor, as `--compile` does it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    unet: Any = tiny.unet(8)
    unet.to(CUDA).compile()
    Weights(unet, HALVES[precision])
    sample, text = torch.randn(4, 8, 8, 8, device=CUDA), torch.randn(4, 77, 16, device=CUDA)
    timesteps = torch.tensor([1, 250, 600, 999], device=CUDA)
    check_gradients(unet, lambda: unet(sample, timesteps, text).sample.square().mean(), precision)


def test_xformers_attends_as_pytorch_does() -> None:
    """With the library that its wheel lacks; what it cannot do here is another test's matter."""
    preload()
    pytest.importorskip("xformers.ops")
    torch.manual_seed(0)
    unet: Any = tiny.unet(8)
    unet.to(CUDA, torch.float16)
    sample, text = torch.randn(2, 8, 8, 8, device=CUDA).half(), torch.randn(2, 77, 16, device=CUDA).half()
    timesteps = torch.tensor([10, 900], device=CUDA)
    expected = unet(sample, timesteps, text).sample
    unet.enable_xformers_memory_efficient_attention()
    assert error(unet(sample, timesteps, text).sample, expected) < 1e-2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 6), ("float16", 6), ("bfloat16", 24)])
def test_edits_on_the_gpu_are_those_of_the_cpu(family: str, dtype: str, most: int, tmp_path: Path) -> None:
    """To some levels of 255, with the same noise, guided in some steps; outside a mask, each byte is the picture's."""
    from ip2p.infer import Editor

    folder, picture = tiny.pipeline(tmp_path / family), tiny.picture(1, (16, 16))
    right = np.arange(16)[None].repeat(16, axis=0) >= 8
    found = []
    for device, kind in (("cuda", dtype), ("cpu", "float32")):
        editor = Editor(folder, device=device, dtype=kind)
        editor.pipeline.set_progress_bar_config(disable=True)
        mask = right.astype(np.float32)
        how: dict[str, Any] = {"num_inference_steps": 4, "guidance_interval": (0.0, 0.5), "masks": [None, mask]}
        edits = editor.edit([picture, picture], "make it red", **how)
        found.append(np.stack([np.asarray(edit, np.int16) for edit in edits]))
    assert abs(found[0] - found[1]).max() <= most
    assert np.array_equal(found[0][1][:, :8], np.asarray(picture)[:, :8])
