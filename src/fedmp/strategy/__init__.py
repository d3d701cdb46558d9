"""Strategies: who takes part in a round and what the clients do in it."""

from __future__ import annotations

from fedmp.strategy.fedavg import FedAvg, Strategy

__all__ = ["FedAvg", "Strategy"]
