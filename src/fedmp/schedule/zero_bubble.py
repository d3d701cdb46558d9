"""Zero bubble: 1F1B whose weight gradients fill the bubbles."""

from __future__ import annotations

from fedmp.component import Component
from fedmp.schedule.actions import Action, check_sizes
from fedmp.schedule.greedy import greedy

__all__ = ["ZeroBubble"]


class ZeroBubble(Component):
    """1F1B with the backward split, weight gradients filling the bubbles (Qi et al., 2023, Zero Bubble
    Pipeline Parallelism, section 2, ZB-H1).

    Holds no more activations than 1F1B with its short warm-up. We pick actions greedily by the paper's
    priorities with equal times for F, I and W, rather than by its hand-written order.
    """

    @property
    def name(self) -> str:
        """`zero-bubble`."""
        return "zero-bubble"

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Inputs' gradients run in the order of the forwards, and so do weights' gradients."""
        check_sizes(num_stages, num_microbatches)
        placement = tuple((stage,) for stage in range(num_stages))
        limits = [num_stages - stage for stage in range(num_stages)]
        placed = greedy(placement, num_microbatches, limits, splits=True)
        return [[Action(action.kind, action.microbatch) for action in listed] for listed in placed]
