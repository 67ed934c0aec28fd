"""Whether training from the cache learns what training by encoding on the fly learns, within the spread of seeds.

Both start from one checkpoint and see the same pairs with the same settings, once for each seed. What they have learned
is one number for each model: its loss on held-out pairs that are encoded anew, with noise and timesteps that are the
same for all. The online training is written here after diffusers' train_instruct_pix2pix.py and takes nothing of ip2p,
so that no mistake is in both.

The means must not differ by more than the larger of the two ranges over the seeds. With three seeds, that refuses one
in twenty comparisons of equals, and lets one in fifteen pass where the difference is four times what seeds scatter by:
hence eight.

Caches are encoded in float32, float16 and bfloat16. Beside that stands how far each is from the VAE's own float32: the
root mean square of the error of the posterior's mean, in standard deviations of the posterior.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, Row, parser, report
from datasets import Dataset, load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from ip2p.encode.__main__ import main as encode
from ip2p.encode.cache.format import Cache
from ip2p.train.__main__ import main as train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "openmoji"))
import dataset as emoji
from tiny import arguments

DROPOUT = 0.05  # of each kind
SCHEDULE = "cosine"
PRECISIONS = {"no": "", "fp16": ", fp16", "bf16": ", bf16"}  # of the encoding, and what is added to the names of rows


class Encoded(NamedTuple):
    """A batch as the UNet sees it, in float32."""

    latents: Tensor  # (B, 4, h, w), of the edited images, scaled
    image: Tensor  # (B, 4, h, w), of the originals, unscaled
    text: Tensor  # (B, 77, d)


class Online:
    """A frozen Stable Diffusion that encodes pairs whenever they are needed, and trains UNets on them.

    Args:
        model: folder of the checkpoint.
        resolution: side of the square images.
        scaling_factor: of the latents, if not the VAE's own.
    """

    def __init__(self, model: Path, resolution: int, scaling_factor: float | None = None):
        self.model, self.resolution = model, resolution
        parts: dict[str, Any] = {"unet": None, "safety_checker": None, "dtype": torch.float32}
        frozen = StableDiffusionPipeline.from_pretrained(model, **parts).to(DEVICE)
        self.vae, self.tokenizer, self.text_encoder = frozen.vae, frozen.tokenizer, frozen.text_encoder
        self.pictures = VaeImageProcessor(resample="bicubic", do_convert_rgb=True)
        self.scheduler: Any = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.scaling_factor = scaling_factor or self.vae.config.scaling_factor

    def unet(self) -> UNet2DConditionModel:
        """The checkpoint's UNet with four input channels more, which it ignores so far."""
        unet: Any = UNet2DConditionModel.from_pretrained(self.model, subfolder="unet", dtype=torch.float32)
        narrow = unet.conv_in
        wide = torch.nn.Conv2d(8, narrow.out_channels, narrow.kernel_size, narrow.stride, narrow.padding)
        torch.nn.init.zeros_(wide.weight)
        wide.weight.data[:, :4] = narrow.weight
        wide.bias = narrow.bias
        unet.conv_in = wide
        return unet.to(DEVICE)

    @torch.no_grad()
    def encode(self, rows: dict[str, list[Any]], generator: torch.Generator) -> Encoded:
        """Encode rows of a dataset; the latents are drawn from their posterior."""
        original, edited = (
            self.pictures.preprocess(rows[name], self.resolution, self.resolution).to(DEVICE)
            for name in ("input_image", "edited_image")
        )
        latents = self.vae.encode(edited).latent_dist.sample(generator) * self.scaling_factor
        return Encoded(latents, self.vae.encode(original).latent_dist.mode(), self.embed(rows["edit_prompt"]))

    def embed(self, prompts: list[str]) -> Tensor:
        """Text (B, 77, d)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(DEVICE))[0]

    def losses(self, unet: UNet2DConditionModel, batch: Encoded, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error for each sample, (B,)."""
        noisy = self.scheduler.add_noise(batch.latents, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(batch.latents, noise, timesteps)
        prediction = unet(torch.cat([noisy, batch.image], dim=1), timesteps, batch.text).sample
        return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))

    def train(self, pairs: Dataset, args: argparse.Namespace, seed: int) -> UNet2DConditionModel:
        """Train a UNet on pairs, each encoded anew whenever its turn comes."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "device": DEVICE}
        unet = self.unet().train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-2)
        schedule = get_scheduler(SCHEDULE, optimizer, num_warmup_steps=0, num_training_steps=args.steps)
        order = (row for _ in itertools.count() for row in torch.randperm(len(pairs), **draw).tolist())
        for _ in tqdm(range(args.steps), desc=f"online, seed {seed}"):
            batch = self.encode(pairs[list(itertools.islice(order, args.batch_size))], generator)
            noise, uniform = torch.randn(batch.latents.shape, **draw), torch.rand(args.batch_size, **draw)
            timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (args.batch_size,), **draw)
            loss = self.losses(unet, self.drop(batch, uniform), noise, timesteps).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return unet

    @torch.no_grad()
    def drop(self, batch: Encoded, uniform: Tensor) -> Encoded:
        """Drop the text alone, both conditions or the image alone, by the band in which a number of each sample is."""
        no_text = uniform < 2 * DROPOUT
        no_image = (uniform >= DROPOUT) & (uniform < 3 * DROPOUT)
        text = torch.where(no_text.reshape(-1, 1, 1), self.embed([""]), batch.text)
        return Encoded(batch.latents, batch.image * ~no_image.reshape(-1, 1, 1, 1), text)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=8, help="seeds of each training (here: 8); 0 trains nothing")
    flags.add_argument("--model", type=Path, help="checkpoint (default: the starter of examples/openmoji)")
    flags.add_argument("--data", type=Path, help="folder with the splits train and test (default: pairs of OpenMoji)")
    flags.add_argument("--resolution", type=int, default=64)
    flags.add_argument("--pairs", type=int, default=1024, help="to train on (default: 1024)")
    flags.add_argument("--held_out", type=int, default=256, help="pairs to measure with (default: 256)")
    flags.add_argument("--steps", type=int, default=150)
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument("--learning_rate", type=float, default=1e-3)
    flags.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of the encoding")
    flags.add_argument("--scaling_factor", type=float, help="a wrong one for the online training, to see it refused")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report("equality", args, compare(args, Path(name)))


def compare(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Train both ways, measure what they have learned, and hold the difference against the spread."""
    data, model = args.data, args.model or Path(emoji.__file__).parent / "starter"
    if not data:
        emoji.build(data := folder / "data", args.resolution)
    training, test = (load_dataset(str(data), split=name, cache_dir=str(folder)) for name in ("train", "test"))
    online, right = Online(model, args.resolution, args.scaling_factor), Online(model, args.resolution)
    measure = held_out_loss(right, test.select(range(args.held_out)), args.batch_size)
    pairs = training.select(range(args.pairs))
    losses: dict[str, list[float]] = {}
    rows = [Row("loss on held-out pairs before training", measure(right.unet()), "")]
    for precision in args.precisions:
        name, cache = PRECISIONS[precision], folder / precision
        cached = cached_training(args, model, data, cache, precision)
        off = error_of_means(right, pairs, Cache.open(cache), args.batch_size)
        rows.append(Row(f"error of the posterior's mean{name}", off, "of its std"))
        losses[f"from the cache{name}"] = [measure(cached(seed)) for seed in range(args.rounds)]
    if not args.rounds:
        return rows
    losses["online"] = [measure(online.train(pairs, args, seed)) for seed in range(args.rounds)]
    for way, values in losses.items():
        figures = {"mean": statistics.mean, "standard deviation": statistics.stdev, "lowest": min, "highest": max}
        rows += [Row(f"{way}, {name}", figure(values), "") for name, figure in figures.items()]
    for name in map(PRECISIONS.get, args.precisions):
        ways = losses[f"from the cache{name}"], losses["online"]
        first, second = map(statistics.mean, ways)
        spread = max(max(values) - min(values) for values in ways)
        rows.append(Row(f"difference of the means{name}", abs(first - second), "", at_most=spread))
    return rows


@torch.no_grad()
def error_of_means(online: Online, pairs: Dataset, cache: Cache, batch_size: int) -> float:
    """How far the means in a cache are from the VAE's own in float32: root mean square, in posterior deviations."""
    table = cache.samples("position", "row")
    rows = table["row"].to_numpy()[np.argsort(table["position"].to_numpy())]
    edited: Any = cache.arrays("images")["edited"]
    cached = torch.from_numpy(edited[:, 0][rows]).float()  # (N, 8, h, w)
    errors = []
    for kept, batch in zip(cached.split(batch_size), pairs.iter(batch_size), strict=True):
        pixels = online.pictures.preprocess(batch["edited_image"], online.resolution, online.resolution)  # type: ignore[call-overload]
        posterior = online.vae.encode(pixels.to(DEVICE)).latent_dist
        errors.append((kept.chunk(2, dim=1)[0].to(DEVICE) - posterior.mean) / posterior.std)
    return torch.cat(errors).square().mean().sqrt().item()


def held_out_loss(online: Online, pairs: Dataset, batch_size: int) -> Callable[[UNet2DConditionModel], float]:
    """What measures a UNet: its mean loss over pairs encoded now, each with fixed noise and a timestep of its own."""
    generator = torch.Generator(DEVICE).manual_seed(2**31)
    steps = torch.arange(len(pairs), device=DEVICE) * online.scheduler.config.num_train_timesteps // len(pairs)
    batches = []
    for timesteps, rows in zip(steps.split(batch_size), pairs.iter(batch_size), strict=True):
        batch = online.encode(rows, generator)  # type: ignore[arg-type]
        noise = torch.randn(batch.latents.shape, generator=generator, device=DEVICE)
        batches.append((batch, noise, timesteps))

    @torch.no_grad()
    def measure(unet: UNet2DConditionModel) -> float:
        return torch.cat([online.losses(unet.eval(), *batch) for batch in batches]).mean().item()

    return measure


def cached_training(
    args: argparse.Namespace, model: Path, data: Path, cache: Path, precision: str
) -> Callable[[int], UNet2DConditionModel]:
    """Run `ip2p-encode`; returns what runs `ip2p-train` with a seed and loads the UNet that it leaves."""
    base = {"pretrained_model_name_or_path": model, "cache": cache}
    source = {"dataset_name": data, "max_train_samples": args.pairs, "cache_dir": cache.parent}
    how = {"resolution": args.resolution, "dataloader_num_workers": 0, "mixed_precision": precision}
    encode(arguments(base | source | how))
    settings = {
        "train_batch_size": args.batch_size,
        "max_train_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler": SCHEDULE,
        "lr_warmup_steps": 0,
        "conditioning_dropout_prob": DROPOUT,
        "mixed_precision": "no",
        "report_to": "none",
    }

    def run(seed: int) -> UNet2DConditionModel:
        train(
            arguments(base | settings | {"output_dir": (out := cache.with_name(f"{cache.name}-{seed}")), "seed": seed})
        )
        return UNet2DConditionModel.from_pretrained(out, subfolder="unet").to(DEVICE)  # type: ignore[arg-type]

    return run


if __name__ == "__main__":
    main()
