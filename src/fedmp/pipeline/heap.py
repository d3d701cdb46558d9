"""The heap of a device's process: where memory is short, freed tensors go back to the system at once.

glibc before 2.38 cannot use most freed places of aligned tensors again: a larger one is needed each time, for the
alignment. A process that trains with many tensors of a few hundred kB so grows to more than twice what it holds.
That costs nothing but memory, and where there is enough of it malloc is left alone.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_near_plan"]

_SLACK = 2.5  # what a process may grow to if malloc is left alone, in units of its plan; measured: up to 2.3
_MMAP_THRESHOLD = -3  # mallopt's number of it
_OWN_PAGES_BYTES = 1 << 18  # with 1 MiB, a small residual network still takes a quarter more than planned


def keep_near_plan(planned_bytes: int, memory_bytes: int) -> bool:
    """Where the plan comes near the device's memory, give large tensors pages that leave with them.

    Steps take longer for it, since the system clears fresh pages. Call it before the weights are made.

    Args:
        planned_bytes: what this process is planned to take beyond what it takes now.
        memory_bytes: what there is.

    Returns:
        Whether that was needed and done; it cannot be undone.
    """
    if memory_bytes >= _SLACK * planned_bytes or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and bool(library.mallopt(_MMAP_THRESHOLD, _OWN_PAGES_BYTES))
