"""Whether a model can be trained for many clients at once, found by trying it on two of them.

The model's own gradient on one client's batch is the oracle: what the stacked model gives must be the same,
with and without padding beside. Nothing of what the user's forward does has to be understood for that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedmp.cohort.module import FlatLayout, StackedModule, own_statistics
from fedmp.cohort.objective import Objective
from fedmp.cohort.registry import CannotStackError
from fedmp.tasks import Task

__all__ = ["Probe", "cutting_matters", "is_close", "probe"]

_TOLERANCE = 1e-3  # of the largest entry; sums in another order differ by 1e-6, another formula by far more


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        refusal: why the model cannot be trained for many clients at once; empty if it can.
        mixes_samples: whether samples of a batch influence each other, as in batch norm.
        activation_bytes: what autograd keeps for one client's batch.
    """

    refusal: str = ""
    mixes_samples: bool = False
    activation_bytes: int = 0


def probe(
    model: nn.Module,
    layout: FlatLayout,
    task: Task,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    draws_noise: bool,
) -> Probe:
    """Try a model out.

    Args:
        model: one client's; it is not changed.
        layout: of its trained parameters.
        task: the loss.
        inputs, targets: a batch of one client, of any size.
        draws_noise: whether random numbers in the forward (dropout) are acceptable; they are others than
            the client would draw alone.
    """
    objective = Objective(task)
    alone = copy.deepcopy(model).train()
    state = torch.get_rng_state()
    try:
        expected = _alone(alone, task, inputs, targets)
        is_random = not torch.equal(state, torch.get_rng_state())
        if is_random and not draws_noise:
            return Probe("its forward draws random numbers (dropout?), and each client has its own")
        if layout.size == 0:
            return Probe("it has no trained parameters")
        with _counted() as kept:
            plain = _stacked(model, layout, objective, inputs, targets, padding=0)
        if not is_random and not is_close(plain, expected, _TOLERANCE):
            return Probe("run for many clients at once, its gradient is not the one of a client alone")
        mixes = bool(own_statistics(model)) or not objective.takes_padding
        if not mixes and not is_random and len(inputs) > 1:
            padded = _stacked(model, layout, objective, inputs, targets, padding=1)
            mixes = not is_close(padded, expected, _TOLERANCE)
    except CannotStackError as error:
        return Probe(str(error))
    finally:
        torch.set_rng_state(state)
    return Probe(mixes_samples=mixes, activation_bytes=kept.num_bytes // 2)


def cutting_matters(model: nn.Module, task: Task, inputs: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether a batch's gradient depends on how the batch is cut into micro-batches.

    It does where samples of a batch influence each other (batch norm), and where random numbers are drawn (dropout).

    Args:
        model: one client's; it is not changed.
        task: the loss.
        inputs, targets: a batch; whether cutting one of fewer than four samples matters is not known.
    """
    if len(inputs) < 4:
        return True
    state = torch.get_rng_state()
    try:
        whole = _alone(copy.deepcopy(model).train(), task, inputs, targets)
        if not torch.equal(state, torch.get_rng_state()):
            return True
        half, total = len(inputs) // 2, task.weight(targets)
        parts = torch.zeros_like(whole)
        for part in (slice(0, half), slice(half, None)):
            own = _alone(copy.deepcopy(model).train(), task, inputs[part], targets[part])
            parts += own * (task.weight(targets[part]) / total)
        return not is_close(parts, whole, _TOLERANCE)
    finally:
        torch.set_rng_state(state)


def _alone(model: nn.Module, task: Task, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of the plain model's mean loss, flat."""
    loss = task.loss_sum(model(inputs), targets) / task.weight(targets)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    rows = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([row.flatten() for row in rows]) if rows else torch.zeros(0)


def _stacked(
    model: nn.Module,
    layout: FlatLayout,
    objective: Objective,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    padding: int,
) -> torch.Tensor:
    """The same for the first of two clients; the second has the samples in another order."""
    module = StackedModule(model, layout, 2, 0)
    start = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in layout.names])
    module.load(start, {name: tensor.detach() for name, tensor in own_statistics(model).items()}, 2)
    order = torch.arange(len(inputs))
    rows = torch.stack([order, order.flip(0)])
    if padding:  # of the second client's samples, which must not matter to the first
        rows = torch.cat([rows, rows[:, :1].flip(0).expand(2, padding)], dim=1)
    x, y = inputs[rows.flatten()].unflatten(0, rows.shape), targets[rows.flatten()].unflatten(0, rows.shape)
    if padding:
        y = objective.pad(y, torch.tensor([len(inputs)] * 2))
    module.begin_step()
    sums = objective.loss_sums(module.run(x, 0, 2), y)
    objective.go_back(sums, objective.weights(y))
    module.collect(0, 2)
    written = module.with_gradient([(0, 2)])
    parts = enumerate(module.gradients.parts)
    return torch.cat([part[0] if place in written else torch.zeros_like(part[0]) for place, part in parts])


def is_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same up to a share of the largest entry."""
    if torch.equal(actual, expected):
        return True
    actual, expected = actual.double(), expected.double()
    largest = float(expected.abs().max())
    atol = tolerance * max(largest, 1e-12)
    return math.isfinite(largest) and torch.allclose(actual, expected, rtol=0, atol=atol)


class _counted:  # noqa: N801
    """Counts the bytes that autograd saves, each storage once."""

    def __enter__(self) -> _counted:
        self._sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        unpack: Callable[[Any], Any] = lambda tensor: tensor  # noqa: E731
        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())
