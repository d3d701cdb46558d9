"""A network link that many transfers share: how long each takes when all of them want it at once."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fedmp.topology import Link

__all__ = ["SharedLink", "fair_rates"]

Key = TypeVar("Key", bound=Hashable)
Floats = npt.NDArray[np.float64]

_SAME_MOMENT = 1e-12


class _Transfer(NamedTuple, Generic[Key]):
    begin_s: float
    number: int
    key: Key
    num_bytes: float
    bandwidth_bytes_per_s: float


class SharedLink(Generic[Key]):
    """The coordinator's own link in one direction, behind the links of the devices.

    At every moment the transfers under way share it max-min fairly, as TCP connections about do: nobody gets more
    than its own link carries, and what one cannot use goes to the others (Bertsekas and Gallager, Data Networks,
    section 6.5.2).

    Args:
        bandwidth_bytes_per_s: of the shared link; None for one that is never the bottleneck.
    """

    def __init__(self, bandwidth_bytes_per_s: float | None) -> None:
        self._bandwidth = bandwidth_bytes_per_s
        self._numbers = itertools.count()
        self._waiting: list[_Transfer[Key]] = []

    def add(self, key: Key, start_s: float, num_bytes: float, link: Link) -> None:
        """Let a transfer begin.

        Args:
            key: for `run` to tell which is done.
            start_s: when; while `run` runs, not before the transfer that it tells of.
            num_bytes: nothing takes no time.
            link: between the device and the shared link.
        """
        if self._bandwidth is None:
            entry = _Transfer(start_s + link.transfer_s(num_bytes), next(self._numbers), key, 0.0, 1.0)
        else:
            delay_s = link.latency_s if num_bytes > 0 else 0.0
            entry = _Transfer(
                start_s + delay_s, next(self._numbers), key, num_bytes, link.bandwidth_bytes_per_s
            )
        heapq.heappush(self._waiting, entry)

    def run(self, done: Callable[[Key, float], None]) -> None:
        """Carry everything.

        Args:
            done: called for each transfer as it ends, in the order of time; may add others.
        """
        if self._bandwidth is None:
            while self._waiting:
                first = heapq.heappop(self._waiting)
                done(first.key, first.begin_s)
            return
        active: list[_Transfer[Key]] = []
        left, rates = np.zeros(0), np.zeros(0)
        now_s = 0.0
        while self._waiting or active:
            ends_s = now_s + left / rates
            next_end_s = float(ends_s.min()) if active else np.inf
            begin_s = self._waiting[0].begin_s if self._waiting else np.inf
            then_s = min(next_end_s, begin_s)
            left = left - rates * (then_s - now_s)
            now_s = then_s
            is_done = ends_s <= now_s + _SAME_MOMENT * max(now_s, 1e-9)
            finished = [transfer for transfer, over in zip(active, is_done, strict=True) if over]
            active = [transfer for transfer, over in zip(active, is_done, strict=True) if not over]
            left = left[~is_done]
            for transfer in finished:
                done(transfer.key, now_s)
            while self._waiting and self._waiting[0].begin_s <= now_s:
                transfer = heapq.heappop(self._waiting)
                if transfer.num_bytes > 0:
                    active.append(transfer)
                    left = np.append(left, transfer.num_bytes)
                else:
                    done(transfer.key, now_s)
            caps = np.asarray([transfer.bandwidth_bytes_per_s for transfer in active])
            rates = fair_rates(caps, self._bandwidth)


def fair_rates(caps: Floats, capacity: float) -> Floats:
    """Share a capacity max-min fairly.

    Args:
        caps: the most that each can use, above 0.
        capacity: what there is.

    Returns:
        Each one's share: its cap, or the level at which all others are cut off.

    Example:
        >>> fair_rates(np.array([1.0, 10.0, 10.0]), 9.0).tolist()
        [1.0, 4.0, 4.0]
    """
    if caps.sum() <= capacity:
        return caps
    ordered = np.sort(caps)
    used = np.concatenate(([0.0], np.cumsum(ordered)[:-1]))
    levels = (capacity - used) / np.arange(len(caps), 0, -1)
    level = levels[np.argmax(levels <= ordered)]
    shares: Floats = np.minimum(caps, level)
    return shares
