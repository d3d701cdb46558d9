"""What one stage computes in a step: forwards, backwards, the loss. No messages here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from fedmp.graph.deferred import LARGE_WEIGHT, WeightGradients
from fedmp.pipeline.microbatches import BatchResult
from fedmp.pipeline.options import RunnerOptions
from fedmp.pipeline.rewrite import RandomKey, defer_weight_gradients, mutated_inputs, seed_randomness
from fedmp.stages import Program, Stage
from fedmp.tasks import Task

__all__ = ["StageWork"]

_SCORED_AT_ONCE = 1 << 20
_KEPT_WHOLE = 1 << 14
# elements from which adding a gradient in place is worth a call into Python

Held = tuple[Sequence[torch.Tensor], list[Any], list[torch.Tensor] | None]


class StageWork:
    """The computation of one stage on this device.

    Args:
        stage: with weights.
        task: the loss, used on the last stage.
        options: how to compute.
        key: where random numbers come from.
    """

    def __init__(self, stage: Stage, task: Task, options: RunnerOptions, key: RandomKey) -> None:
        self.stage = stage
        self.index = stage.blueprint.index
        self.is_first, self.is_last = stage.blueprint.is_first, stage.blueprint.is_last
        self.input_gradients = [i for i, s in enumerate(stage.blueprint.train.inputs) if s.has_gradient]
        self.output_gradients = [i for i, s in enumerate(stage.blueprint.train.outputs) if s.has_gradient]
        self._task = task
        self._options = options
        self._is_checkpointed = options.checkpoints(stage.blueprint.index)
        self._key = key
        self._store = WeightGradients(is_deferred=True)
        self._at_once = WeightGradients(is_deferred=False)
        self._programs: dict[tuple[bool, bool, bool], Program] = {}
        self._mutated = mutated_inputs(stage.blueprint.train)
        self._buffers = {name for name, spec in stage.blueprint.state.items() if spec.kind == "buffer"}
        self._held: dict[int, Held] = {}
        self._state: list[torch.Tensor] = []
        self._splits = False
        self._unscored: list[tuple[Any, torch.Tensor]] = []
        self._losses: list[torch.Tensor] = []
        self._correct = 0.0
        self._scale: torch.Tensor | None = None
        self._targets: Sequence[Any] = ()

    def begin(
        self,
        targets: Sequence[Any] | None,
        *,
        training: bool,
        splits: bool = False,
        total_weight: float | None = None,
    ) -> None:
        """Start a step.

        Args:
            targets: of each micro-batch, on the last stage.
            training: train or eval mode.
            splits: whether the schedule splits the backward.
            total_weight: what the loss is divided by; None for the weight of these targets.
        """
        if self.stage.training != training:
            self.stage.train(training)
        self._splits = splits
        self._program = self._program_for(training, splits)
        self._state = self.stage.state_tensors(self._program.state)
        self._held.clear()
        self._unscored, self._losses, self._correct, self._scale = [], [], 0.0, None
        self._targets = targets or ()
        self._weight = sum(self._task.weight(part) for part in self._targets) if self.is_last else 0.0
        self._total_weight = max(self._weight if total_weight is None else total_weight, 1e-12)

    def forward(self, microbatch: int, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Compute what the next stage needs, or the loss, and keep what the backward will need."""
        for index in self.input_gradients:
            inputs[index].requires_grad_()
        if self._is_checkpointed:
            return self._forward_without_graph(microbatch, inputs)
        outputs: Sequence[torch.Tensor] = self._compute(microbatch, inputs, self._state)
        if self.is_last:
            self._held[microbatch] = inputs, [self._loss(microbatch, outputs, scored=True)], None
            return ()
        self._held[microbatch] = inputs, self._roots(outputs), None
        return outputs

    def backward(
        self, microbatch: int, gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Add to the parameters' `grad`.

        Args:
            microbatch: whose forward has run.
            gradients: of the outputs that have one; empty on the last stage.

        Returns:
            Gradients of the inputs that have one.
        """
        inputs, roots, buffers = self._held.pop(microbatch)
        if buffers is not None:
            outputs = self._compute(microbatch, inputs, buffers)
            roots = [self._loss(microbatch, outputs)] if self.is_last else self._roots(outputs)
        if self.is_last:
            gradients = [self._loss_gradient(roots[0])]
        if self._splits:
            self._store.begin(microbatch)
        kept = [at for at, root in enumerate(roots) if root is not None]
        if kept:
            torch.autograd.backward([roots[at] for at in kept], [gradients[at] for at in kept])
        return [inputs[index].grad for index in self.input_gradients]

    def backward_weight(self, microbatch: int) -> None:
        """Compute the weight gradients that a split backward left."""
        self._store.compute(microbatch)

    @property
    def keeps_for_weights(self) -> bool:
        """Whether the step's backwards leave weight gradients for later."""
        return self._splits

    def evaluate(self, microbatch: int, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Compute without gradients; the model's flat result on the last stage."""
        with torch.no_grad(), self._autocast():
            outputs: tuple[Any, ...] = self._program.module.forward(*self._state, *inputs)
        return outputs

    def score(self, result: Any, microbatch: int) -> None:
        """Add the loss and the correct predictions of one micro-batch."""
        with torch.no_grad():
            self._losses.append(self._task.loss_sum(result, self._targets[microbatch]))
        self._count_correct(result, microbatch)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own result from the last stage's flat one."""
        spec = self._program.out_spec
        return outputs[0] if spec.is_leaf() else tree_unflatten(list(outputs), spec)

    def result(self) -> BatchResult:
        """The batch's loss and correct predictions, on the last stage."""
        if not self.is_last or not self._losses:
            return BatchResult()
        self._score_the_rest()
        return BatchResult(float(torch.stack(self._losses).sum()), self._weight, self._correct)

    def abandon(self) -> None:
        """Forget a step that failed."""
        self._held.clear()
        self._store.clear()

    def _compute(self, microbatch: int, inputs: Sequence[torch.Tensor], state: list[torch.Tensor]) -> Any:
        self._key.microbatch = microbatch
        if self._mutated and not self.is_first:
            inputs = [t.clone() if index in self._mutated else t for index, t in enumerate(inputs)]
        if self._options.autocast is None:
            return self._program.module.forward(*state, *inputs)
        with self._autocast():
            return self._program.module.forward(*state, *inputs)

    def _forward_without_graph(
        self, microbatch: int, inputs: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Activation checkpointing (Chen et al., 2016): the backward computes this again, from the
        buffers as they are now, so that statistics count each micro-batch once."""
        names = self._program.state
        before = [t.clone() if n in self._buffers else t for n, t in zip(names, self._state, strict=True)]
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = self._compute(microbatch, inputs, self._state)
            if self.is_last:
                self._loss(microbatch, outputs, scored=True)
                outputs = ()
        self._held[microbatch] = inputs, [], before
        return outputs

    def _roots(self, outputs: Sequence[torch.Tensor]) -> list[Any]:
        """Where the backward starts. Of large outputs only the graph is kept: they have been sent."""
        roots: list[Any] = []
        for index in self.output_gradients:
            output = outputs[index]
            if not output.requires_grad:
                roots.append(None)
            elif output.numel() > _KEPT_WHOLE:
                roots.append(torch.autograd.graph.get_gradient_edge(output))
            else:
                roots.append(output)
        return roots

    def _loss(self, microbatch: int, outputs: Sequence[Any], *, scored: bool = False) -> torch.Tensor | None:
        result, targets = self.unflatten(outputs), self._targets[microbatch]
        with self._autocast():
            loss_sum = self._task.loss_sum(result, targets)
        if scored:
            self._losses.append(loss_sum.detach())
            self._count_correct(result, microbatch)
        return loss_sum if loss_sum.requires_grad else None

    def _loss_gradient(self, loss_sum: torch.Tensor | None) -> torch.Tensor | None:
        if loss_sum is not None and self._scale is None:
            self._scale = torch.full_like(loss_sum, 1.0 / self._total_weight, requires_grad=False)
        return self._scale

    def _count_correct(self, result: Any, microbatch: int) -> None:
        """Count at the end of the step, when this stage waits for others, unless that takes much memory."""
        targets = self._targets[microbatch]
        if (
            isinstance(result, torch.Tensor)
            and isinstance(targets, torch.Tensor)
            and result.dim() > 1
            and result.numel() * len(self._targets) < _SCORED_AT_ONCE
        ):
            self._unscored.append((result.detach(), targets))
            return
        with torch.no_grad():
            self._correct += self._task.num_correct(result, targets)

    def _score_the_rest(self) -> None:
        if not self._unscored or not self._task.has_accuracy:
            return
        results, targets = zip(*self._unscored, strict=True)
        self._unscored = []
        if len({r.shape[1:] for r in results}) == len({t.shape[1:] for t in targets}) == 1:
            results, targets = (torch.cat(results),), (torch.cat(targets),)
        with torch.no_grad():
            for result, target in zip(results, targets, strict=True):
                self._correct += self._task.num_correct(result, target)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._options.autocast is None:
            return nullcontext()
        device = self._state[0].device.type if self._state else "cpu"
        return torch.autocast(device, self._options.autocast)

    def _program_for(self, training: bool, splits: bool) -> Program:
        key = training, splits, self._key.seed is not None
        if key not in self._programs:
            program = self.stage.blueprint.program(training=training)
            if self._key.seed is not None:
                program = seed_randomness(program, self._key)
            state = self.stage.blueprint.state
            elements = {n: math.prod(s.shape) for n, s in state.items() if s.kind == "parameter"}
            if splits:
                program = defer_weight_gradients(program, self._store, elements)
            elif training:
                program = defer_weight_gradients(program, self._at_once, elements, smallest=LARGE_WEIGHT)
            self._programs[key] = program
        return self._programs[key]
