"""Edits pictures with a trained InstructPix2Pix pipeline: `Editor("OUT").edit(picture, "make it snowy")`."""

from ..encode.base.errors import EditError
from .edit import Editor

__all__ = ["EditError", "Editor"]
