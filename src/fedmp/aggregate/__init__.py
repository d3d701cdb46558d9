"""Aggregators: many clients' updates become one.

`WeightedMean` is federated averaging's. The others withstand Byzantine clients, which may send anything: by
element (`CoordinateMedian`, `TrimmedMean`), by comparing whole clients (`Krum`, `MultiKrum`, `GeometricMedian`,
`CenteredClipping`), by both (`Bulyan`), or by bounding each (`NormClipping`). All read updates a tensor at
a time, so that no process needs a whole model of any client. `fedmp.aggregate.contract` checks one's own.
"""

from __future__ import annotations

from fedmp.aggregate.aggregator import Aggregator
from fedmp.aggregate.blocks import gives_views
from fedmp.aggregate.bulyan import Bulyan
from fedmp.aggregate.centered_clipping import CenteredClipping
from fedmp.aggregate.geometric_median import GeometricMedian
from fedmp.aggregate.krum import Krum, MultiKrum
from fedmp.aggregate.mean import WeightedMean
from fedmp.aggregate.median import CoordinateMedian
from fedmp.aggregate.norm_clipping import NormClipping
from fedmp.aggregate.trimmed_mean import TrimmedMean

__all__ = [
    "Aggregator",
    "Bulyan",
    "CenteredClipping",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "NormClipping",
    "TrimmedMean",
    "WeightedMean",
    "gives_views",
]
