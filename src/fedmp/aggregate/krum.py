"""Krum and multi-Krum (Blanchard et al., 2017, Machine Learning with Adversaries, sections 4 and 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.aggregate.aggregator import check_tolerance, check_updates
from fedmp.aggregate.distances import combination, gram, squared_distances
from fedmp.component import Component
from fedmp.errors import ConfigError

__all__ = ["Krum", "MultiKrum", "krum_scores"]


class Krum(Component):
    """The update of the one client that is closest to its neighbours.

        s(i) = sum of ||u_i - u_j||^2 over the n - f - 2 clients j nearest to i;   u = u_(argmin s)

    Withstands f Byzantine clients of n >= 2f + 3. Distances are between whole clients: the sum over all
    floating tensors, however a client's plan cuts them. A tie goes to the earlier client; clients count
    equally, whatever their weights. Since one client's update is all that is used, Krum is noisy, and on clients
    that differ much it prefers the most ordinary: `MultiKrum` averages.

    Counters and flags are the median of all clients', for a client with an honest step may lie about them.

    Args:
        num_byzantine: f; None for the most that each round's n allows, (n - 3) // 2.
    """

    num_byzantine: int | None = Field(default=None, ge=0)

    def check_clients(self, num_clients: int) -> None:
        """Refuse fewer than 2f + 3.

        Raises:
            ConfigError: as said.
        """
        _selection(num_clients, self.num_byzantine, 1)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """The chosen client's update; weights are checked and not used.

        Raises:
            ConfigError: there are fewer clients than 2f + 3.
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        return _mean_of_best(updates, self.num_byzantine, 1)


class MultiKrum(Component):
    """The mean of the clients with the smallest Krum scores.

    Withstands f Byzantine clients of n >= 2f + 3; of those chosen some may be Byzantine, but only if they
    lie about as close to the honest as these to each other. Ties, weights and counters as in `Krum`.

    Args:
        num_byzantine: f; None for the most that each round's n allows, (n - 3) // 2.
        num_selected: m, how many are averaged, at most n - f; None for n - f, as in the paper's experiments.
    """

    num_byzantine: int | None = Field(default=None, ge=0)
    num_selected: int | None = Field(default=None, ge=1)

    def check_clients(self, num_clients: int) -> None:
        """Refuse fewer than 2f + 3, or than f + m.

        Raises:
            ConfigError: as said.
        """
        _selection(num_clients, self.num_byzantine, self.num_selected)

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """The mean of the chosen clients' updates; weights are checked and not used.

        Raises:
            ConfigError: there are fewer clients than 2f + 3, or than f + m.
            ValueError: no updates, weights that do not fit them, or numbers that are not finite.
        """
        check_updates(updates, weights)
        return _mean_of_best(updates, self.num_byzantine, self.num_selected)


def krum_scores(distances: torch.Tensor, num_byzantine: int) -> torch.Tensor:
    """Each client's score.

    Args:
        distances: squared, between clients, [n, n] with a zero diagonal.
        num_byzantine: f.

    Returns:
        [n]: sums over the n - f - 2 nearest others, but one at least.
    """
    num_neighbours = max(1, len(distances) - num_byzantine - 2)
    nearest = distances.clone().fill_diagonal_(-1).sort(dim=1).values  # oneself first, whatever the ties
    return nearest[:, 1 : 1 + num_neighbours].sum(dim=1)


def _mean_of_best(
    updates: Sequence[Mapping[str, torch.Tensor]], num_byzantine: int | None, num_selected: int | None
) -> dict[str, torch.Tensor]:
    """The plain mean of the updates with the smallest scores."""
    num_clients = len(updates)
    tolerated, selected = _selection(num_clients, num_byzantine, num_selected)
    scores = krum_scores(squared_distances(gram(updates)), tolerated)
    chosen = scores.argsort(stable=True)[:selected].tolist()
    return combination(updates, [1 / selected if index in chosen else 0.0 for index in range(num_clients)])


def _selection(num_clients: int, num_byzantine: int | None, num_selected: int | None) -> tuple[int, int]:
    """How many of so many clients may be Byzantine, and how many are averaged."""
    tolerated = check_tolerance("Krum", num_clients, num_byzantine, factor=2)
    most = num_clients - tolerated
    selected = most if num_selected is None else num_selected
    if selected > most:
        raise ConfigError(
            f"MultiKrum with num_byzantine={tolerated} of {num_clients} clients can select at most {most}, not "
            f"num_selected={selected}; use a smaller num_selected or larger cohorts"
        )
    return tolerated, selected
