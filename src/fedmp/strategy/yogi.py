"""Yogi (Zaheer et al., 2018, Adaptive Methods for Nonconvex Optimization, algorithm 2) as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["Yogi"]


class Yogi(torch.optim.Optimizer):
    """Adam with a second moment that moves by at most (1 - beta_2) g^2 a step.

    m = beta_1 m + (1 - beta_1) g;   v = v - (1 - beta_2) g^2 sign(v - g^2);   w = w - lr m / (sqrt(v) + eps)

    Without bias correction; v begins at eps^2, as in Reddi et al. (2021), algorithm 2.

    Args:
        params: to optimise, or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
    ) -> None:
        if not (lr > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"Yogi needs lr and eps above 0 and betas in [0, 1), not {lr}, {eps}, {betas}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), eps = group["betas"], group["eps"]
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.full_like(parameter, eps**2)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        squared = gradient.square()
        square.addcmul_(squared, torch.sign(square - squared), value=-(1 - beta2))
        parameter.addcdiv_(mean, square.sqrt().add_(eps), value=-group["lr"])
