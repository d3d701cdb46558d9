"""Local training of a chunk of clients at once: what `LocalTrainer` does for one, step by step for many.

Shape letters: K clients, P trained parameters, B samples of a batch, S batches.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmp.cohort.batches import ChunkBatches
from fedmp.cohort.carried import Carried
from fedmp.cohort.module import StackedModule
from fedmp.cohort.objective import Objective
from fedmp.cohort.optimizers import FlatOptimizer
from fedmp.cohort.passes import Pass, Passes
from fedmp.cohort.start import RoundStart
from fedmp.data import Dataset
from fedmp.learning_rate import Constant, LearningRate, RateSum
from fedmp.pipeline import microbatch_sizes
from fedmp.strategy import LocalRule

__all__ = ["ChunkResult", "ChunkTrainer", "ChunkWork"]

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_DRAWN_TARGETS = 1 << 16  # at once
_DRAWN_BYTES = 1 << 20  # of inputs at once
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
    """What a chunk's clients report, [K] each, and the loss of every batch, [S, K], to find a bad one.

    The rates are summed by the weights of `RateSum`.
    """

    loss_sums: torch.Tensor
    weights: torch.Tensor
    num_correct: torch.Tensor
    rate_sums: torch.Tensor
    losses: torch.Tensor


class ChunkTrainer:
    """Trains chunks, one after another, in the memory of one `StackedModule`.

    Args:
        module: the clients' weights.
        work: what to do.
        is_over: set when nobody waits for results any more.

    Attributes:
        carried: what the clients carry from round to round.
        passes: through the model.
    """

    def __init__(self, module: StackedModule, work: ChunkWork, is_over: threading.Event) -> None:
        self.module = module
        self.carried = Carried(module, work)
        self._work = work
        self.passes = Passes(module, work.objective, replays=work.replays)
        self._is_over = is_over

    def train(self, batches: ChunkBatches, start: RoundStart, *, round: int) -> ChunkResult:
        """Train for one round from the weights in the module, which it moves.

        It ends early, with the losses so far, where one of them is not finite or nobody waits for them.

        Args:
            batches: of each client.
            start: of the round.
            round: for the learning rate.

        Raises:
            CannotStackError: the model cannot be run for many clients at once.
        """
        clients, work = len(batches.num_batches), self._work
        longest = len(batches.sizes)
        losses = torch.zeros(longest, clients, dtype=torch.float64)
        weights, correct, rates = torch.zeros(3, clients, dtype=torch.float64)
        rate_weights = RateSum(work.optimizer.settings if work.optimizer else {})
        every = work.accumulate_batches
        samples = _Samples(work, batches)
        for step, first in enumerate(range(0, longest, every)):
            active = batches.num_active(first)
            group = range(first, min(first + every, longest))
            if every > 1:
                self.module.gradients.clear(active)
            self.module.begin_step(is_cleared=every > 1)
            drawn = [self._draw(batches, samples, batch) for batch in group]
            total = None
            if every > 1:
                total = torch.zeros(active, dtype=torch.float64)
                for passes in drawn:
                    for one in passes:
                        total[one.first : one.stop] += one.weights
            ranges = []
            for batch, passes in zip(group, drawn, strict=True):
                shares = _shares(passes, clients) if total is None else total
                for one in passes:
                    span = slice(one.first, one.stop)
                    sums, hits = self.passes.run(one, shares[span])
                    losses[batch, span].add_(sums)
                    correct[span].add_(hits)
                    weights[span].add_(one.weights)
                    ranges.append((one.first, one.stop))
            if work.optimizer is not None:
                lr = self._rate(batches, step, active, round)
                self._step(step, active, lr, list(dict.fromkeys(ranges)), start)
                own = lr.squeeze(1).double() if isinstance(lr, torch.Tensor) else lr
                rates[:active] += own * rate_weights.weight()
            if step % _LOOK_EVERY == _LOOK_EVERY - 1:
                seen = losses[max(0, group.stop - _LOOK_EVERY * every) : group.stop]
                if self._is_over.is_set() or not bool(torch.isfinite(seen.sum())):
                    break
        return ChunkResult(losses.sum(0), weights, correct, rates, losses)

    def _draw(self, batches: ChunkBatches, samples: _Samples, batch: int) -> list[Pass]:
        """The passes through the model that one batch takes."""
        work, active = self._work, batches.num_active(batch)
        sizes = batches.sizes[batch]
        passes = []
        for first, stop in _runs(sizes, active, work.pads):
            for begin, width in _cuts(max(sizes[first:stop]), work.num_microbatches):
                span = slice(begin, begin + width)
                clients = slice(first, stop)
                inputs = samples.inputs(batch, clients, span)
                passes.append(Pass(first, stop, inputs, *samples.targets(batch, clients, span)))
        return passes

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


class _Samples:
    """The samples of a chunk's batches, drawn for several batches at once where these are small.

    Threads wait for each other between operations, so a few large ones are faster than many small ones.

    Args:
        work: what the clients do.
        batches: of the round.
    """

    def __init__(self, work: ChunkWork, batches: ChunkBatches) -> None:
        self._work, self._batches = work, batches
        self._inputs, self._targets = range(0), range(0)  # batches that are drawn
        sample, (_, *shape) = batches.rows[0, :1, 0], batches.rows.shape
        self._num_targets = work.dataset.target_batch(sample).numel() * math.prod(shape)
        self._num_bytes = work.dataset.input_batch(sample).nbytes * math.prod(shape)

    def inputs(self, batch: int, clients: slice, samples: slice) -> torch.Tensor:
        """[K, B, ...] inputs of some clients' samples of a batch."""
        if 2 * self._num_bytes > _DRAWN_BYTES:
            rows = self._batches.rows[batch, clients, samples]
            return _unflattened(self._work.dataset.input_batch(rows.reshape(-1)), rows.shape)
        if batch not in self._inputs:
            self._inputs = self._next(batch, _DRAWN_BYTES // self._num_bytes)
            rows = self._batches.rows[self._inputs.start : self._inputs.stop]
            drawn = self._work.dataset.input_batch(rows.reshape(-1))
            self._drawn_inputs = _unflattened(drawn, rows.shape)
        return self._drawn_inputs[batch - self._inputs.start, clients, samples].contiguous()

    def targets(self, batch: int, clients: slice, samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[K, B, ...] targets of some clients' samples of a batch, and their [K] weights."""
        if batch not in self._targets:
            self._draw_targets(batch)
        place = batch - self._targets.start
        targets = self._drawn_targets[place, clients, samples]
        if not self._work.pads:  # some of the samples only, perhaps
            return targets, self._work.objective.weights(targets)
        return targets, self._weights[place, clients]

    def _draw_targets(self, first: int) -> None:
        """Of the batches from this one on."""
        work = self._work
        self._targets = self._next(first, _DRAWN_TARGETS // self._num_targets)
        span = slice(self._targets.start, self._targets.stop)
        rows = self._batches.rows[span]
        targets = work.dataset.target_batch(rows.reshape(-1)).unflatten(0, (-1, rows.shape[2]))
        if work.pads:
            targets = work.objective.pad(targets, torch.tensor(self._batches.sizes[span]).view(-1))
            self._weights = work.objective.weights(targets).view(rows.shape[:2])
        self._drawn_targets = targets.unflatten(0, rows.shape[:2])

    def _next(self, first: int, count: int) -> range:
        return range(first, min(first + max(count, 1), len(self._batches.rows)))


def _unflattened(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return tensor.view(*shape, *tensor.shape[1:])


def _runs(sizes: Sequence[int], active: int, pads: bool) -> list[tuple[int, int]]:
    """Neighbouring clients that can run together: all, or those with equally large batches."""
    if pads:
        return [(0, active)]
    runs, first = [], 0
    for _, group in itertools.groupby(sizes[:active]):
        stop = first + len(list(group))
        runs.append((first, stop))
        first = stop
    return runs


def _cuts(size: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Where each micro-batch begins, and how wide it is."""
    cuts, begin = [], 0
    for width in microbatch_sizes(size, num_microbatches):
        cuts.append((begin, width))
        begin += width
    return cuts


def _shares(passes: Sequence[Pass], clients: int) -> torch.Tensor:
    """[K] weights of a whole batch, of the clients that have one."""
    if len(passes) == 1:
        return passes[0].weights
    total = torch.zeros(clients, dtype=torch.float64)
    for one in passes:
        total[one.first : one.stop] += one.weights
    return total
