"""A task's loss for many clients at once.

Shape letters: K clients, B samples of a batch.
"""

from __future__ import annotations

from typing import Any

import torch

from fedmp.cohort.registry import CannotStackError
from fedmp.cohort.stacked import Stacked, stack, unstack
from fedmp.tasks import CrossEntropy, MeanLoss, Task

__all__ = ["Objective"]


class Objective:
    """The loss, its weight and the correct predictions of each client.

    Args:
        task: of one client.

    Attributes:
        takes_padding: whether targets can say that a sample does not count.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.takes_padding = type(task) is CrossEntropy

    def pad(self, targets: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Say of all but the first `sizes[k]` samples of client k, [K, B, ...], that they do not count."""
        assert isinstance(self.task, CrossEntropy)
        is_padding = torch.arange(targets.shape[1]) >= sizes.unsqueeze(1)
        is_padding = is_padding.view(*is_padding.shape, *[1] * (targets.dim() - 2))
        return targets.masked_fill(is_padding, self.task.ignore_index)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """[K] weights of targets, [K, B, ...]."""
        if isinstance(self.task, CrossEntropy) and self.takes_padding:
            return (targets != self.task.ignore_index).flatten(1).sum(1).double()
        if type(self.task) is MeanLoss:
            return torch.full((len(targets),), float(targets.shape[1]), dtype=torch.float64)
        return torch.tensor([self.task.weight(own) for own in targets], dtype=torch.float64)

    def loss_sums(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """[K] losses summed over each client's terms.

        Raises:
            CannotStackError: the task's loss is not a tensor of one entry for each client.
        """
        sums = self.task.loss_sum(output, stack(targets))
        if not isinstance(sums, Stacked) or sums.dim() != 0:
            raise CannotStackError("the task's loss is not a scalar tensor")
        return unstack(sums)

    def go_back(self, sums: torch.Tensor, totals: torch.Tensor) -> None:
        """Add each client's gradient of its mean loss: [K] sums over [K] weights.

        One scalar is differentiated, because torch imports sympy to check a gradient that it is given.
        """
        (sums / totals.to(sums.dtype)).sum().backward()

    def num_correct(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """[K] correct predictions."""
        task = self.task
        if not task.has_accuracy:
            return torch.zeros(len(targets), dtype=torch.float64)
        if isinstance(task, CrossEntropy) and self.takes_padding:
            hits = unstack(output).detach().argmax(-1) == targets
            if task.ignore_index >= 0:  # which is no class, otherwise
                hits &= targets != task.ignore_index
            return hits.flatten(1).sum(1).double()
        return torch.tensor(
            [task.num_correct(_of(output, k), own) for k, own in enumerate(targets)], dtype=torch.float64
        )


def _of(output: Any, client: int) -> Any:
    """One client's part of a model's result."""
    from torch.utils._pytree import tree_map

    def pick(leaf: Any) -> Any:
        return unstack(leaf)[client].detach() if isinstance(leaf, Stacked) else leaf

    return tree_map(pick, output)
