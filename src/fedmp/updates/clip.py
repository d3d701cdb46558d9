"""No update longer than so much: a client's whole update, scaled down if its 2-norm is above the bound."""

from __future__ import annotations

from pydantic import Field

from fedmp.component import Component

__all__ = ["Clip"]


class Clip(Component):
    """Scale the whole update of a client, over all of its devices, to a 2-norm of at most `max_norm`.

    The norm is that of the trained parameters; buffers do not count and are not scaled. It is the client's own
    doing: against clients that do not keep to it, bound norms at the coordinator, by its aggregator.
    Comes first of all transforms, so that error feedback keeps nothing of what was clipped.

    Args:
        max_norm: above 0.
    """

    max_norm: float = Field(default=10.0, gt=0)

    def factor(self, norm: float) -> float:
        """What to multiply an update of this norm with."""
        return min(1.0, self.max_norm / norm) if norm > 0 else 1.0
