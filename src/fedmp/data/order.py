"""The order in which a client goes through its samples: the same wherever it trains, drawn for many clients at once.

Each sample of a pass gets 64 random bits of its own, and the pass visits the samples in the order of these. The bits
are those of SplitMix64 (Steele, Lea and Flood, 2014, Fast Splittable Pseudorandom Number Generators, section 4), which
computes the n-th number of a stream from n alone, so a whole cohort's are a few operations on arrays; `randperm` with
a generator for each client takes longer than a small client's training.

Shape letters: N passes, n samples of a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from fedmp.seeds import derive_seed

__all__ = ["client_streams", "one_pass", "passes"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's bits: how far a stream goes with each number
_REMEMBERED = 8192  # clients, of some 150 bytes

Streams = npt.NDArray[np.uint64]


def one_pass(num_samples: int, *, seed: int, client: str, round: int, epoch: int) -> torch.Tensor:
    """[n] the order of one pass of one client.

    Args:
        num_samples: n.
        seed: the job's.
        client, round, epoch: whose pass.

    Example:
        >>> one_pass(5, seed=0, client="hospital", round=1, epoch=0).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    streams = client_streams([client], seed=seed, round=round)
    return torch.from_numpy(passes(streams, np.array([epoch]), num_samples)[0])


def client_streams(clients: Sequence[str], *, seed: int, round: int) -> Streams:
    """[K] where the random numbers of each client's round begin."""
    keys = np.array([_key(seed, client) for client in clients], dtype=np.uint64)
    return _mixed(keys + np.array([round], dtype=np.uint64) * _GAMMA)


def passes(streams: Streams, epochs: npt.NDArray[np.int64], num_samples: int) -> npt.NDArray[np.int64]:
    """[N, n] the orders of several passes over equally many samples.

    Args:
        streams: [N] of each pass's client in its round.
        epochs: [N] which pass of the round each one is.
        num_samples: n.
    """
    begin = _mixed(streams + epochs.astype(np.uint64) * _GAMMA)
    return np.argsort(_numbers(begin, num_samples), axis=1)


def _numbers(begin: Streams, count: int) -> Streams:
    """[N, n] the first numbers of each stream."""
    return _mixed(begin[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


def _mixed(state: Streams) -> Streams:
    """A state's number; arrays of unsigned integers wrap around without a warning."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@lru_cache(maxsize=_REMEMBERED)
def _key(seed: int, client: str) -> int:
    return derive_seed(seed, "batches", client)
