"""Attacks on a federation, for simulations: what Byzantine clients do to their data and their updates.

Pick one by `attack=...` on the command line or `Job(attack=...)`, with a robust aggregator of
`fedmp.aggregate` or without, and see what becomes of the training. `SignFlip`, `Scaling`, `Gaussian` and `LabelFlip`
need to know nothing; `ALittleIsEnough` and `MinMax` see the honest updates and hide among them.
"""

from __future__ import annotations

from fedmp.attacks.a_little_is_enough import ALittleIsEnough
from fedmp.attacks.attack import Attack
from fedmp.attacks.min_max import MinMax
from fedmp.attacks.simple import Gaussian, LabelFlip, Scaling, SignFlip

__all__ = ["ALittleIsEnough", "Attack", "Gaussian", "LabelFlip", "MinMax", "Scaling", "SignFlip"]
