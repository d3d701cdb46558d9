"""The assumptions of the comparison that are not those of the federation itself."""

from __future__ import annotations

from pydantic import Field

from fedmp.clock import Loss
from fedmp.component import Component
from fedmp.topology import Client

__all__ = ["PaperSettings", "Variations"]


class Variations(Component):
    """What is varied, one thing at a time, to see what the improvement depends on.

    Args:
        uplink_mbit_per_s: of each site, sustained.
        sites: how many, with the same data spread over them; each has the first site's devices.
        device_speed: of all devices of both sides, in multiples.
        center_speed: of the centre's devices alone, in multiples.
        data_size: samples of everybody, in multiples.
    """

    uplink_mbit_per_s: tuple[float, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    sites: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50)
    device_speed: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    center_speed: tuple[float, ...] = (0.5, 1, 2, 5, 10, 20, 50, 100, 500)
    data_size: tuple[float, ...] = (0.1, 0.3, 1, 3, 10, 100, 1000)


class PaperSettings(Component):
    """Where the centralized side trains, and what fails.

    Args:
        center: its devices and links; they form a pipeline, or several in data parallel, whichever is fastest. Its
            uplink is the line by which the sites' raw data come in, shared by all of them.
        center_num_microbatches: of the batch of each of its pipelines.
        losses: devices that are lost for good in a second run of the federation.
        losses_min_clients: sites that a round of that run needs.
        vary: the variations.
    """

    center: Client
    center_num_microbatches: int = Field(default=8, ge=1)
    losses: tuple[Loss, ...] = ()
    losses_min_clients: int = Field(default=1, ge=1)
    vary: Variations = Field(default_factory=Variations)
