"""What one process finds out for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..encode.base.errors import Ip2pError

T = TypeVar("T")


def agreed(find: Callable[[], T]) -> T:
    """What the main process finds, in all processes: others may see a shared disk later, or draw another number.

    Raises the main process's Ip2pError, in all of them.
    """
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [find()]
        except Ip2pError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Ip2pError):
        raise found[0]
    return found[0]
