"""The frozen values that cross fedmp's modules and processes: plain, validated data, nothing executable."""

from __future__ import annotations

from fedmp.records.clock import ClockEvent, RoundTimed, rounds_of
from fedmp.records.faults import Fault
from fedmp.records.history import (
    ClientData,
    Event,
    Note,
    Observer,
    Progress,
    RoundFinished,
    RoundRecord,
    RoundStarted,
    RunFinished,
    RunStarted,
    Summary,
    TimedAction,
)
from fedmp.records.messages import (
    Address,
    DeviceReport,
    FailureReport,
    Instruction,
    JobOffer,
    Joined,
    ProgressReport,
    Ready,
    Receipt,
    round_of_key,
    state_key,
)
from fedmp.records.plan import Plan, StagePlan
from fedmp.records.profile import LayerProfile, Profile

__all__ = [
    "Address",
    "ClientData",
    "ClockEvent",
    "DeviceReport",
    "Event",
    "FailureReport",
    "Fault",
    "Instruction",
    "JobOffer",
    "Joined",
    "LayerProfile",
    "Note",
    "Observer",
    "Plan",
    "Profile",
    "Progress",
    "ProgressReport",
    "Ready",
    "Receipt",
    "RoundFinished",
    "RoundRecord",
    "RoundStarted",
    "RoundTimed",
    "RunFinished",
    "RunStarted",
    "StagePlan",
    "Summary",
    "TimedAction",
    "round_of_key",
    "rounds_of",
    "state_key",
]
