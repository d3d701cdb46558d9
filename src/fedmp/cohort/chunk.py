"""Local training of a chunk of clients at once: what `LocalTrainer` does for one, step by step for many.

Shape letters: K clients, P trained parameters, B samples of a batch, S batches.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedmp.cohort.batches import ChunkBatches
from fedmp.cohort.carried import Carried
from fedmp.cohort.module import StackedModule
from fedmp.cohort.objective import Objective
from fedmp.cohort.optimizers import SGD, FlatOptimizer
from fedmp.cohort.passes import Pass, Passes
from fedmp.cohort.replays import Replays, Tensors
from fedmp.cohort.samples import Samples
from fedmp.cohort.slot import Arrived, Step
from fedmp.cohort.start import RoundStart
from fedmp.data import Dataset
from fedmp.learning_rate import Constant, LearningRate, RateSum
from fedmp.strategy import LocalRule

__all__ = ["ChunkResult", "ChunkTrainer", "ChunkWork"]

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_SHORT = 8  # passes of a round that is recorded as a whole: longer ones take too long to be recorded
_WORTH_S = 0.02  # what it takes for each batch to record such a round of a small chunk
_LOOK_EVERY = 32  # steps between two looks whether to go on: a round may have a million


@dataclass(frozen=True, eq=False)
class ChunkWork:
    """What the clients of every chunk do; the fields of `LocalWork` that say so.

    Attributes:
        optimizer: of the clients; None if nothing is trained.
        objective: the loss.
        dataset: all clients' samples.
        learning_rate, num_rounds: how the rate changes over so many rounds.
        max_gradient_norm: of each client's step; None does not clip.
        accumulate_batches: whose gradients make one step.
        num_microbatches: 1 unless the samples of a batch influence each other, as in batch norm, so that it
            matters how a batch is cut.
        pads: whether shorter batches may be filled up; otherwise only clients with equally large batches
            run together.
        rule: corrects the gradient before each step; None does not.
        keeps_optimizer: the optimizer's state lives on from round to round.
        own: names of tensors that stay at each client; the rule does not hold for them.
        replays: whether a chunk's steps may be recorded and replayed.
    """

    optimizer: FlatOptimizer | None
    objective: Objective
    dataset: Dataset
    learning_rate: LearningRate
    num_rounds: int
    max_gradient_norm: float | None
    accumulate_batches: int
    num_microbatches: int
    pads: bool
    rule: LocalRule | None = None
    keeps_optimizer: bool = False
    own: frozenset[str] = frozenset()
    replays: bool = True

    @property
    def is_remembered(self) -> bool:
        """Whether clients carry anything from round to round."""
        return bool(self.keeps_optimizer or self.own or (self.rule and self.rule.kept))


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """What a chunk's round gave, besides the weights in the module; the next round of the chunk may overwrite it.

    Attributes:
        losses: [S, K] of every batch.
        figures: [4, K] what each client reports: its losses, their weights, correct predictions and learning rates,
            summed over the round; the last by the weights of `RateSum`.
        total: [P] the clients' trained parameters times their shares, summed.
        buffers: statistics alike, in the module's order.
    """

    losses: torch.Tensor
    figures: torch.Tensor
    total: torch.Tensor
    buffers: Sequence[torch.Tensor]


class ChunkTrainer:
    """Trains chunks, one after another, in the memory of one `StackedModule`.

    Args:
        module: the clients' weights.
        work: what to do.
        is_over: set when nobody waits for results any more.

    Attributes:
        carried: what the clients carry from round to round.
        passes: through the model.
        rounds: tapes of whole rounds, where these are short and alike.
    """

    def __init__(self, module: StackedModule, work: ChunkWork, is_over: threading.Event) -> None:
        self.module = module
        self.carried = Carried(module, work)
        self._work = work
        self._direct_rate = _direct_rate(work)
        self.passes = Passes(module, work.objective, replays=work.replays)
        scratch = [each.flat for each in (module.gradients, *module.state)]
        self.rounds = Replays(module, [work.objective.task, work.dataset, work.optimizer], scratch)
        self._why_not_alike = _why_not_alike(work)
        self.rounds.refusal = self.passes.replays.refusal or self._why_not_alike
        self._is_over = is_over

    def train(
        self,
        batches: ChunkBatches,
        shares: torch.Tensor,
        start: RoundStart,
        *,
        round: int,
        keep: bool = True,
        states: Sequence[Mapping[str, torch.Tensor]] = (),
    ) -> ChunkResult:
        """Train for one round.

        It ends early, with the losses so far, where one of them is not finite or nobody waits for them.

        Args:
            batches: of each client.
            shares: [K] of each client in the totals, float64.
            start: of the round.
            round: for the learning rate.
            keep: whether to leave each client's weights in the module; their sum costs less.
            states: what each client carries, where they carry anything.

        Raises:
            CannotStackError: the model cannot be run for many clients at once.
        """
        if self.rounds.refusal or not self._is_short(batches):
            return self._train(batches, shares, start, round, keep, states, self.passes.run)
        lengths = [batches.lengths] if batches.is_ragged else []
        given = [batches.rows, shares, start.parameters, *lengths, *start.statistics.values()]

        def compute(given: Tensors) -> tuple[Tensors, None]:
            rows, shares, parameters, *rest = given
            own = replace(batches, rows=rows, lengths=rest[0] if lengths else batches.lengths)
            statistics = dict(zip(start.statistics, rest[len(lengths) :], strict=True))
            begin = RoundStart(parameters, statistics, start.still)
            run = self.passes.run
            if self.rounds.is_recording:
                self.passes.replays.clear()  # which takes as much memory, and is needed no more
                run = self.passes.run_plainly
            result = self._train(own, shares, begin, round, keep, (), run)
            return [result.losses, result.figures, result.total, *result.buffers], None

        found, _ = self.rounds.run(
            (batches.sizes, keep), given, compute, worth_s=_WORTH_S * len(batches.sizes)
        )
        return ChunkResult(found[0], found[1], found[2], found[3:])

    def _train(
        self,
        batches: ChunkBatches,
        shares: torch.Tensor,
        start: RoundStart,
        round: int,
        keep: bool,
        states: Sequence[Mapping[str, torch.Tensor]],
        run: Callable[[Pass, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> ChunkResult:
        work, every, longest = self._work, self._work.accumulate_batches, len(batches.sizes)
        clients = len(batches.num_batches)
        # a client's own weights must not depend, to the last bit, on who is trained beside it; and in a long round,
        # passes of a kind of their own would be worth less than recording them costs
        is_summed = not keep and self._is_short(batches) and not self._why_not_alike
        self.module.load(start.parameters, start.statistics, clients)
        self.module.shares[:clients].copy_(shares)
        if states:
            self.carried.begin(states)
        losses = torch.zeros(longest, clients, dtype=torch.float64)
        figures = torch.zeros(4, clients, dtype=torch.float64)
        rate_weights, rates = RateSum(work.optimizer.settings if work.optimizer else {}), list[float]()
        samples = Samples(work, batches)
        for step, first in enumerate(range(0, longest, every)):
            active, group = batches.num_active(first), range(first, min(first + every, longest))
            is_last = group.stop == longest and active == clients
            kind = Step(self._direct_rate, is_summed and step == 0, is_summed and is_last)
            self.module.begin_step(kind, active, is_cleared=every > 1)
            ranges = self._add_gradients(samples, group, active, losses, figures, run)
            if work.optimizer is not None:
                lr = self._rate(batches, step, active, round)
                self._step(step, active, lr, ranges, start)
                if isinstance(lr, torch.Tensor):
                    figures[3, :active] += lr.squeeze(1).double() * rate_weights.weight()
                    rates.append(0.0)
                else:
                    rates.append(lr * rate_weights.weight())
            if step % _LOOK_EVERY == _LOOK_EVERY - 1:
                seen = losses[max(0, group.stop - _LOOK_EVERY * every) : group.stop]
                if self._is_over.is_set() or not bool(torch.isfinite(seen.sum())):
                    break
        _add_rates(figures[3], [-(-count // every) for count in batches.num_batches], rates)
        figures[0].copy_(losses.sum(0))
        return ChunkResult(losses, figures, *self._totals(shares))

    def _is_short(self, batches: ChunkBatches) -> bool:
        return len(batches.sizes) * self._work.num_microbatches <= _SHORT

    def _add_gradients(
        self,
        samples: Samples,
        group: range,
        active: int,
        losses: torch.Tensor,
        figures: torch.Tensor,
        run: Callable[[Pass, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> list[tuple[int, int]]:
        """Go through the batches of one step; returns the ranges of clients that went together."""
        drawn = [samples.passes(batch) for batch in group]
        whole = (
            samples.wholes([one for passes in drawn for one in passes], active) if len(group) > 1 else None
        )
        ranges = []
        for batch, passes in zip(group, drawn, strict=True):
            totals = samples.wholes(passes, active) if whole is None else whole
            for one in passes:
                span = slice(one.first, one.stop)
                sums, hits = run(one, totals[span])
                losses[batch, span].add_(sums)
                figures[1, span].add_(one.weights)
                figures[2, span].add_(hits)
                ranges.append((one.first, one.stop))
        return list(dict.fromkeys(ranges))

    def _totals(self, shares: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The clients' parameters, [P], and their statistics, times their shares, summed."""
        module, clients = self.module, len(shares)
        total, own = torch.empty_like(module.start), module.shares[:clients]
        arrived = module.arrived(0, clients)
        for place, span in enumerate(module.layout.slices):
            torch.mv(module.parameters.parts[place][:clients].t(), own, out=total[span])
            if arrived[place] is Arrived.SUM:  # of the last step, which the clients have not made
                total[span].sub_(module.sums[span], alpha=self._direct_rate)
        statistics = module.buffers.values()
        return total, [torch.tensordot(shares, each[:clients].double(), 1) for each in statistics]

    def _step(
        self,
        step: int,
        active: int,
        lr: float | torch.Tensor,
        ranges: Sequence[tuple[int, int]],
        start: RoundStart,
    ) -> None:
        """One step of the optimizer for the clients that are not done."""
        work, module = self._work, self.module
        assert work.optimizer is not None
        places = module.with_gradient(ranges)
        if not places:  # all have moved already
            return
        gradients = [module.gradients.parts[place][:active] for place in places]
        if work.max_gradient_norm is not None:
            squares = sum(
                (own.square().sum(1, keepdim=True) for own in gradients), gradients[0].new_zeros(active, 1)
            )
            scale = (work.max_gradient_norm / (squares.sqrt() + _EPSILON)).clamp(max=1.0)
            for own in gradients:
                own.mul_(scale)
        if work.rule is not None:
            for place in places:
                if module.layout.names[place] not in work.own:
                    self._correct(work.rule, place, active, start)
        made = self.carried.steps(active, step) if work.keeps_optimizer else step
        parameters, state = module.parameters, module.state
        is_whole = active == len(parameters.parts[0]) and len(places) == len(parameters.parts)
        if is_whole and isinstance(made, int) and isinstance(lr, float):  # no client differs from the others
            work.optimizer.step(parameters.flat, module.gradients.flat, [s.flat for s in state], made, lr)
            return
        for place, own in zip(places, gradients, strict=True):
            buffers = [buffer.parts[place][:active] for buffer in state]
            work.optimizer.step(parameters.parts[place][:active], own, buffers, made, lr)

    def _correct(self, rule: LocalRule, place: int, active: int, start: RoundStart) -> None:
        """Let a rule correct the gradients of a parameter that is the federation's."""
        gradient, span = self.module.gradients.parts[place][:active], self.module.layout.slices[place]
        corrected = rule.correct(
            gradient,
            self.module.parameters.parts[place][:active],
            start=start.parameters[span],
            received={slot: tensor[span] for slot, tensor in start.received.items()},
            kept={slot: own.parts[place][:active] for slot, own in self.carried.kept.items()},
        )
        gradient.copy_(corrected)

    def _rate(self, batches: ChunkBatches, step: int, active: int, round: int) -> float | torch.Tensor:
        """The learning rate of this step: one for all, or [K, 1] where clients are at different points."""
        work = self._work
        assert work.optimizer is not None
        if isinstance(work.learning_rate, Constant):
            return work.optimizer.lr
        rates = {}
        counts = [-(-count // work.accumulate_batches) for count in batches.num_batches[:active]]
        for count in set(counts):
            progress = (round - 1 + step / count) / max(round, work.num_rounds)
            rates[count] = work.optimizer.lr * work.learning_rate.factor(progress)
        if len(rates) == 1:
            return rates[counts[0]]
        return self.module.parameters.flat.new_tensor([[rates[count]] for count in counts])


def _add_rates(totals: torch.Tensor, num_steps: Sequence[int], rates: Sequence[float]) -> None:
    """Add to each client's total the rates of the steps that it made, the first of these."""
    sums, first = [0.0, *itertools.accumulate(rates)], 0
    for count, alike in itertools.groupby(num_steps):
        stop = first + len(list(alike))
        totals[first:stop] += sums[min(count, len(rates))]
        first = stop


def _why_not_alike(work: ChunkWork) -> str:
    """Why a round may do something else than another of the same batches; empty if it does not."""
    if not isinstance(work.learning_rate, Constant):
        return "the learning rate changes from round to round"
    if work.rule is not None or work.is_remembered:
        return "clients carry something from round to round"
    return ""


def _direct_rate(work: ChunkWork) -> float:
    """The learning rate of steps that need nothing but the gradient of one pass; 0 where they need more."""
    is_plain = isinstance(work.optimizer, SGD) and work.optimizer.is_plain
    is_plain = is_plain and isinstance(work.learning_rate, Constant)
    has_more = work.rule is not None or work.max_gradient_norm is not None or work.accumulate_batches > 1
    is_one_pass = work.pads and work.num_microbatches == 1
    return work.optimizer.lr if work.optimizer and is_plain and is_one_pass and not has_more else 0.0
