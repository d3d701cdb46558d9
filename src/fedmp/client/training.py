"""Local training of a device's stages: the same batches in the same order on each device of the client."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fedmp.client.optimizer import LocalOptimizer, NamedParameters
from fedmp.client.state import ClientState
from fedmp.client.work import LocalWork
from fedmp.data import Dataset
from fedmp.data.order import one_pass
from fedmp.errors import TrainingError
from fedmp.pipeline import BatchResult, DeviceRunner, MicroBatches, microbatch_sizes
from fedmp.seeds import derive_seed

__all__ = ["LocalTrainer", "Training"]

_EVALUATION_BATCHES = 4
_NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Training:
    """What a round of local training came to.

    Attributes:
        sums: of losses over the round; known on the device of the last stage alone.
        num_steps: optimizer steps made.
        rate_sum: the sum of the coefficients with which their gradients went into the change.
        state: what the client keeps of it, by name.
    """

    sums: BatchResult
    num_steps: int
    rate_sum: float
    state: ClientState


class LocalTrainer:
    """Runs a client's local work on the stages of one of its devices.

    Args:
        runner: of these stages.
        work: what to do.
        client: the client's name, which seeds the order of its batches.
        dataset: the client's data; stages in the middle need no tensors of it.
        num_samples: of the client.
    """

    def __init__(
        self, runner: DeviceRunner, work: LocalWork, *, client: str, dataset: Dataset | None, num_samples: int
    ) -> None:
        self._runner = runner
        self._work = work
        self._client = client
        self._dataset = dataset
        self._num_samples = num_samples
        blueprints = [stage.blueprint for stage in runner.stages]
        self._indices = ", ".join(str(blueprint.index) for blueprint in blueprints)
        self._needs_inputs, self._needs_targets = blueprints[0].is_first, blueprints[-1].is_last

    def train(
        self,
        *,
        round: int,
        pulled: Mapping[str, torch.Tensor] = _NOTHING,
        state: ClientState = _NOTHING,
        on_step: Callable[[int, int, BatchResult], None] = lambda *_: None,
    ) -> Training:
        """Train for one round from the present weights.

        Args:
            round: seeds the order of the batches.
            pulled: what the coordinator handed out, for the rule.
            state: what the client kept of earlier rounds.
            on_step: called after each step with its number, the samples done so far, and the sums so far.

        Returns:
            What it came to.

        Raises:
            TrainingError: the loss is not finite, or the weights are not in the end.
            PipelineError: another device of the client is gone.
        """
        work = self._work.of_round(self._client, round)
        optimizer = LocalOptimizer(work, self._parameters(), pulled=pulled, state=state)
        # the same dropout whatever engine runs the client, however its model is cut
        self._runner.seed = derive_seed(work.seed, "noise", self._client)
        num_steps = work.num_steps(self._num_samples)
        total = BatchResult()
        samples_done = 0
        for step, batches in enumerate(self._steps(work, round)):
            optimizer.zero_grad()
            total = total + self._add_gradients(batches, round, step)
            start_s = time.perf_counter()
            optimizer.step((round - 1 + step / num_steps) / max(round, work.num_rounds))
            self._runner.note("step", start_s)
            samples_done += sum(map(len, batches))
            on_step(step, samples_done, total)
        self._check_weights(round)
        return Training(total, num_steps, optimizer.rate_sum, optimizer.kept())

    def _parameters(self) -> NamedParameters:
        """The trained parameters of all stages here; two stages may hold a copy of a tied one each."""
        pairs: dict[int, tuple[str, torch.nn.Parameter]] = {}
        for stage in self._runner.stages:
            names = [name for name, spec in stage.blueprint.state.items() if spec.requires_grad]
            for name, tensor in zip(names, stage.state_tensors(names), strict=True):
                assert isinstance(tensor, torch.nn.Parameter)
                pairs.setdefault(id(tensor), (name, tensor))
        return list(pairs.values())

    def _add_gradients(self, batches: Sequence[torch.Tensor], round: int, step: int) -> BatchResult:
        """The gradient of the mean loss over all of these batches, complete."""
        total = BatchResult()
        first = step * self._work.accumulate_batches
        weight = self._weight(batches) if len(batches) > 1 and self._needs_targets else None
        for number, indices in enumerate(batches, start=first):
            batch = self.batch(indices)
            result = self._runner.train_batch(
                batch, self._work.schedule, round=round, step=number, total_weight=weight
            )
            self._check(result, round, step)
            total = total + result
        start_s = time.perf_counter()
        self._runner.finish_gradients(round=round, step=first, max_norm=self._work.max_gradient_norm)
        self._runner.note("exchange", start_s)
        return total

    def _weight(self, batches: Sequence[torch.Tensor]) -> float:
        assert self._dataset is not None
        return sum(self._runner.task.weight(self._dataset.target_batch(indices)) for indices in batches)

    def evaluate(self, *, round: int) -> BatchResult:
        """Evaluate the present weights on all of the client's data."""
        total = BatchResult()
        size = self._work.batch_size * _EVALUATION_BATCHES
        for step, indices in enumerate(torch.arange(self._num_samples).split(size)):
            result = self._runner.evaluate_batch(self.batch(indices), round=round, step=step)
            total = total + result
        return total

    def batch(self, indices: torch.Tensor) -> MicroBatches:
        """This device's part of a batch of the client's samples."""
        sizes = microbatch_sizes(len(indices), self._work.num_microbatches)
        parts = indices.split(sizes)
        inputs = targets = None
        if self._needs_inputs:
            assert self._dataset is not None
            inputs = [(self._dataset.input_batch(part),) for part in parts]
        if self._needs_targets:
            assert self._dataset is not None
            targets = [self._dataset.target_batch(part) for part in parts]
        return MicroBatches(sizes, inputs, targets)

    def _steps(self, work: LocalWork, round: int) -> Iterator[Sequence[torch.Tensor]]:
        """The batches of each optimizer step."""
        batches = self._batches(work, round)
        while step := list(itertools.islice(batches, work.accumulate_batches)):
            yield step

    def _batches(self, work: LocalWork, round: int) -> Iterator[torch.Tensor]:
        """Indices of each batch's samples: a new permutation each pass."""
        left = work.num_batches(self._num_samples)
        epoch = 0
        while left > 0:
            order = one_pass(
                self._num_samples, seed=self._work.seed, client=self._client, round=round, epoch=epoch
            )
            for indices in order.split(self._work.batch_size)[:left]:
                left -= 1
                yield indices
            epoch += 1

    def _check(self, result: BatchResult, round: int, step: int) -> None:
        if not math.isfinite(result.loss_sum):
            raise TrainingError(
                f"the loss is {result.loss_sum} at client {self._client}, stage {self._indices}, round {round}, "
                f"step {step}; lower the learning rate (optimizer.lr) or check the client's data"
            )

    def _check_weights(self, round: int) -> None:
        """The last step's update is seen by no loss of this round."""
        for stage in self._runner.stages:
            for name, tensor in stage.owned_state().items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise TrainingError(
                        f"{name} is not finite any more at client {self._client}, stage "
                        f"{stage.blueprint.index}, after round {round}; lower the learning rate "
                        f"(optimizer.lr) or check the client's data"
                    )


def throttled(call: Callable[[], None], interval_s: float) -> Callable[[], None]:
    """`call`, but at most once in `interval_s` seconds."""
    last_s = time.monotonic()

    def maybe() -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= interval_s:
            last_s = now_s
            call()

    return maybe
