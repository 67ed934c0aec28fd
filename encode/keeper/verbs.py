"""The verbs of `ip2p-cache`: each prints what it finds, and returns the exit status."""

from collections.abc import Callable
from contextlib import nullcontext
from json import dumps
from pathlib import Path

from ..base.console import amount
from ..base.errors import SettingsError
from ..base.files import check_file
from ..base.flags import Count, Whole, idle
from .origin import ALL_RECORDED, RECORDED, FullOrigin, Origin, recorded_config

# The rest is imported by the verb that needs it: `info` shall not wait for torch, nor `push` for diffusers.


def info(cache: Path, /, *, keep: str | None = None, quarantined: bool = False, json: bool = False) -> int:
    """Show what a cache holds: samples, shapes, sizes on disk, kept columns, model, dataset, encoding.

    Args:
        keep: Count the samples that `ip2p-train --keep` would train on, and show the spread of columns among them.
        quarantined: List the samples that stand aside, with their reasons.
        json: Print JSON.
    """
    from ..cache.format import Cache
    from .info import PARTS, describe

    opened = Cache.open(cache)
    opened.check_files()
    found = describe(opened, keep, quarantined=quarantined)
    if json:
        print(dumps(found, indent=1))
        return 0
    status = found["samples"]
    samples = ", ".join(f"{count:,} {name}" for name, count in status.items())
    print(f"{cache}: {samples}; views: {', '.join(opened.views)}; {amount(found['bytes'])}")
    for name, array in found["arrays"].items():
        print(f"  {name:<9} {' x '.join(map(str, array['shape'])):<28} {amount(array['bytes'])}")
    print("  shapes   ", ", ".join(f"{shape} px: {count:,}" for shape, count in found["shapes"].items()))
    if found["columns"]:
        print("  columns  ", ", ".join(f"{name} ({kind})" for name, kind in found["columns"].items()))
    if keep is not None:
        print(f"  --keep    {found['kept']:,} of {status.get('ok', 0):,} samples: {keep}")
    for name, spread in found["spread"].items():
        numbers = " ".join(f"{number:.4g}" for number in spread["quartiles"]) or "nothing"
        missing = f"; {spread['missing']:,} samples have none" if spread["missing"] else ""
        print(f"  {name}: {numbers} (smallest, quartiles, largest{missing})")
    for part in filter(found.get, PARTS):
        print(part)
        for field, value in found[part].items():
            if value is not None:
                print(f"  {field:<16} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for sample in found.get("quarantined", []):
        print("{key}  position {position}: {reason} (instruction {instruction!r})".format_map(sample))
    return 0


def verify(
    cache: Path, /, *, repair: bool = False, reencode: Whole = 0, json: bool = False, origin: FullOrigin = ALL_RECORDED
) -> int:
    """Check every file of a cache against its checksum, the numbers, and the samples against the shards.

    Args:
        repair: Delete torn shards and damaged tables, so that the same ip2p-encode makes them again.
        reencode: If all is well, encode this many random samples afresh and compare them with the cache.
        json: Print JSON.
    """
    from ..cache.format import Cache
    from ..cache.writer import exclusive
    from . import verify as checks

    for sentence in () if reencode else idle(origin, "belongs to --reencode: add that, or leave it out"):
        raise SettingsError(sentence)
    if not cache.is_dir():
        Cache.open(cache)  # says that there is none
    with exclusive(cache) if repair else nullcontext():
        findings = checks.verify(cache)
        dropped = checks.repair(cache, findings) if repair else []
    deviations = {}
    if reencode and not findings:
        from .reencode import reencode as compare

        opened = Cache.open(cache)
        deviations = compare(opened, recorded_config(opened.manifest, origin), reencode)
    lines = [f"{cache / finding.path}: {finding.problem}" for finding in findings]
    lines += [f"{cache}: {name} differs from a fresh encoding" for name, found in deviations.items() if found.is_wrong]
    if json:
        wrong = [{"path": finding.path, "problem": finding.problem} for finding in findings]
        reencoded = {name: found._asdict() for name, found in deviations.items()}
        print(dumps({"wrong": wrong, "dropped": dropped, "reencoded": reencoded}, indent=1))
        return int(bool(lines))
    for name, found in deviations.items():
        distance = f"at most {found.absolute:.2g} from a fresh encoding, relative {found.relative:.2g}"
        print(f"{name}: {distance} (tolerated {found.tolerated:.2g})")
    print("\n".join([*lines, *(f"dropped {name}" for name in dropped)] or [f"{cache} is sound"]))
    if findings:
        drops = f"`ip2p-cache verify {cache} --repair` drops what is torn"
        mend = f": {'run the same ip2p-encode again' if repair else drops}"
        print(f"{len(findings):,} findings{'' if findings[0].by_hand else mend}")  # those of strays stand last
    return int(bool(lines))


def preview(
    cache: Path,
    /,
    *,
    output: Path = Path("preview.png"),
    samples: Count = 8,
    keep: str | None = None,
    origin: Origin = RECORDED,
) -> int:
    """Decode samples to a contact sheet: original and edited with the instruction, in every view.

    Args:
        output: The picture to write.
        samples: How many samples, spread evenly over the dataset.
        keep: Only samples that `ip2p-train --keep` would train on.
    """
    from PIL import Image

    from ..cache.format import Cache
    from .preview import preview as draw

    if output.suffix.lower() not in Image.registered_extensions():
        raise SettingsError(f"--output {output}: expected the ending of a picture, such as .png")
    check_file(output, "--output")
    opened = Cache.open(cache)
    opened.check_files()
    sheet = draw(opened, recorded_config(opened.manifest, origin), samples, keep)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--output {output} cannot be written: {error}") from None
    print(f"{output}: {sheet.width} x {sheet.height} pixels")
    return 0


def diff(a: Path, b: Path, /, *, json: bool = False) -> int:
    """Show field by field how two caches differ, and how many samples they share.

    Args:
        json: Print JSON.
    """
    from ..cache.format import Cache

    fields, keys = [], []
    for cache in map(Cache.open, (a, b)):
        cache.check_files()
        parts = {part: cache.manifest[part] for part in ("model", "identity", "encoding", "dataset", "counts")}
        flat = {f"{part}.{field}": value for part, values in parts.items() for field, value in values.items()}
        fields.append(flat | {"views": cache.views, "masks": cache.manifest.get("masks", False)})
        keys.append(set(cache.samples()["key"].to_pylist()))
    values = {field: [side.get(field) for side in fields] for field in fields[0] | fields[1]}
    different = {field: both for field, both in values.items() if both[0] != both[1]}
    shared, left, right = (len(some) for some in (keys[0] & keys[1], keys[0] - keys[1], keys[1] - keys[0]))
    if json:
        samples = {"shared": shared, "only in a": left, "only in b": right}
        print(dumps({"fields": different, "samples": samples}, indent=1))
    else:
        for field, both in different.items():
            print(f"{field}\n  {a}: {both[0]}\n  {b}: {both[1]}")
        print(f"samples: {shared:,} in both, {left:,} only in {a}, {right:,} only in {b}")
    return int(bool(different or left or right))


def push(cache: str, url: str, /) -> int:
    """Copy a cache to any place that fsspec knows, with checksums; what is there already is skipped."""
    from .transfer import Place, copy

    print(f"{url}: {copy(Place(cache), Place(url))}")
    return 0


def pull(url: str, cache: Path, /) -> int:
    """Copy a cache from any place that fsspec knows, with checksums; what is there already is skipped."""
    from ..cache.writer import exclusive
    from .transfer import Place, copy

    source = Place(url)
    source.manifest()  # before a folder is made
    with exclusive(cache):
        print(f"{cache}: {copy(source, Place(str(cache)))}")
    return 0


VERBS: dict[str, Callable[..., int]] = {verb.__name__: verb for verb in (info, verify, preview, diff, push, pull)}
