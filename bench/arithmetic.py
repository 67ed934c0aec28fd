"""The arithmetic of a training sample, and so what a cache can save: counted from the shapes, nothing is computed.

A training step of the UNet is its forward pass times three. Online, the VAE encodes two images and the text encoders
one instruction besides; the empty one, of which a batch needs one, is left out.
"""

from collections.abc import Callable

import torch
from common import Row, parser, report
from shapes import SIZES, Shape, make_text_encoders, make_unet, make_vae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ip2p.train.watch.metrics import training_flops

CASES = [("small", 256), ("sd15", 256), ("sd15", 512), ("sdxl", 512), ("sdxl", 1024)]


def main() -> None:
    args = parser(__doc__).parse_args()
    rows = []
    for size, resolution in CASES:
        step, encoders = training(SIZES[size], resolution), encoding(SIZES[size], resolution)
        name = f"{size} at {resolution} px"
        rows += [
            Row(f"{name}, UNet", step, "TFLOP/sample"),
            Row(f"{name}, frozen encoders", encoders, "TFLOP/sample"),
            Row(f"{name}, online / cached", 1 + encoders / step, "times"),
        ]
    rows += [Row(f"{size}, gradients", gradient_bytes(SIZES[size]) / 1e9, "GB") for size in SIZES]
    report("arithmetic", args, rows)


def training(shape: Shape, resolution: int) -> float:
    """TFLOP of the UNet, forward and backward, for one sample."""
    rows = shape.rows(resolution)
    with torch.device("meta"):
        config = make_unet(shape).config
    return training_flops(config, (8, *rows["images"]["original"][1:]), rows["text"]["text"], shape.pooled)


def encoding(shape: Shape, resolution: int) -> float:
    """TFLOP of the VAE's encoder and the text encoders for one pair with its instruction."""
    with torch.device("meta"):
        vae, encoders = make_vae(shape), make_text_encoders(shape)
        images, tokens = torch.empty(2, 3, resolution, resolution), torch.empty(1, 77, dtype=torch.long)
    return count(lambda: vae.encode(images)) + sum(
        count(lambda encoder=encoder: encoder(tokens)) for encoder in encoders
    )


def gradient_bytes(shape: Shape) -> int:
    """Bytes of the UNet's gradients, float32."""
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in make_unet(shape).parameters())


def count(forward: Callable[[], object]) -> float:
    """TFLOP of a forward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward()
    return counter.get_total_flops() / 1e12


if __name__ == "__main__":
    main()
