"""What a client does in one round: the same on all of its devices, whatever engine runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fedmp.learning_rate import Constant, LearningRate
from fedmp.schedule import PlacedSchedule, Schedule
from fedmp.strategy import Effort, LocalRule, Scope

__all__ = ["LocalWork"]

OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class LocalWork:
    """What a client does in one round; the same on all its devices.

    Attributes:
        optimizer: makes the client optimizer of a list of parameters.
        schedule: of the pipeline.
        batch_size: samples in one pass through the pipeline.
        num_microbatches: into which each batch is cut.
        local_epochs: passes over the client's data; a fraction rounds up to whole batches.
        local_steps: if given, so many optimizer steps instead.
        seed: the job's.
        learning_rate, num_rounds: how the rate changes over so many rounds.
        evaluate_first: evaluate the round's starting model on the client's data.
        max_gradient_norm: clip each step's gradient to this norm over the whole model; None does not.
        accumulate_batches: whose gradients make one optimizer step, as one larger batch would.
        rule: corrects the gradient before each optimizer step; None does not.
        keeps_optimizer: the optimizer's state lives on from round to round, instead of for one.
        effort: how much of all this a client does; None for all.
        scope: what of the model travels; the rule holds for those parameters alone.
    """

    optimizer: OptimizerFactory
    schedule: Schedule | PlacedSchedule
    batch_size: int
    num_microbatches: int
    local_epochs: float
    local_steps: int | None
    seed: int
    evaluate_first: bool
    learning_rate: LearningRate = field(default_factory=Constant)
    num_rounds: int = 1
    max_gradient_norm: float | None = None
    accumulate_batches: int = 1
    rule: LocalRule | None = None
    keeps_optimizer: bool = False
    effort: Effort | None = None
    scope: Scope = field(default_factory=Scope)

    def of_round(self, client: str, round: int) -> LocalWork:
        """The work of one client in one round, however much of the whole that is."""
        share = self.effort.share(client, round=round, seed=self.seed) if self.effort else 1.0
        if share == 1:
            return self
        steps = None if self.local_steps is None else max(1, math.ceil(self.local_steps * share - 1e-9))
        return replace(self, local_epochs=self.local_epochs * share, local_steps=steps)

    def num_batches(self, num_samples: int) -> int:
        """Batches in one round on so many samples."""
        if self.local_steps is not None:
            return self.local_steps * self.accumulate_batches
        return max(1, math.ceil(self.local_epochs * math.ceil(num_samples / self.batch_size) - 1e-9))

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps in one round on so many samples."""
        return math.ceil(self.num_batches(num_samples) / self.accumulate_batches)

    def num_examples(self, num_samples: int) -> int:
        """Samples processed in one round on so many samples."""
        passes, rest = divmod(self.num_batches(num_samples), math.ceil(num_samples / self.batch_size))
        return passes * num_samples + min(rest * self.batch_size, num_samples)
