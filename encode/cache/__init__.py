"""The cache on the disk: written under locks, and read by memory map."""

from ..base.errors import SettingsError

try:
    import fcntl as fcntl
except ModuleNotFoundError:
    raise SettingsError(
        "caches are locked and mapped as Linux and macOS do it, which this system lacks: encode and train there "
        "(WSL is Linux, too); ip2p-infer edits pictures here as well"
    ) from None
