"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from fedmp.component import Component
from fedmp.schedule.actions import Action, ActionKind, check_sizes

__all__ = ["GPipe"]


class GPipe(Component):
    """All forwards, then all backwards (Huang et al., 2019, GPipe, section 2.3).

    Keeps the activations of every micro-batch; its step time has a closed form.
    """

    @property
    def name(self) -> str:
        """`gpipe`."""
        return "gpipe"

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Backwards run in the order of the forwards, on every stage alike."""
        check_sizes(num_stages, num_microbatches)
        forwards = [Action(ActionKind.FORWARD, index) for index in range(num_microbatches)]
        backwards = [Action(ActionKind.BACKWARD, index) for index in range(num_microbatches)]
        return [forwards + backwards for _ in range(num_stages)]
