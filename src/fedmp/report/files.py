"""Files that are whole or not there at all: written beside their place, then moved into it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, body: bytes) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old or the new one.

    Args:
        path: in a directory that exists.
        body: what the file shall hold.

    Raises:
        OSError: the directory cannot be written, or the disk is full; the old file is untouched.
    """
    # Not tempfile: its files are private, while these shall follow the user's umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
