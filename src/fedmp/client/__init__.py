"""The client runtime: what runs on each device, next to the data, and talks to the coordinator."""

from __future__ import annotations

from fedmp.client.body import stage_body, update_body
from fedmp.client.device import DeviceSpec, heartbeat, run_device, serve_job
from fedmp.client.emulation import Emulation
from fedmp.client.federation import OTHER_PLAN, Federation, HttpFederation
from fedmp.client.local_round import LocalRound, RoundResult
from fedmp.client.state import ClientState, StateStore, select, usable
from fedmp.client.training import LocalTrainer, Training
from fedmp.client.wire import Wire
from fedmp.client.work import LocalWork

__all__ = [
    "OTHER_PLAN",
    "ClientState",
    "DeviceSpec",
    "Emulation",
    "Federation",
    "HttpFederation",
    "LocalRound",
    "LocalTrainer",
    "LocalWork",
    "RoundResult",
    "StateStore",
    "Training",
    "Wire",
    "heartbeat",
    "run_device",
    "select",
    "serve_job",
    "stage_body",
    "update_body",
    "usable",
]
