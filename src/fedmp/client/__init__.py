"""The client runtime: what runs on each device, next to the data, and talks to the coordinator."""

from __future__ import annotations

from fedmp.client.device import DeviceSpec, heartbeat, run_device, serve_job
from fedmp.client.federation import Federation, HttpFederation
from fedmp.client.training import LocalTrainer, LocalWork

__all__ = [
    "DeviceSpec",
    "Federation",
    "HttpFederation",
    "LocalTrainer",
    "LocalWork",
    "heartbeat",
    "run_device",
    "serve_job",
]
