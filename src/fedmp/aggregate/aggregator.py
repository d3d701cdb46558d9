"""The seam of all aggregators: whole clients' updates and their weights come in, one update goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Protocol, runtime_checkable

import torch

from fedmp.errors import ConfigError

__all__ = [
    "Aggregator",
    "NeedsClients",
    "check_cohorts",
    "check_tolerance",
    "check_updates",
    "enough_clients",
    "refusal",
]


@runtime_checkable
class Aggregator(Protocol):
    """A way to combine updates.

    An update may have a property `gives_views`: whether reading one of its tensors gives a view of memory
    or of a mapped file, so that many may be held at once. Without it only those of a dict are taken for views.
    """

    def combine(
        self, updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """One update from many.

        Args:
            updates: one a client, in client order, all with the same names, shapes and dtypes, and all
                names of a client together: some rules compare whole clients. A mapping may read its
                tensors from disk when asked, so take them one name at a time.
            weights: of the clients; positive.
        """
        ...


@runtime_checkable
class NeedsClients(Protocol):
    """An aggregator that does not combine any number of updates; asked before a job begins."""

    def check_clients(self, num_clients: int) -> None:
        """Refuse so many updates.

        Raises:
            ConfigError: the rule, as it is configured, cannot combine them.
        """
        ...


def check_cohorts(aggregator: object, *, minimum: int, wanted: int) -> None:
    """Refuse an aggregator that cannot combine the updates of a round, before any client has trained for it.

    Args:
        aggregator: of a job; one without `check_clients` takes any number.
        minimum, wanted: the fewest and the most updates with which a round may close.

    Raises:
        ConfigError: for some number between them; the first is named.
    """
    error = refusal(aggregator, minimum=minimum, wanted=wanted)
    if error is None:
        return
    closes = f"{wanted}" if minimum == wanted else f"{minimum} to {wanted}"
    enough = enough_clients(aggregator, wanted=wanted)
    remedy = "" if enough is None else f"; or set strategy.min_clients={enough}"
    raise ConfigError(
        f"aggregator: rounds of this job close with {closes} clients' updates (strategy.fraction, "
        f"min_clients or buffer_size decide). {error}{remedy}"
    ) from error


def refusal(aggregator: object, *, minimum: int, wanted: int) -> ConfigError | None:
    """What an aggregator says to the first number of updates, of those from a minimum on, that it cannot combine.

    Args:
        aggregator: one without `check_clients` takes any number.
        minimum, wanted: the first and the last number to ask about.
    """
    if not isinstance(aggregator, NeedsClients):
        return None
    for num_clients in range(minimum, wanted + 1):
        try:
            aggregator.check_clients(num_clients)
        except ConfigError as error:
            return error
    return None


def enough_clients(aggregator: object, *, wanted: int) -> int | None:
    """The fewest clients from which on an aggregator combines any number up to those wanted; None if not even these."""
    numbers = range(wanted, 0, -1)
    taken = list(takewhile(lambda n: refusal(aggregator, minimum=n, wanted=n) is None, numbers))
    return taken[-1] if taken else None


def check_updates(updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> None:
    """Refuse no updates, and weights that are not positive or not one an update.

    Raises:
        ValueError: as said.
    """
    if not updates or len(updates) != len(weights) or not min(weights) > 0:
        raise ValueError(f"{len(updates)} updates need as many positive weights, not {list(weights)}")


def check_tolerance(rule: str, num_clients: int, num_byzantine: int | None, *, factor: int) -> int:
    """How many Byzantine clients a rule that needs `n >= factor * f + 3` shall withstand.

    Args:
        rule: its name, for the message.
        num_clients: n, of a round.
        num_byzantine: f as configured; None for the most that n allows.
        factor: of the rule.

    Raises:
        ConfigError: n is too small.
    """
    most = (num_clients - 3) // factor
    wanted = max(most, 0) if num_byzantine is None else num_byzantine
    if num_clients < factor * wanted + 3:
        less = f"num_byzantine of at most {most}" if most >= 0 else "another aggregator"
        raise ConfigError(
            f"{rule} with num_byzantine={wanted} needs at least {factor} x {wanted} + 3 = {factor * wanted + 3} "
            f"clients a round, not {num_clients}; use larger cohorts or {less}"
        )
    return wanted
