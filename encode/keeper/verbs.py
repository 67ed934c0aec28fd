"""What each verb of `ip2p-cache` does and prints; returns the exit status."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import SettingsError

# The rest is imported by the verb that needs it: `info` shall not wait for torch, nor `push` for diffusers.
if TYPE_CHECKING:
    from ..cache.format import Cache
    from .__main__ import (
        Diff,
        Info,
        Preview,
        Pull,
        Push,
        Verify,
    )
    from .reencode import Deviation
    from .transfer import Copied


def info(flags: "Info", folder: str) -> int:
    """Print what a cache holds."""
    from ..cache.format import Cache
    from .inventory import describe, quarantined

    cache = Cache.open(Path(folder))
    found = describe(cache)
    if flags.quarantined:
        found["quarantined"] = quarantined(cache)
    if flags.json:
        print(json.dumps(found, indent=1))
        return 0
    samples = ", ".join(f"{count:,} {status}" for status, count in found["samples"].items())
    print(f"{folder}: {samples}; views: {', '.join(found['views'])}; {mebibytes(found['bytes'])}")
    for name, array in found["arrays"].items():
        print(f"  {name:<9} {' x '.join(map(str, array['shape'])):<28} {mebibytes(array['bytes'])}")
    for part in ("model", "identity", "dataset", "encoding"):
        print(part)
        for field, value in found[part].items():
            if value is not None:
                print(f"  {field:<16} {', '.join(value) if isinstance(value, list) else value}")
    for sample in found.get("quarantined", []):
        print("{key}  position {position}: {reason} (instruction {instruction!r})".format_map(sample))
    return 0


def verify(flags: "Verify", folder: str) -> int:
    """Print what is wrong in a cache, and drop what is torn if asked to; the status is 1 if anything is wrong."""
    from ..cache.format import Cache
    from ..cache.writer import exclusive
    from .repair import repair
    from .verify import verify as find_damage

    path = Path(folder)
    if not path.is_dir():
        Cache.open(path)  # says that there is none
    with exclusive(path) if flags.repair else nullcontext():
        findings = find_damage(path)
        dropped = repair(path, findings) if flags.repair else []
    lines = [f"{path / finding.path}: {finding.problem}" for finding in findings]
    worst = reencoded(flags, Cache.open(path)) if flags.reencode and not findings else {}
    lines += [f"{path}: {name} differs from a fresh encoding" for name, found in worst.items() if found.is_wrong]
    if flags.json:
        wrong = [{"path": finding.path, "problem": finding.problem} for finding in findings]
        deviations = {name: found._asdict() for name, found in worst.items()}
        print(json.dumps({"wrong": wrong, "dropped": dropped, "reencoded": deviations}, indent=1))
        return int(bool(lines))
    for name, found in worst.items():
        print(
            f"{name}: at most {found.absolute:.2g} from a fresh encoding, relative {found.relative:.2g} "
            f"(tolerated {found.tolerated:.2g})"
        )
    print("\n".join([*lines, *(f"dropped {name}" for name in dropped)] or [f"{path} is sound"]))
    if findings:
        mend = (
            "run the same ip2p-encode again"
            if flags.repair
            else f"`ip2p-cache verify {path} --repair` drops what is torn"
        )
        print(f"{len(findings):,} findings: {mend}")
    return int(bool(lines))


def reencoded(flags: "Verify", cache: "Cache") -> "dict[str, Deviation]":
    """The deviation of each array from a fresh encoding."""
    from ..origin import recorded_config
    from .reencode import reencode

    return reencode(cache, recorded_config(cache.manifest, flags), flags.reencode)


def preview(flags: "Preview", folder: str) -> int:
    """Write a contact sheet."""
    from ..cache.format import Cache
    from ..origin import recorded_config
    from .preview import preview as draw

    cache = Cache.open(Path(folder))
    cache.check_files()
    sheet = draw(cache, recorded_config(cache.manifest, flags), flags.samples)
    try:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(flags.output)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--output {flags.output} cannot be written: {error}") from None
    print(f"{flags.output}: {sheet.width} x {sheet.height} pixels")
    return 0


def diff(flags: "Diff", a: str, b: str) -> int:
    """Print how two caches differ; the status is 1 if they do."""
    from ..cache.format import Cache
    from .inventory import compare

    found = compare(Cache.open(Path(a)), Cache.open(Path(b)))
    if flags.json:
        print(json.dumps(found, indent=1))
    else:
        for field, (left, right) in found["fields"].items():
            print(f"{field}\n  {a}: {left}\n  {b}: {right}")
        shared, left, right = found["samples"].values()
        print(f"samples: {shared:,} in both, {left:,} only in {a}, {right:,} only in {b}")
    return int(bool(found["fields"] or found["samples"]["only in a"] or found["samples"]["only in b"]))


def push(_: "Push", folder: str, url: str) -> int:
    """Copy a cache to a URL."""
    from .transfer import Place, copy

    report(copy(Place(folder), Place(url)), url)
    return 0


def pull(_: "Pull", url: str, folder: str) -> int:
    """Copy a cache from a URL."""
    from ..cache.writer import exclusive
    from .transfer import Place, copy

    source = Place(url)
    source.manifest()  # before a folder is made
    with exclusive(Path(folder)):
        report(copy(source, Place(folder)), folder)
    return 0


def report(copied: "Copied", target: str) -> None:
    """Say what a copy came to."""
    there = f", {copied.skipped:,} were there already" if copied.skipped else ""
    print(f"{target}: copied {copied.files:,} files, {mebibytes(copied.bytes)}{there}")


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:,.1f} MiB"
