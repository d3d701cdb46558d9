"""1F1B: one forward, one backward, after a warm-up of any depth."""

from __future__ import annotations

from pydantic import Field

from fedmp.component import Component
from fedmp.schedule.actions import Action, ActionKind, check_sizes

__all__ = ["OneFOneB"]


class OneFOneB(Component):
    """One forward, one backward (Narayanan et al., 2019, PipeDream, section 3.2; flushed every step).

    Stage s of P runs its warm-up forwards, then alternates, then drains. `P - s` warm-up forwards keep
    the fewest activations; where links are slow, `2(P - s) - 1` hides a transfer behind a computation.

    Args:
        warmup: "short" for P - s warm-up forwards, "long" for 2(P - s) - 1.
    """

    warmup: str = Field(default="long", pattern="^(short|long)$")

    @property
    def name(self) -> str:
        """`1f1b`, or `1f1b-short`."""
        return "1f1b" if self.warmup == "long" else "1f1b-short"

    def warmup_depth(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Forwards that `stage` runs before its first backward: the activations it holds at most."""
        behind = num_stages - stage
        return min(num_microbatches, behind if self.warmup == "short" else 2 * behind - 1)

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Backwards run in the order of the forwards."""
        check_sizes(num_stages, num_microbatches)
        return [
            _alternate(self.warmup_depth(stage, num_stages, num_microbatches), num_microbatches)
            for stage in range(num_stages)
        ]


def _alternate(depth: int, num_microbatches: int) -> list[Action]:
    actions = [Action(ActionKind.FORWARD, index) for index in range(depth)]
    for index in range(num_microbatches):
        actions.append(Action(ActionKind.BACKWARD, index))
        if depth + index < num_microbatches:
            actions.append(Action(ActionKind.FORWARD, depth + index))
    return actions
