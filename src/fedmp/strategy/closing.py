"""When a round closes, how many clients train at a time, and what becomes of those that are late.

A late update started from an older global model. Discounting it by its staleness s, the number of rounds
that were committed in the meantime, is of Xie et al., 2019, Asynchronous Federated Optimization, section 5.2:
constant, or polynomial (1 + s)^-a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fedmp.component import Component

__all__ = ["Closing", "ClosingRules"]


@dataclass(frozen=True)
class Closing:
    """When a round closes, in numbers.

    Attributes:
        num_training: clients that train at a time.
        wanted: updates with which the round closes.
        minimum: updates with which it closes once its deadline is over, or once nobody else will finish.
        deadline_s: seconds after which the minimum is enough; None waits for those who are wanted.
        max_staleness: rounds by which an update may be late and count; None discards late updates.
        exponent: a of the discount (1 + s)^-a for staleness s.
        refills: whether another client begins as soon as one is done.
    """

    num_training: int
    wanted: int
    minimum: int
    deadline_s: float | None = None
    max_staleness: int | None = None
    exponent: float = 0.5
    refills: bool = False

    def among(self, num_clients: int) -> Closing:
        """The same where only so many clients can take part."""
        return replace(
            self, wanted=min(self.wanted, num_clients), minimum=min(self.minimum, num_clients, self.wanted)
        )

    def discount(self, staleness: int) -> float:
        """The factor by which an update counts that is late by so many rounds; 1 if it is not late."""
        return float((1 + staleness) ** -self.exponent)

    def oldest(self, round: int) -> int | None:
        """The round from which a client may have begun for its update to count in the one after `round`."""
        return None if self.max_staleness is None else round + 1 - self.max_staleness


class ClosingRules(Component):
    """The fields with which a strategy says when its rounds close; strategies inherit them.

    Args:
        fraction: share of the clients that each round wants; at least one client.
        min_clients: commit a round without those of its cohort that cannot finish it, or not in time, if at
            least so many have; None needs all that the round wants. A selection that finds fewer than so many there
            is filled up with clients that are away, for which the round waits.
        over_selection: let so many more begin than the round wants, as a share: 0.3 picks 13 where 10 are wanted.
            The round closes when those who are wanted have finished, whoever they are.
        deadline_s: seconds after which a round closes with `min_clients`; with fewer it waits on.
        late: what becomes of the update of a client that the round did not wait for: "discard", or "stale": the
            client trains on, and its update counts in the round in which it arrives, discounted by its staleness.
        staleness: how: "polynomial", (1 + s)^-a for an update that is late by s rounds, or "constant", not at all.
        staleness_exponent: a.
        max_staleness: an update that is late by more rounds is discarded.

    Attributes:
        needs_present_model: why updates that began with an earlier model cannot be used; empty if they can.
    """

    needs_present_model: ClassVar[str] = ""

    fraction: float = Field(default=1.0, gt=0, le=1)
    min_clients: int | None = Field(default=None, ge=1)
    over_selection: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    deadline_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    late: Literal["discard", "stale"] = "discard"
    staleness: Literal["polynomial", "constant"] = "polynomial"
    staleness_exponent: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    max_staleness: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _takes_late_updates_only_if_it_can(self) -> ClosingRules:
        if self.late == "stale" and self.needs_present_model:
            raise ValueError(
                f"late='stale' does not go with {type(self).__name__}: {self.needs_present_model}; use late='discard'"
            )
        return self

    @model_validator(mode="after")
    def _closes_early_only_if_it_may(self) -> ClosingRules:
        if self.deadline_s is not None and self.min_clients is None:
            raise ValueError(
                f"a deadline of {self.deadline_s:g} s changes nothing while a round needs all of its clients; say how "
                f"many are enough then: min_clients=NUMBER"
            )
        return self

    def closing(self, num_clients: int) -> Closing:
        """When a round of a job with so many clients closes."""
        wanted = _share(self.fraction, num_clients)
        return Closing(
            num_training=min(num_clients, _share((1 + self.over_selection) * self.fraction, num_clients)),
            wanted=wanted,
            minimum=wanted if self.min_clients is None else min(self.min_clients, wanted),
            deadline_s=self.deadline_s,
            max_staleness=self.max_staleness if self.late == "stale" else None,
            exponent=self.staleness_exponent if self.staleness == "polynomial" else 0.0,
        )


def _share(fraction: float, num_clients: int) -> int:
    return max(1, math.ceil(fraction * num_clients - 1e-9))
