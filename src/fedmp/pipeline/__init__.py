"""The pipeline plane: a client's stages train together, micro-batch by micro-batch."""

from __future__ import annotations

from fedmp.pipeline.compression import Compression
from fedmp.pipeline.heap import give_back, keep_freed, keep_near_plan
from fedmp.pipeline.microbatches import BatchResult, MicroBatches, microbatch_sizes
from fedmp.pipeline.options import Pace, RunnerOptions
from fedmp.pipeline.runner import DeviceRunner
from fedmp.pipeline.settings import PipelineSettings
from fedmp.pipeline.stage_runner import StageRunner
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
    "Compression",
    "DeviceRunner",
    "DistributedTransport",
    "MicroBatches",
    "Pace",
    "Pending",
    "PipelineSettings",
    "Rendezvous",
    "RunnerOptions",
    "StageRunner",
    "Transport",
    "give_back",
    "host_rendezvous",
    "join_rendezvous",
    "keep_freed",
    "keep_near_plan",
    "microbatch_sizes",
]
