"""What a model is trained for: a loss that adds up over micro-batches, and what counts as correct.

The gradient of a batch must not depend on how the batch is cut into micro-batches. So a loss comes as a
sum with a weight (samples, or tokens that count), and the runtime divides by the weight of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch.nn import functional as F

from fedmp.component import Component

__all__ = ["CrossEntropy", "MeanLoss", "Task", "as_task"]


@runtime_checkable
class Task(Protocol):
    """A training objective. Targets are a tensor, or whatever else the task and its data agree on."""

    @property
    def has_accuracy(self) -> bool:
        """Whether `num_correct` means anything."""
        ...

    def weight(self, targets: Any) -> float:
        """How much these targets count: the number of terms in their loss."""
        ...

    def loss_sum(self, output: Any, targets: Any) -> torch.Tensor:
        """The loss summed over its terms; a scalar."""
        ...

    def num_correct(self, output: Any, targets: Any) -> float:
        """How many of the terms are predicted correctly; 0 where that means nothing."""
        ...


class CrossEntropy(Component):
    """Classification of samples, [N, C] logits and [N] labels, or of tokens, [N, T, C] and [N, T].

    Args:
        ignore_index: targets with this value do not count.
        label_smoothing: share of each target that is spread over all classes (Szegedy et al., 2016, Rethinking
            the Inception architecture, section 7).
    """

    ignore_index: int = -100
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @property
    def has_accuracy(self) -> bool:
        """True."""
        return True

    def weight(self, targets: torch.Tensor) -> float:
        """Number of targets that count."""
        return float((targets != self.ignore_index).sum())

    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood."""
        return F.cross_entropy(
            output.flatten(0, -2),
            targets.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def num_correct(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        """Targets whose logit is the largest."""
        counted = targets != self.ignore_index
        return float(((output.argmax(-1) == targets) & counted).sum())


class MeanLoss(Component):
    """Any function (output, targets) that returns the mean over the samples.

    Args:
        function: such as `torch.nn.functional.mse_loss`.
    """

    function: Callable[[Any, torch.Tensor], torch.Tensor]

    @property
    def has_accuracy(self) -> bool:
        """False: a general loss knows no right or wrong."""
        return False

    def weight(self, targets: torch.Tensor) -> float:
        """Number of samples."""
        return float(len(targets))

    def loss_sum(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """The mean times the number of samples."""
        return self.function(output, targets) * len(targets)

    def num_correct(self, output: Any, targets: torch.Tensor) -> float:
        """Not defined for a general loss: 0."""
        return 0.0


def as_task(loss: Any) -> Task:
    """Take a task as it is, or make one of a plain loss function.

    Raises:
        ValueError: neither a task nor a function.
    """
    if isinstance(loss, Task):
        return loss
    if callable(loss):
        return MeanLoss(function=loss)
    raise ValueError(f"a loss is a Task or a function (output, targets), not {loss!r}")
