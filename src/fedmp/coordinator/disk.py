"""Writing that may fail because the disk is full: whatever library writes, the system's error arrives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

__all__ = ["disk_errors"]


@contextmanager
def disk_errors() -> Iterator[None]:
    """Let safetensors' errors of the system arrive as such.

    Raises:
        OSError: as the system says.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
