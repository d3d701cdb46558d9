"""Whether a model, its loss and its data fit each other, tried on a few samples before anything is planned."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedmp.data import Dataset
from fedmp.errors import ConfigError
from fedmp.graph import Running, watch_calls, where_it_failed
from fedmp.tasks import CrossEntropy, Task

__all__ = ["check_fit"]

_TRIED = 8


def check_fit(model: nn.Module, task: Task, train: Dataset, rows: torch.Tensor) -> None:
    """Compute the loss of a client's first samples as it would in training.

    Args:
        model: with its weights; it is not changed.
        task: the loss.
        train: everyone's samples.
        rows: the client's of them.

    Raises:
        ConfigError: the model does not take the inputs, or the loss not what the model makes of them.
    """
    inputs, targets = train.batch(rows[:_TRIED])
    alone = copy.deepcopy(model).train()
    running: Running = []
    name, given = type(model).__name__, f"inputs are {_told(inputs)} and targets {_told(targets)}"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            with watch_calls(alone, running):
                output = alone(inputs)
        except Exception as error:  # whatever the user's forward raises
            raise ConfigError(
                f"the model {name} does not fit the data: {where_it_failed(alone, running, error)}. In a batch of "
                f"{len(inputs)}, {given}; change the model or the data"
            ) from error
        _check_classes(name, task, output, train)
        try:
            task.loss_sum(output, targets)
        except Exception as error:  # or the user's loss
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(
                f"the loss {type(task).__name__} does not fit the model {name} and the data: {reason:.300}. In a batch "
                f"of {len(inputs)}, {given}, and the model's output is {_told(output)}; change the model, the loss or "
                f"the data"
            ) from error


def _check_classes(name: str, task: Task, output: object, train: Dataset) -> None:
    """Refuse classes that the model has no output for, in whatever sample they are."""
    if not isinstance(task, CrossEntropy) or not isinstance(output, torch.Tensor) or train.targets is None:
        return
    if train.targets.is_floating_point():
        return
    counted = train.targets[train.targets != task.ignore_index]
    if not len(counted):
        return
    lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0 or highest >= output.shape[-1]:
        raise ConfigError(
            f"the model {name} tells {output.shape[-1]} classes apart, 0 to {output.shape[-1] - 1}, but the targets of "
            f"the training data go from {lowest} to {highest}; give the model as many outputs as there are classes"
        )


def _told(value: object) -> str:
    """A tensor's shape and type; of anything else the type."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
