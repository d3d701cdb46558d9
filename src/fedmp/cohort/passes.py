"""Passes of a chunk through the model and back.

Shape letters: K clients, B samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmp.cohort.module import StackedModule
from fedmp.cohort.objective import Objective
from fedmp.cohort.replays import Replays, Tensors
from fedmp.cohort.slot import Arrived

__all__ = ["Pass", "Passes"]

_WORTH_S = 0.02  # what a small kind of pass takes to be recorded
_TIMES = 8  # that it comes before: the rounds that it is a part of may be recorded themselves


@dataclass(frozen=True, eq=False)
class Pass:
    """Samples of neighbouring clients that go through the model together.

    Attributes:
        first, stop: the clients.
        inputs, targets: [K, B, ...].
        weights: [K] of the targets.
    """

    first: int
    stop: int
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Passes:
    """Runs passes, whose gradients the module's slots take in.

    Args:
        module: the clients' weights.
        objective: the loss.
        replays: whether tapes may be used.

    Attributes:
        replays: those tapes.
    """

    def __init__(self, module: StackedModule, objective: Objective, *, replays: bool) -> None:
        self._module, self._objective = module, objective
        self.replays = Replays(module, [objective.task])
        self.replays.refusal = "" if replays else "not wanted"
        if replays and objective.task.has_accuracy and not objective.takes_padding:
            self.replays.refusal = "the task counts correct predictions in Python"

    def run(self, one: Pass, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a pass, or replay it.

        Args:
            one: the pass.
            totals: [K] weights of the whole batches that it is a part of.

        Returns:
            [K] summed losses and [K] correct predictions; the next pass may overwrite them.

        Raises:
            CannotStackError: the model cannot be run for many clients at once.
        """
        given = [one.inputs, one.targets, totals]
        before, step = self._module.arrived(one.first, one.stop), self._module.step
        key = (one.first, one.stop, before, step, *((tensor.shape, tensor.dtype) for tensor in given))

        def compute(given: Tensors) -> tuple[Tensors, tuple[Arrived, ...]]:
            self._module.mark_arrived(one.first, one.stop, before)
            return self._run(one, *given), self._module.arrived(one.first, one.stop)

        (sums, correct), after = self.replays.run(key, given, compute, worth_s=_WORTH_S, times=_TIMES)
        self._module.mark_arrived(one.first, one.stop, after)
        return sums, correct

    def run_plainly(self, one: Pass, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by the model's own forward and backward."""
        return self._run(one, one.inputs, one.targets, totals)

    def _run(
        self, one: Pass, inputs: torch.Tensor, targets: torch.Tensor, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._module.run(inputs, one.first, one.stop)
        sums = self._objective.loss_sums(output, targets)
        if sums.requires_grad:
            self._objective.go_back(sums, totals)
            self._module.collect(one.first, one.stop)
        return sums.detach(), self._objective.num_correct(output, targets)
