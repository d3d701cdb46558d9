"""Strategies: who takes part in a round and what the clients do in it."""

from __future__ import annotations

from fedmp.strategy.closing import Closing, ClosingRules
from fedmp.strategy.fedavg import FedAvg, Strategy
from fedmp.strategy.fedbuff import FedBuff

__all__ = ["Closing", "ClosingRules", "FedAvg", "FedBuff", "Strategy"]
