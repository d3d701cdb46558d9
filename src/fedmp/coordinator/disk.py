"""Writing that lasts, or fails as the system says, whatever library writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["disk_errors", "flush", "write_atomically"]


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


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk, so that they survive a loss of power.

    Raises:
        OSError: as the system says.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear whole or not at all.

    Args:
        path: of the file.
        write: writes it to the path that it is given.

    Raises:
        OSError: as the system says.
    """
    part = path.with_name(f".{path.name}.part")
    with disk_errors():
        write(part)
    os.replace(part, path)
