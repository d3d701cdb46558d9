"""Local training of a device's stages: the same batches in the same order on each device of the client."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fedmp.data import Dataset
from fedmp.errors import TrainingError
from fedmp.learning_rate import Constant, LearningRate
from fedmp.pipeline import BatchResult, DeviceRunner, MicroBatches, microbatch_sizes
from fedmp.schedule import PlacedSchedule, Schedule
from fedmp.seeds import derive_seed

__all__ = ["LocalTrainer", "LocalWork"]

OptimizerFactory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
_EVALUATION_BATCHES = 4


@dataclass(frozen=True)
class LocalWork:
    """What a client does in one round; the same on all its devices.

    Attributes:
        optimizer: makes the client optimizer of a list of parameters; its state lives for one round.
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
        self, *, round: int, on_step: Callable[[int, int, BatchResult], None] = lambda *_: None
    ) -> BatchResult:
        """Train for one round from the present weights.

        Args:
            round: seeds the order of the batches.
            on_step: called after each step with its number, the samples done so far, and the sums so far.

        Returns:
            Sums over the round; known on the device of the last stage alone.

        Raises:
            TrainingError: the loss is not finite, or the weights are not in the end.
            PipelineError: another device of the client is gone.
        """
        parameters = [p for stage in self._runner.stages for p in stage.parameters() if p.requires_grad]
        optimizer = self._work.optimizer(parameters) if parameters else None
        # the same dropout whatever engine runs the client, however its model is cut
        self._runner.seed = derive_seed(self._work.seed, "noise", self._client)
        rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        num_steps = self._work.num_steps(self._num_samples)
        total = BatchResult()
        samples_done = 0
        for step, batches in enumerate(self._steps(round)):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            total = total + self._add_gradients(batches, round, step)
            if optimizer is not None:
                progress = (round - 1 + step / num_steps) / max(round, self._work.num_rounds)
                factor = self._work.learning_rate.factor(progress)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                start_s = time.perf_counter()
                optimizer.step()
                self._runner.note("step", start_s)
            samples_done += sum(map(len, batches))
            on_step(step, samples_done, total)
        self._check_weights(round)
        return total

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

    def _steps(self, round: int) -> Iterator[Sequence[torch.Tensor]]:
        """The batches of each optimizer step."""
        batches = self._batches(round)
        while step := list(itertools.islice(batches, self._work.accumulate_batches)):
            yield step

    def _batches(self, round: int) -> Iterator[torch.Tensor]:
        """Indices of each batch's samples: a new permutation each pass."""
        left = self._work.num_batches(self._num_samples)
        epoch = 0
        while left > 0:
            seed = derive_seed(self._work.seed, "batches", self._client, round, epoch)
            order = torch.randperm(self._num_samples, generator=torch.Generator().manual_seed(seed))
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
