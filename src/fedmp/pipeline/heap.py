"""The heap of a process that trains: whether freed tensors go back to the system, or wait to be used again.

A device's process is to stay within its device's memory. glibc before 2.38 cannot use most freed places of aligned
tensors again: a larger one is needed each time, for the alignment. A process that trains with many tensors of a few
hundred kB so grows to more than twice what it holds. That costs nothing but memory, and where there is enough of it
malloc is left alone.

A process that trains many clients at once makes the same tensors of a few MB over and over. Left alone, malloc gives
them back and asks for them again, and the system clears every page anew: up to a third of a step.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back", "keep_freed", "keep_near_plan"]

_SLACK = 2.5  # what a process may grow to if malloc is left alone, in units of its plan; measured: up to 2.3
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers of them
_OWN_PAGES_BYTES = 1 << 18  # with 1 MiB, a small residual network still takes a quarter more than planned
_KEPT_BYTES = 1 << 30
_KEPT_TENSOR_BYTES = 32 << 20  # the most that a thread's heap can hold


def keep_near_plan(planned_bytes: int, memory_bytes: int) -> bool:
    """Where the plan comes near the device's memory, give large tensors pages that leave with them.

    Steps take longer for it, since the system clears fresh pages. Call it before the weights are made.

    Args:
        planned_bytes: what this process is planned to take beyond what it takes now.
        memory_bytes: what there is.

    Returns:
        Whether that was needed and done; it cannot be undone.
    """
    if memory_bytes >= _SLACK * planned_bytes:
        return False
    return _set({_MMAP_THRESHOLD: _OWN_PAGES_BYTES})


def keep_freed() -> bool:
    """Let freed memory of up to 1 GiB wait in this process until it is used again.

    Returns:
        Whether malloc can be told so; it cannot be undone.
    """
    return _set({_MMAP_THRESHOLD: _KEPT_TENSOR_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES})


def give_back() -> None:
    """Give freed memory back to the system once, as when work goes on that needs less of it."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def _set(options: dict[int, int]) -> bool:
    """Set options of glibc's malloc; False where it is another one."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and all(
        library.mallopt(option, value) for option, value in options.items()
    )
