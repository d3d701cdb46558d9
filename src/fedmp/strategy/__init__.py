"""Strategies: who takes part in a round, what the clients do in it, and what the server makes of it."""

from __future__ import annotations

from fedmp.strategy.closing import Closing, ClosingRules
from fedmp.strategy.contract import check_selection, check_strategy
from fedmp.strategy.diloco import DiLoCo
from fedmp.strategy.effort import Effort, Factors, Stragglers
from fedmp.strategy.fedadagrad import FedAdagrad
from fedmp.strategy.fedadam import FedAdam
from fedmp.strategy.fedavg import FedAvg
from fedmp.strategy.fedavgm import FedAvgM
from fedmp.strategy.fedbn import FedBN
from fedmp.strategy.fedbuff import FedBuff
from fedmp.strategy.feddyn import FedDyn
from fedmp.strategy.fednova import FedNova
from fedmp.strategy.fedprox import FedProx
from fedmp.strategy.fedyogi import FedYogi
from fedmp.strategy.qfedavg import QFedAvg
from fedmp.strategy.rules import (
    Combine,
    Contribution,
    LocalRule,
    Scaled,
    ServerRound,
    ServerRule,
    Slots,
    figures,
    kept_name,
    received_name,
)
from fedmp.strategy.scaffold import Scaffold
from fedmp.strategy.scope import Scope
from fedmp.strategy.selection import Available, ClientFacts, PowerOfChoice, Selection, Uniform, Weighted
from fedmp.strategy.strategy import Strategy
from fedmp.strategy.streaming_diloco import StreamingDiLoCo
from fedmp.strategy.yogi import Yogi

__all__ = [
    "Available",
    "ClientFacts",
    "Closing",
    "ClosingRules",
    "Combine",
    "Contribution",
    "DiLoCo",
    "Effort",
    "Factors",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedYogi",
    "LocalRule",
    "PowerOfChoice",
    "QFedAvg",
    "Scaffold",
    "Scaled",
    "Scope",
    "Selection",
    "ServerRound",
    "ServerRule",
    "Slots",
    "Stragglers",
    "Strategy",
    "StreamingDiLoCo",
    "Uniform",
    "Weighted",
    "Yogi",
    "check_selection",
    "check_strategy",
    "figures",
    "kept_name",
    "received_name",
]
