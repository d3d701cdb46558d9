"""fedmp: federated model-parallel training.

A client's model is cut over its own devices and trained there as a pipeline on local data; only stage
updates travel to a coordinator that averages them. Everything a training script needs is here:

    import fedmp

    plan = fedmp.partition(model, (x,), devices=[fedmp.Device("a"), fedmp.Device("b")])
    stages = fedmp.split(model, plan)
    result = fedmp.Job(model=model, topology=topology, data=(x, y, x_test, y_test)).run(engine="local")

Names are imported when first used, so `import fedmp` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmp.engine import Centralized, Job, Result
    from fedmp.errors import FedmpError
    from fedmp.graph import Chain, CutRules
    from fedmp.partition.api import partition
    from fedmp.records import Plan
    from fedmp.stages import merge, run_stages, split
    from fedmp.tasks import CrossEntropy, MeanLoss
    from fedmp.topology import Client, Device, Link, Links, Topology

__version__ = "0.1.0"

# a library does not print its log unless it is asked to
logging.getLogger("fedmp").addHandler(logging.NullHandler())

_HOMES = {
    "Centralized": "fedmp.engine",
    "Chain": "fedmp.graph",
    "Client": "fedmp.topology",
    "CrossEntropy": "fedmp.tasks",
    "CutRules": "fedmp.graph",
    "Device": "fedmp.topology",
    "FedmpError": "fedmp.errors",
    "Job": "fedmp.engine",
    "Link": "fedmp.topology",
    "Links": "fedmp.topology",
    "MeanLoss": "fedmp.tasks",
    "Plan": "fedmp.records",
    "Result": "fedmp.engine",
    "Topology": "fedmp.topology",
    "merge": "fedmp.stages",
    "run_stages": "fedmp.stages",
    "split": "fedmp.stages",
}

__all__ = [
    "Centralized",
    "Chain",
    "Client",
    "CrossEntropy",
    "CutRules",
    "Device",
    "FedmpError",
    "Job",
    "Link",
    "Links",
    "MeanLoss",
    "Plan",
    "Result",
    "Topology",
    "__version__",
    "merge",
    "partition",
    "run_stages",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "partition":  # a package that can be called, so that configs may name what is in it
        return importlib.import_module("fedmp.partition")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedmp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
