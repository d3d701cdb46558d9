"""Which layers form which stage on which device: partitioners, and what they are made of.

In comes a `Profile` (from `fedmp.graph`) with a client's devices and links, out goes a `Plan` (to
`fedmp.stages`). `Uniform`, `Balanced` and `Exact` are built in; a partitioner of your own is any object
with their `plan` method, usually a choice of cuts that ends in `build_plan`. See docs/partitioners.md.

The package can be called: `fedmp.partition(model, ...)` is `fedmp.partition.api.partition`, and
`fedmp.partition.Exact` is a class, as configs name it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from fedmp.partition.balanced import Balanced
from fedmp.partition.build import build_plan
from fedmp.partition.contract import check_partitioner
from fedmp.partition.estimate import CostModel, cost_model
from fedmp.partition.events import StageTimes, Timeline, gpipe_step_s, simulate, step_s, timeline
from fedmp.partition.exact import Exact
from fedmp.partition.partitioner import Partitioner
from fedmp.partition.uniform import Uniform

__all__ = [
    "Balanced",
    "CostModel",
    "Exact",
    "Partitioner",
    "StageTimes",
    "Timeline",
    "Uniform",
    "build_plan",
    "check_partitioner",
    "cost_model",
    "gpipe_step_s",
    "simulate",
    "step_s",
    "timeline",
]


class _CallablePackage(ModuleType):
    """Importing from here makes this package the attribute `fedmp.partition`, which is to be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fedmp.partition.api import partition  # needs torch, which planning itself does not

        return partition(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
