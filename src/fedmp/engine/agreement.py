"""Whether a device and its coordinator mean the same job, found out without sending a config.

Each value of the config on which all must agree goes over the wire as a digest under its key, so that a
mismatch can be named, but nothing arrives that could be instantiated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedmp.errors import ConfigError

__all__ = ["agreement_of", "check_agreement", "job_name"]

# what changes the numbers that come out; where data lie and how they are split is each device's own business
_KEYS = (
    *("model", "task", "schedule", "strategy", "optimizer", "learning_rate"),
    *("leaves", "cuts", "pipeline", "rounds", "batch_size", "num_microbatches", "accumulate_batches"),
    *("transforms", "downlink", "max_gradient_norm", "seed", "federated_evaluation"),
)


def agreement_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the values that all must have alike, by dotted key.

    Args:
        config: plain data, as the command line composed it; empty agrees with everything.
    """
    leaves = ((key, value) for name in _KEYS if name in config for key, value in _leaves(name, config[name]))
    return {key: _digest(json.dumps(value, sort_keys=True)) for key, value in leaves}


def check_agreement(own: Mapping[str, Any], offered: Mapping[str, str]) -> None:
    """Compare a device's config with what the coordinator says of its own.

    Raises:
        ConfigError: they differ; names every key and the value here.
    """
    here = agreement_of(own)
    if not here or not offered:
        return
    values = dict(pair for name in _KEYS if name in own for pair in _leaves(name, own[name]))
    differing = sorted(key for key in {*here, *offered} if here.get(key) != offered.get(key))
    if differing:
        told = ", ".join(
            f"{key} (here {values[key]!r})" if key in values else f"{key} (not set here)"
            for key in differing[:8]
        )
        raise ConfigError(
            f"this device's job is not the coordinator's: they differ in {told}; start both with the same config"
        )


def job_name(agreement: Mapping[str, str], fingerprint: str) -> str:
    """A name for a job: equal for equal jobs."""
    return _digest(json.dumps([dict(agreement), fingerprint], sort_keys=True))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
