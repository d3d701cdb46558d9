"""Run one stage of a pipeline: the interpreter of a schedule's action list.

Each device runs the same steps on its own stage. Receives are posted ahead of their use, sends overlap
with computation, and the loss of a micro-batch is weighted by its share of the batch, so the gradient is
that of the whole batch for every batch size and every number of micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from fedmp.errors import PipelineError
from fedmp.pipeline.frames import BufferPool, FrameKind, FrameLayout, FrameTag, pack, unpack
from fedmp.pipeline.transport import Pending, Transport
from fedmp.records import TimedAction
from fedmp.schedule import Action, ActionKind, Schedule
from fedmp.stages import Stage, ValueSpec
from fedmp.tasks import Task

__all__ = ["BatchResult", "MicroBatches", "StageRunner", "microbatch_sizes"]

_LOOKAHEAD = 2


def microbatch_sizes(batch_size: int, num_microbatches: int) -> list[int]:
    """Cut a batch into micro-batches as equal as possible, none of them empty.

    Example:
        >>> microbatch_sizes(7, 3)
        [3, 2, 2]
    """
    count = min(batch_size, num_microbatches)
    return [batch_size // count + (index < batch_size % count) for index in range(count)]


@dataclass(frozen=True)
class MicroBatches:
    """One batch, cut up.

    Attributes:
        sizes: samples of each micro-batch; known to every stage.
        inputs: tensors of each micro-batch; only the first stage has them.
        targets: of each micro-batch; only the last stage has them.
    """

    sizes: Sequence[int]
    inputs: Sequence[Sequence[torch.Tensor]] | None = None
    targets: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class BatchResult:
    """What the last stage knows after a batch; zeros on the other stages.

    Attributes:
        loss_sum: loss summed over its terms.
        weight: number of terms.
        num_correct: terms predicted correctly.
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    num_correct: float = 0.0

    def __add__(self, other: BatchResult) -> BatchResult:
        return BatchResult(
            self.loss_sum + other.loss_sum, self.weight + other.weight, self.num_correct + other.num_correct
        )


@dataclass
class _Step:
    """What one step keeps until it is over."""

    round: int
    step: int
    batch: MicroBatches
    sends: list[tuple[Pending, torch.Tensor]] = field(default_factory=list)
    arriving: dict[tuple[FrameKind, int], tuple[Pending, torch.Tensor]] = field(default_factory=dict)
    unposted: dict[FrameKind, list[int]] = field(default_factory=dict)
    held: dict[int, tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]] = field(
        default_factory=dict
    )
    total_weight: float = 1.0
    loss_sum: torch.Tensor | float = 0.0
    num_correct: float = 0.0


class StageRunner:
    """Trains and evaluates one stage in step with the client's other stages.

    Args:
        stage: this device's stage, with weights.
        task: the loss; used on the last stage.
        transport: to the other stages; None if the model is one stage.
        observe: called with every timed action; None measures nothing.
        device_name: for the timed actions.
    """

    def __init__(
        self,
        stage: Stage,
        task: Task,
        transport: Transport | None = None,
        *,
        observe: Callable[[TimedAction], None] | None = None,
        device_name: str = "",
    ) -> None:
        blueprint = stage.blueprint
        if transport is None and blueprint.num_stages > 1:
            raise ValueError(f"{blueprint.num_stages} stages need a transport between them")
        self.stage = stage
        self.bytes_sent = 0
        self.observe = observe
        self._task = task
        self._transport = transport
        self._device_name = device_name
        self._index = blueprint.index
        self._is_first, self._is_last = blueprint.is_first, blueprint.is_last
        self._pool = BufferPool(transport.device if transport else torch.device("cpu"))
        self._layouts: dict[tuple[str, bool, int], FrameLayout] = {}
        self._actions: dict[tuple[str, int], list[Action]] = {}

    def train_batch(self, batch: MicroBatches, schedule: Schedule, *, round: int, step: int) -> BatchResult:
        """Add the gradient of one batch's mean loss to the parameters' `grad`.

        Args:
            batch: this stage's part of it.
            schedule: the same on all stages.
            round, step: what the frames carry; the same on all stages.

        Returns:
            The batch's loss, on the last stage.

        Raises:
            PipelineError: a peer is gone, silent, or sent what does not belong here.
        """
        self.stage.train()
        current = self._begin(batch, round, step)
        sizes = batch.sizes
        actions = self._actions_of(schedule, len(sizes))
        self._post(current, actions, training=True)
        for action in actions:
            if action.kind is ActionKind.FORWARD:
                self._forward(current, action.microbatch, sizes[action.microbatch])
            else:
                self._backward(current, action.microbatch, sizes[action.microbatch])
        self._sum_tied_gradients(current)
        self._finish(current)
        return self._result(current)

    def evaluate_batch(
        self,
        batch: MicroBatches,
        *,
        round: int,
        step: int,
        keep_outputs: Callable[[Any], None] | None = None,
    ) -> BatchResult:
        """Run one batch forward in eval mode, without gradients.

        Args:
            batch: this stage's part of it; targets may be missing.
            round, step: what the frames carry; the same on all stages.
            keep_outputs: called on the last stage with the model's result for each micro-batch.

        Returns:
            The batch's loss and correct predictions, on the last stage, if it has targets.
        """
        self.stage.eval()
        current = self._begin(batch, round, step)
        actions = [Action(ActionKind.FORWARD, index) for index in range(len(batch.sizes))]
        with torch.no_grad():
            self._post(current, actions, training=False)
            for action in actions:
                inputs = self._take_inputs(current, action.microbatch, training=False)
                outputs = self._timed("forward", action.microbatch, lambda: self.stage.run(inputs))  # noqa: B023
                if not self._is_last:
                    self._send_activation(current, action.microbatch, outputs, training=False)
                    continue
                result = tree_unflatten(list(outputs), self.stage.blueprint.out_spec)
                if keep_outputs is not None:
                    keep_outputs(result)
                if batch.targets is not None:
                    self._score(current, result, batch.targets[action.microbatch])
        self._finish(current)
        return self._result(current)

    def _begin(self, batch: MicroBatches, round: int, step: int) -> _Step:
        current = _Step(round, step, batch)
        if self._is_last and batch.targets is not None:
            current.total_weight = sum(self._task.weight(targets) for targets in batch.targets)
        return current

    def _actions_of(self, schedule: Schedule, num_microbatches: int) -> list[Action]:
        key = (schedule.name, num_microbatches)
        if key not in self._actions:
            num_stages = self.stage.blueprint.num_stages
            self._actions[key] = schedule.actions(num_stages, num_microbatches)[self._index]
        return self._actions[key]

    def _forward(self, current: _Step, microbatch: int, size: int) -> None:
        inputs = self._take_inputs(current, microbatch, training=True)
        outputs = self._timed("forward", microbatch, lambda: self.stage.run(inputs))
        buffer = current.arriving.pop((FrameKind.ACTIVATION, microbatch), (None, None))[1]
        if not self._is_last:
            self._send_activation(current, microbatch, outputs, training=True)
            kept = [
                value
                for value, spec in zip(outputs, self.stage.blueprint.train.outputs, strict=True)
                if spec.has_gradient
            ]
            current.held[microbatch] = (inputs, kept, buffer)
            return
        assert current.batch.targets is not None
        targets = current.batch.targets[microbatch]
        result = tree_unflatten(list(outputs), self.stage.blueprint.out_spec)
        loss_sum = self._task.loss_sum(result, targets)
        current.loss_sum = current.loss_sum + loss_sum.detach()
        with torch.no_grad():
            current.num_correct += self._task.num_correct(result, targets)
        current.held[microbatch] = (inputs, [loss_sum / max(current.total_weight, 1e-12)], buffer)

    def _backward(self, current: _Step, microbatch: int, size: int) -> None:
        inputs, roots, buffer = current.held.pop(microbatch)
        gradients: list[torch.Tensor | None] = [None]
        gradient_buffer = None
        if not self._is_last:
            specs = _with_gradient(self.stage.blueprint.train.outputs)
            if specs:
                frame = self._take(current, FrameKind.GRADIENT, microbatch, self._layout("gradient", True, size))
                gradients = list(frame)
                gradient_buffer = current.arriving.pop((FrameKind.GRADIENT, microbatch))[1]
        pairs = [pair for pair in zip(roots, gradients, strict=False) if pair[0].requires_grad]
        if pairs:
            self._timed(
                "backward",
                microbatch,
                lambda: torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs]),
            )
        if not self._is_first:
            wanted = zip(inputs, self.stage.blueprint.train.inputs, strict=True)
            sent = [tensor.grad for tensor, spec in wanted if spec.has_gradient]
            if sent:
                layout = self._input_layout("gradient", True, size)
                self._send(current, FrameKind.GRADIENT, microbatch, layout, sent, self._index - 1)
        for used in (buffer, gradient_buffer):
            if used is not None:
                self._pool.give_back(used)

    def _take_inputs(self, current: _Step, microbatch: int, *, training: bool) -> list[torch.Tensor]:
        if self._is_first:
            assert current.batch.inputs is not None
            return list(current.batch.inputs[microbatch])
        layout = self._input_layout("activation", training, current.batch.sizes[microbatch])
        tensors = self._take(current, FrameKind.ACTIVATION, microbatch, layout)
        if training:
            for tensor, spec in zip(tensors, self.stage.blueprint.train.inputs, strict=True):
                if spec.has_gradient:
                    tensor.requires_grad_()
        return tensors

    def _send_activation(
        self, current: _Step, microbatch: int, outputs: Sequence[torch.Tensor], *, training: bool
    ) -> None:
        layout = self._layout("activation", training, current.batch.sizes[microbatch])
        with torch.no_grad():
            self._send(current, FrameKind.ACTIVATION, microbatch, layout, outputs, self._index + 1)

    def _score(self, current: _Step, result: Any, targets: torch.Tensor) -> None:
        current.loss_sum = current.loss_sum + self._task.loss_sum(result, targets)
        current.num_correct += self._task.num_correct(result, targets)

    def _result(self, current: _Step) -> BatchResult:
        if not self._is_last or current.batch.targets is None:
            return BatchResult()
        return BatchResult(float(current.loss_sum), current.total_weight, current.num_correct)

    # transfers

    def _post(self, current: _Step, actions: Sequence[Action], *, training: bool) -> None:
        """Line up what this stage will receive, and post the first of it."""
        if not self._is_first:
            current.unposted[FrameKind.ACTIVATION] = [
                action.microbatch for action in actions if action.kind is ActionKind.FORWARD
            ][::-1]
        if training and not self._is_last and _with_gradient(self.stage.blueprint.train.outputs):
            current.unposted[FrameKind.GRADIENT] = [
                action.microbatch for action in actions if action.kind is ActionKind.BACKWARD
            ][::-1]
        for kind in current.unposted:
            for _ in range(_LOOKAHEAD):
                self._post_next(current, kind, training=training)

    def _post_next(self, current: _Step, kind: FrameKind, *, training: bool) -> None:
        if not current.unposted.get(kind):
            return
        microbatch = current.unposted[kind].pop()
        size = current.batch.sizes[microbatch]
        if kind is FrameKind.ACTIVATION:
            layout, peer = self._input_layout("activation", training, size), self._index - 1
        else:
            layout, peer = self._layout("gradient", True, size), self._index + 1
        buffer = self._pool.take(layout.num_bytes)
        assert self._transport is not None
        current.arriving[kind, microbatch] = (
            self._transport.receive(buffer, peer, _tag(kind, microbatch)),
            buffer,
        )

    def _take(
        self, current: _Step, kind: FrameKind, microbatch: int, layout: FrameLayout
    ) -> list[torch.Tensor]:
        pending, buffer = current.arriving[kind, microbatch]
        self._timed("wait", microbatch, pending.wait)
        self._post_next(current, kind, training=self.stage.training)
        return unpack(buffer, layout, self._frame_tag(current, kind, microbatch))

    def _send(
        self,
        current: _Step,
        kind: FrameKind,
        microbatch: int,
        layout: FrameLayout,
        tensors: Sequence[torch.Tensor | None],
        peer: int,
    ) -> None:
        assert self._transport is not None
        buffer = self._pool.take(layout.num_bytes)
        pack(buffer, layout, self._frame_tag(current, kind, microbatch), tensors)
        current.sends.append((self._transport.send(buffer, peer, _tag(kind, microbatch)), buffer))
        self.bytes_sent += layout.num_bytes

    def _sum_tied_gradients(self, current: _Step) -> None:
        """Give every stage that uses a tied parameter the sum of the gradients, added in stage order."""
        shared = self.stage.blueprint.shared
        for number, name in enumerate(sorted(shared)):
            parameter = self.stage.state_tensors([name])[0]
            layout = FrameLayout([tuple(parameter.shape)], [parameter.dtype])
            peers = [stage for stage in shared[name] if stage != self._index]
            incoming = {}
            assert self._transport is not None
            for peer in peers:
                buffer = self._pool.take(layout.num_bytes)
                tag = _tag(FrameKind.TIED_GRADIENT, number)
                incoming[peer] = (self._transport.receive(buffer, peer, tag), buffer)
            for peer in peers:
                self._send(current, FrameKind.TIED_GRADIENT, number, layout, [parameter.grad], peer)
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            total = torch.zeros_like(parameter)
            for stage in shared[name]:
                if stage == self._index:
                    total += own
                    continue
                pending, buffer = incoming[stage]
                self._timed("wait", -1, pending.wait)
                tag_wanted = self._frame_tag(current, FrameKind.TIED_GRADIENT, number)
                total += unpack(buffer, layout, tag_wanted)[0]
                self._pool.give_back(buffer)
            parameter.grad = total

    def _finish(self, current: _Step) -> None:
        for pending, buffer in current.sends:
            self._timed("wait", -1, pending.wait)
            self._pool.give_back(buffer)
        for pending, buffer in current.arriving.values():
            if self.stage.training:
                raise PipelineError("the schedule left a message unread")
            self._pool.give_back(buffer)

    def _frame_tag(self, current: _Step, kind: FrameKind, microbatch: int) -> FrameTag:
        assert self._transport is not None
        return FrameTag(self._transport.generation, current.round, current.step, microbatch, kind)

    def _layout(self, what: str, training: bool, size: int) -> FrameLayout:
        return self._cached_layout(f"out {what}", training, size, "outputs")

    def _input_layout(self, what: str, training: bool, size: int) -> FrameLayout:
        return self._cached_layout(f"in {what}", training, size, "inputs")

    def _cached_layout(self, what: str, training: bool, size: int, side: str) -> FrameLayout:
        key = (what, training, size)
        if key not in self._layouts:
            specs = getattr(self.stage.blueprint.program(training=training), side)
            wanted = _with_gradient(specs) if what.endswith("gradient") else specs
            self._layouts[key] = FrameLayout.of(wanted, size)
        return self._layouts[key]

    def _timed(self, kind: str, microbatch: int, work: Callable[[], Any]) -> Any:
        if self.observe is None:
            return work()
        start_s = time.perf_counter()
        result = work()
        stop_s = time.perf_counter()
        self.observe(
            TimedAction(
                device=self._device_name,
                stage=self._index,
                kind=kind,
                microbatch=microbatch,
                start_s=start_s,
                stop_s=stop_s,
            )
        )
        return result


def _with_gradient(specs: Sequence[ValueSpec]) -> tuple[ValueSpec, ...]:
    return tuple(spec for spec in specs if spec.has_gradient)


def _tag(kind: FrameKind, microbatch: int) -> int:
    return microbatch * 4 + int(kind)
