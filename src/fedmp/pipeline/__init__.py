"""The pipeline plane: a client's stages train together, micro-batch by micro-batch."""

from __future__ import annotations

from fedmp.pipeline.runner import BatchResult, MicroBatches, StageRunner, microbatch_sizes
from fedmp.pipeline.transport import (
    DistributedTransport,
    Pending,
    Rendezvous,
    Transport,
    host_rendezvous,
    join_rendezvous,
)

__all__ = [
    "BatchResult",
    "DistributedTransport",
    "MicroBatches",
    "Pending",
    "Rendezvous",
    "StageRunner",
    "Transport",
    "host_rendezvous",
    "join_rendezvous",
    "microbatch_sizes",
]
