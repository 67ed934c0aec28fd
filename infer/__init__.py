"""Edits pictures with a trained InstructPix2Pix pipeline: `Editor("OUT").edit(picture, "make it snowy")`."""

from .edit import Editor
from .errors import EditError

__all__ = ["EditError", "Editor"]
