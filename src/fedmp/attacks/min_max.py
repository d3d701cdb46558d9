"""The min-max attack (Shejwalkar and Houmansadr, 2021, Manipulating the Byzantine, section IV-C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fedmp.aggregate.distances import gram, is_floating, squared_distances, squared_distances_to
from fedmp.attacks.attack import Attack, Update, moments, within

__all__ = ["MinMax"]

_BISECTIONS = 60


class MinMax(Attack):
    """All attackers go as far from the honest mean as the two most distant honest clients are from each other.

        u = mean + gamma * p,  with the largest gamma for which  max_i ||u - u_i|| <= max_(i,j) ||u_i - u_j||

    No distance between clients gives them away. gamma is found by bisection on the clients' inner products, so
    no model is assembled.

    Args:
        direction: p, against the honest mean: "std" (minus the standard deviation of each element), "unit"
            (minus the mean), or "sign" (minus its signs).
    """

    direction: Literal["std", "unit", "sign"] = "std"

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """The same for every attacker."""
        seen = list(honest or own)
        names = [name for name, tensor in seen[0].items() if is_floating(tensor)] if own else []
        away = {name: self._direction(seen, name) for name in names}
        gamma = _largest_step(seen, away) if names else 0.0
        forged = dict(own[0]) if own else {}
        for name in names:
            mean, _ = moments(seen, name)
            forged[name] = within(mean + gamma * away[name], forged[name].dtype)
        return [forged] * len(own)

    def _direction(self, seen: Sequence[Update], name: str) -> torch.Tensor:
        mean, std = moments(seen, name)
        return {"std": -std, "unit": -mean, "sign": -mean.sign()}[self.direction]


def _largest_step(seen: Sequence[Update], away: Update) -> float:
    """gamma: distances of `mean + gamma * away` follow from inner products with `away` as one more client."""
    num = len(seen)
    floating = [{name: update[name].double() for name in away} for update in seen]
    products = gram([*floating, away])
    limit = float(squared_distances(products[:num, :num]).max())

    def is_hidden(gamma: float) -> bool:
        point = torch.full((num + 1,), 1 / num, dtype=torch.float64)
        point[num] = gamma
        return float(squared_distances_to(products, point)[:num].max()) <= limit

    length = float(products[num, num].sqrt())
    if limit == 0 or length == 0:
        return 0.0
    low, high = 0.0, 2 * limit**0.5 / length  # twice the limit away is too far for all
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_hidden(middle) else (low, middle)
    return low
