"""What several GPUs can be expected to reach: on paper, from the speed of one and the size of the gradients.

Each optimizer step sums float32 gradients over all GPUs: inside a machine over the links between its GPUs, then between
machines, each of which passes them on once. This goes on during the backward pass, two thirds of a batch's time, and
what does not fit there is waited for. The last bucket (25 MB) has no backward pass beside it. Left out: that the
kernels which communicate take some of the GPU from those which compute, and that GPUs wait for the slowest.

The bandwidths are assumed: what an all-reduce of NCCL reaches among eight H100 with NVLink, and between machines with
eight adapters of 400 Gb/s, or with one of 100 Gb/s. The speed of one GPU is the bar at 256 px until one is measured.
"""

import argparse

from arithmetic import gradient_bytes
from common import Row, parser, report
from shapes import SIZES

BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--size", choices=SIZES, default="sd15")
    flags.add_argument(
        "--samples_per_second", type=float, default=640, help="of one GPU; the default is the bar at 256 px"
    )
    flags.add_argument("--batch_size", type=int, default=64, help="of one GPU")
    flags.add_argument("--gradient_accumulation_steps", type=int, nargs="+", default=[1, 4, 16])
    flags.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    flags.add_argument("--per_machine", type=int, default=8)
    flags.add_argument("--inside", type=float, default=370, help="GB/s of an all-reduce inside a machine")
    flags.add_argument("--between", type=float, nargs="+", default=[320, 11], help="GB/s of a machine to the others")
    args = flags.parse_args()
    rows = [Row("one GPU", args.samples_per_second, "samples/s")]
    for gpus in args.gpus:
        for between in args.between if gpus > args.per_machine else args.between[:1]:
            name = f"{gpus} GPUs" + (f", {between:g} GB/s between machines" if gpus > args.per_machine else "")
            summing = seconds(args, gpus, between)
            rows.append(Row(f"{name}: summing the gradients", 1000 * summing, "ms"))
            for accumulation in args.gradient_accumulation_steps:
                share = efficiency(args, summing, accumulation)
                rows.append(Row(f"{name}: speed, accumulation {accumulation}", share * gpus, "GPUs"))
    report("scaling", args, rows)


def efficiency(args: argparse.Namespace, summing: float, accumulation: int) -> float:
    """Share of the time of an optimizer step that is spent computing."""
    batch = args.batch_size / args.samples_per_second
    last = summing * BUCKET / gradient_bytes(SIZES[args.size])
    waiting = last + max(0, summing - last - batch * 2 / 3)
    return accumulation * batch / (accumulation * batch + waiting)


def seconds(args: argparse.Namespace, gpus: int, between: float) -> float:
    """Seconds that summing all gradients takes by rings: each part goes around once to be summed and once to all."""
    inside, machines = min(gpus, args.per_machine), -(-gpus // args.per_machine)
    rounds = 2 * (inside - 1) / inside / args.inside + 2 * (machines - 1) / machines / between
    return rounds * gradient_bytes(SIZES[args.size]) / 1e9


if __name__ == "__main__":
    main()
