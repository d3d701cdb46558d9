"""A strategy of your own: gradients are clipped element by element, and the server trusts large moves less.

python examples/custom_strategy.py
"""

from dataclasses import dataclass
from functools import partial

import torch

import fedmp
from fedmp.models import MLP
from fedmp.strategy import FedAvg, check_strategy


@dataclass(frozen=True)
class Clip:
    """What clients do to their gradients; elementwise, so it holds for whatever piece of the model."""

    limit: float
    received: tuple[str, ...] = ()  # slots of the server's that come with the parameters
    kept: tuple[str, ...] = ("clipped",)  # slots that a client keeps from round to round

    def correct(self, gradient, parameter, *, start, received, kept):
        return gradient.clamp(-self.limit, self.limit)

    def keep(self, change, *, received, kept, rate_sum):
        return {"clipped": kept["clipped"] + change.abs()}  # kept in a file; survives a restart


class Clipped(FedAvg):
    """FedAvg with everything it has (cohorts, deadlines, local epochs, ...) and this rule."""

    limit: float = 0.1

    @property
    def local_rule(self):
        return Clip(self.limit)

    @property
    def server_optimizer(self):
        return partial(torch.optim.RMSprop, lr=0.01)


if __name__ == "__main__":
    check_strategy(Clipped())  # keeps every promise that fedmp relies on
    x = torch.randn(1200, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3] + x[:, 3:6].abs()).argmax(1)
    result = fedmp.Job(
        model=partial(MLP, 20, (32, 32), 3),
        topology=fedmp.Topology(clients=[{"name": name, "devices": 2} for name in ("oslo", "lima")]),
        data=(x[:1000], y[:1000], x[1000:], y[1000:]),
        strategy=Clipped(limit=0.05, local_epochs=2),
        rounds=10,
    ).run(engine="simulate")
    print(f"accuracy {result.summary.final_accuracy:.1%}")
