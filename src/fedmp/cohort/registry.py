"""Batched rules: how a torch function, or a layer, computes all clients of a chunk at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["BatchedRule", "CannotStackError", "batched_rule", "module_rule_of", "rule_of"]

BatchedRule = Callable[..., Any]

_OF_FUNCTIONS: dict[Any, BatchedRule] = {}
_OF_MODULES: dict[type[nn.Module], BatchedRule] = {}


class CannotStackError(Exception):
    """A model cannot be run for many clients at once; the simulator falls back to one after another."""


def batched_rule(*targets: Any) -> Callable[[BatchedRule], BatchedRule]:
    """Register how something computes many clients at once, in place of what is known of it.

    Args:
        *targets: torch functions, as `torch.overrides` knows them (`torch.nn.functional.linear`,
            `torch.Tensor.add`), or classes of modules.

    Returns:
        A decorator. The rule of a function takes the function's own arguments; that of a module takes the
        module and then what its forward takes. Tensors that differ between clients come as
        `fedmp.cohort.Stacked`, of shape [clients, ...] inside the rule; others as they are. It returns
        tensors of shape [clients, ...].

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(()))
        ...     def forward(self, x):
        ...         return x * self.factor
        >>> @batched_rule(Scale)
        ... def scale(module, x):               # x is [clients, batch, ...], the factor [clients]
        ...     return x * module.factor.view(-1, *[1] * (x.dim() - 1))
    """

    def register(rule: BatchedRule) -> BatchedRule:
        for target in targets:
            if isinstance(target, type) and issubclass(target, nn.Module):
                _OF_MODULES[target] = rule
            else:
                _OF_FUNCTIONS[target] = rule
        return rule

    return register


def rule_of(func: Any) -> BatchedRule | None:
    """The rule of a torch function, if there is one."""
    return _OF_FUNCTIONS.get(func)


def module_rule_of(module: nn.Module) -> BatchedRule | None:
    """The rule of a module's class, if there is one."""
    return _OF_MODULES.get(type(module))
