"""Pairs per second of `ip2p-encode`, and the share of its time that the VAE and the text encoder take.

The command's own code runs in this process, from files to committed shards, with a clock around the encoders; imports,
loading and planning are not counted. `encoders alone` get the same number of pairs as tensors that are in memory.
"""

import math
import tempfile
from pathlib import Path
from statistics import median

from common import DTYPES, GPU, Row, parser, ratios, report
from encoding import decode_rate, measure
from pictures import write_pairs
from shapes import SIZES, save

from ip2p.encode.base.flags import build
from ip2p.encode.config import EncodeConfig
from ip2p.encode.planning.plan import workers
from tiny import unet


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--size", choices=SIZES, default="small", help="sd15, sdxl: the real shapes, random weights")
    flags.add_argument("--resolution", type=int, default=256)
    flags.add_argument("--batch_size", type=int, default=16, help="pairs in a batch (default: 16, as the command's)")
    flags.add_argument("--precision", choices=DTYPES, default="no", help="in which the encoders run")
    flags.add_argument("--pairs", type=int, default=8192 if GPU else 64, help="in the dataset")
    flags.add_argument("--pixels", type=int, default=512, help="side of the JPEG files (default: 512)")
    flags.add_argument("--workers", type=int, help="that decode; default: as many as the command picks")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SIZES[args.size], folder / "model", unet())
        write_pairs(folder / "data", 0, args.pairs, args.pixels)
        config = build(
            EncodeConfig,
            {
                "pretrained_model_name_or_path": str(folder / "model"),
                "cache": folder / "cache",
                "dataset_name": str(folder / "data"),
                "cache_dir": folder / "downloads",
                "resolution": args.resolution,
                "mixed_precision": args.precision,
                "encode_batch_size": args.batch_size,
                "dataloader_num_workers": args.workers,
            },
        )
        rates, shares = measure(config, args.pairs, args.rounds)
        decoding = decode_rate(config, min(args.pairs, 64))
    alone = median(rates["alone"])
    rows = [
        Row.of("ip2p-encode", rates["pipeline"], "pairs/s"),
        Row("the encoders alone", alone, "pairs/s"),
        Row.of("ip2p-encode / the encoders alone", ratios(rates, "pipeline", "alone"), "times"),
        Row.of("share of wall time in the encoders", shares, "of 1", at_least=None if args.workers else 0.9),
        Row("decoding, one process", decoding, "pairs/s"),
        Row("processes that decode", workers(config), ""),
        Row("processes that the encoders need", math.ceil(alone / decoding), ""),
    ]
    report("encode", args, rows)


if __name__ == "__main__":
    main()
