"""Your own model and your own data: three sites, each with two devices, train together.

python examples/train.py
"""

from functools import partial

import torch
from torch import nn

import fedmp


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))
        self.head = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            x = x + torch.relu(layer(x))
        return self.head(x)


if __name__ == "__main__":  # each device is a process of its own and imports this file
    x = torch.randn(1500, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3] + x[:, 3:6].abs()).argmax(1)
    site = {"devices": [{"name": "gpu", "flops_per_s": 5e11}, {"name": "desktop", "flops_per_s": 2e11}]}
    result = fedmp.Job(
        model=Net,
        topology=fedmp.Topology(clients=[{"name": name, **site} for name in ("oslo", "lima", "kyoto")]),
        data=(x[:1200], y[:1200], x[1200:], y[1200:]),
        partitioner="uniform",
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        rounds=5,
    ).run(engine="local")
    print(result.model, f"accuracy {result.summary.final_accuracy:.1%}")
