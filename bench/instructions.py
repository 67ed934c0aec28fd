"""Samples per second of training with cached text, and with instructions that are embedded batch by batch, in turns."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import runs
from common import DEVICE, GPU, Row, parser, ratios, report, take_turns
from shapes import SIZES
from step import model_flags
from training import Training, from_cache, rate

from ip2p.encode.cache.format import Cache
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.train.data.text import Texts


def main() -> None:
    flags = parser(__doc__, rounds=5)
    model_flags(flags)
    flags.add_argument("--steps", type=int, default=100 if GPU else 4, help="in each turn")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = Checkpoint(runs.model(folder, args.size))
        cache = Cache.open(runs.cache(folder, args.size, args.resolution, 16 * args.batch_size))
        training, texts = Training(SIZES[args.size], folder, args.precision), Texts([cache], checkpoint, DEVICE)

        def case(which: Texts | None) -> Callable[[], float]:
            def turn() -> float:
                with from_cache(training.unet, cache, args.batch_size, training.precision.dtype, which) as (_, loss):
                    rate(training.step, loss, 1, args.batch_size)
                    return rate(training.step, loss, args.steps, args.batch_size)

            return turn

        rates = take_turns(args.rounds, {"cached": case(None), "embedded": case(texts)})
        encoders = sum(weight.nbytes for encoder in texts.encoders.encoders for weight in encoder.parameters())
    rows = [
        Row.of("cached text", rates["cached"], "samples/s"),
        Row.of("instructions embedded in training", rates["embedded"], "samples/s"),
        Row.of("embedded / cached", ratios(rates, "embedded", "cached"), "times"),
        Row("weights of the text encoder", encoders / 2**20, "MiB"),
    ]
    report("instructions", args, rows)


if __name__ == "__main__":
    main()
