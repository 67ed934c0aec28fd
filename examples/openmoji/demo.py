"""Runs the three commands on OpenMoji, from the starter checkpoint to scores and a contact sheet: `make demo`.

Whoever repeats the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from recipe import DEMO, LONGER, edit, encode, make_pairs, score, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longer", action="store_true", help="the longer recipe: all kinds of edits")
    parser.add_argument("--output", type=Path, help="folder for everything (default build/demo or build/longer)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = LONGER if args.longer else DEMO
    output = args.output or Path("build/longer" if args.longer else "build/demo")
    data, cache, model, edits = (output / name for name in ("data", "cache", "model", "edits"))
    started = time.monotonic()
    make_pairs(recipe, data)
    encode(data, cache)
    train(recipe, cache, model, args.seed)
    edit(model, data, edits, args.seed)
    score(data, edits, output)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Everything is in {output}.")
    print(f"Look at {output / 'contact-sheet.png'}: original, edited, target.")


if __name__ == "__main__":
    main()
