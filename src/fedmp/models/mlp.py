"""A multi-layer perceptron on flattened inputs."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        in_features: entries of one flattened sample.
        hidden: width of each hidden layer.
        num_classes: outputs.
    """

    def __init__(
        self, in_features: int = 784, hidden: tuple[int, ...] = (200, 200), num_classes: int = 10
    ) -> None:
        super().__init__()
        widths = (in_features, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] samples to [N, num_classes] logits."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]
