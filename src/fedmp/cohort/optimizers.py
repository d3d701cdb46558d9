"""Client optimizers over many clients at once: a few operations in place on the flat parameters.

Each does exactly the arithmetic of its namesake in `torch.optim`, entry by entry, so a client ends where
it would have ended alone. Making one does not construct a torch optimizer, whose first constructor of a
process imports torch's compiler (1.5 to 2 s).

Shape letters: K clients, P parameters of one client.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

__all__ = ["SGD", "Adam", "FlatOptimizer", "flat_optimizer", "learning_rate_of"]

Rate = float | torch.Tensor


class FlatOptimizer(Protocol):
    """A rule that moves many clients' parameters by their gradients."""

    @property
    def lr(self) -> float:
        """The learning rate before any schedule."""
        ...

    @property
    def num_buffers(self) -> int:
        """Tensors of state that it keeps for each parameter."""
        ...

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of those, as in the state of a torch optimizer."""
        ...

    @property
    def counts_steps(self) -> bool:
        """Whether its steps depend on how many it made before."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """As a torch optimizer's param group has them."""
        ...

    def step(
        self,
        parameters: torch.Tensor,
        gradients: torch.Tensor,
        state: list[torch.Tensor],
        step: int | torch.Tensor,
        lr: Rate,
    ) -> None:
        """Move the parameters in place; may overwrite the gradients.

        Args:
            parameters, gradients: [K, P].
            state: `num_buffers` tensors like them; their values at step 0 are undefined.
            step: counted from 0 over all rounds that the state has seen, one for all or [K, 1].
            lr: of this step, one for all or [K, 1].
        """
        ...


@dataclass(frozen=True)
class SGD:
    """`torch.optim.SGD`."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a step takes the gradient times the learning rate from the parameters, and nothing else."""
        return not (self.momentum or self.weight_decay or self.maximize)

    @property
    def num_buffers(self) -> int:
        """The momentum."""
        return len(self.state_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        """That of the momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def counts_steps(self) -> bool:
        """False."""
        return False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its fields."""
        return asdict(self)

    def step(
        self,
        parameters: torch.Tensor,
        gradients: torch.Tensor,
        state: list[torch.Tensor],
        step: int | torch.Tensor,
        lr: Rate,
    ) -> None:
        """One step of all clients."""
        if self.maximize:
            gradients.neg_()
        if self.weight_decay:
            gradients.add_(parameters, alpha=self.weight_decay)
        direction = gradients
        if self.momentum:
            (momentum,) = state
            if isinstance(step, torch.Tensor):  # fresh ones are zeros, to which dampening does not apply
                fresh = torch.where(step == 0, 1.0, 1 - self.dampening).to(gradients.dtype)
                momentum.mul_(self.momentum).addcmul_(gradients, fresh)
            elif step == 0:
                momentum.copy_(gradients)
            else:
                momentum.mul_(self.momentum).add_(gradients, alpha=1 - self.dampening)
            direction = gradients.add_(momentum, alpha=self.momentum) if self.nesterov else momentum
        if isinstance(lr, torch.Tensor):
            parameters.addcmul_(direction, lr, value=-1)
        else:
            parameters.add_(direction, alpha=-lr)


@dataclass(frozen=True)
class Adam:
    """`torch.optim.Adam`, or `torch.optim.AdamW` where the weight decay is decoupled."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = False

    @property
    def num_buffers(self) -> int:
        """Both moments, and the largest second one."""
        return len(self.state_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of these."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + self.amsgrad]

    @property
    def counts_steps(self) -> bool:
        """True: young moments are too small, by a known factor."""
        return True

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its fields."""
        return asdict(self)

    def step(
        self,
        parameters: torch.Tensor,
        gradients: torch.Tensor,
        state: list[torch.Tensor],
        step: int | torch.Tensor,
        lr: Rate,
    ) -> None:
        """One step of all clients."""
        if isinstance(step, int) and step == 0:
            for buffer in state:
                buffer.zero_()
        first, second = state[0], state[1]
        if self.maximize:
            gradients.neg_()
        if self.weight_decay and self.decoupled:
            parameters.mul_(1 - lr * self.weight_decay)
        elif self.weight_decay:
            gradients.add_(parameters, alpha=self.weight_decay)
        first.lerp_(gradients, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
        root = second
        if self.amsgrad:
            root = torch.maximum(state[2], second, out=state[2])
        step_size, correction = self._corrected(step, lr, parameters.dtype)
        # the gradients are used up: their memory takes the denominator
        denominator = torch.sqrt(root, out=gradients).div_(correction).add_(self.eps)
        if isinstance(step_size, torch.Tensor):
            parameters.sub_(torch.div(first, denominator, out=gradients).mul_(step_size))
        else:
            parameters.addcdiv_(first, denominator, value=-step_size)

    def _corrected(self, step: int | torch.Tensor, lr: Rate, dtype: torch.dtype) -> tuple[Rate, Rate]:
        """The step size and the second moments' divisor, for moments of this age."""
        if isinstance(step, int):
            step_size = lr / (1 - self.betas[0] ** (step + 1))
            return step_size, math.sqrt(1 - self.betas[1] ** (step + 1))
        sizes = lr / (1 - self.betas[0] ** (step + 1))
        return sizes.to(dtype), (1 - self.betas[1] ** (step + 1)).sqrt().to(dtype)


def flat_optimizer(factory: Callable[..., Any]) -> FlatOptimizer | None:
    """The flat optimizer that does what a factory's torch optimizer would; None if there is none.

    Args:
        factory: makes a torch optimizer of a list of parameters. A `functools.partial` of a class is
            understood as it is; anything else is called once, with a parameter of its own.
    """
    found = _read(factory)
    if found is None:
        return None
    kind, settings = found
    ignored = {"foreach", "fused", "capturable", "differentiable"}
    settings = {name: value for name, value in settings.items() if name not in ignored}
    if isinstance(settings.get("lr"), torch.Tensor):
        settings["lr"] = float(settings["lr"])
    makers: dict[type, Callable[..., FlatOptimizer]] = {
        torch.optim.SGD: SGD,
        torch.optim.Adam: functools.partial(_adam, decoupled=False, weight_decay=0.0),
        torch.optim.AdamW: functools.partial(_adam, decoupled=True, weight_decay=1e-2),
    }
    if kind not in makers:
        return None
    try:
        return makers[kind](**settings)
    except TypeError:  # an option of a newer torch that is not known here
        return None


def learning_rate_of(optimizer: FlatOptimizer | None) -> float:
    """The learning rate before any schedule; 0 where there is nothing to train."""
    return optimizer.lr if optimizer is not None else 0.0


def _adam(*, decoupled: bool, weight_decay: float, **settings: Any) -> Adam:
    decoupled = settings.pop("decoupled_weight_decay", decoupled)
    return Adam(**{"weight_decay": weight_decay, **settings}, decoupled=decoupled)


def _read(factory: Callable[..., Any]) -> tuple[type, Mapping[str, Any]] | None:
    """The class that a factory makes and its settings."""
    plain = getattr(factory, "factory", factory)
    if isinstance(plain, functools.partial) and isinstance(plain.func, type) and not plain.args:
        known = inspect.signature(plain.func).parameters
        if set(plain.keywords) <= set(known):
            return plain.func, dict(plain.keywords)
    if isinstance(plain, type):
        return plain, {}
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    groups = optimizer.param_groups
    if len(groups) != 1:
        return None
    return type(optimizer), {name: value for name, value in groups[0].items() if name != "params"}
