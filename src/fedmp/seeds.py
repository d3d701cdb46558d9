"""Independent seeds from one: every random choice of a job has a seed of its own, whoever makes it."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *labels: str | int) -> int:
    """A seed for one purpose, the same on every machine.

    Args:
        seed: the job's seed.
        *labels: what it is for, such as ("batches", client, round, epoch).

    Returns:
        A number from 0 to 2**63 - 1.

    Example:
        >>> derive_seed(0, "cohort", 1) == derive_seed(0, "cohort", 1)
        True
    """
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
