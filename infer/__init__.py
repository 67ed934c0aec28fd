"""Edits pictures with a trained InstructPix2Pix pipeline: `Editor("OUT").edit(picture, "make it snowy")`."""

from typing import TYPE_CHECKING, Any

from ..encode.base.errors import EditError

if TYPE_CHECKING:
    from .edit import Editor

__all__ = ["EditError", "Editor"]


def __getattr__(name: str) -> Any:
    """Import `Editor` once it is asked for: torch takes seconds, and `ip2p-infer --help` must not wait for them."""
    if name != "Editor":
        raise AttributeError(name)
    from .edit import Editor

    return Editor
