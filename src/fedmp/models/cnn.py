"""A small convolutional network without normalization, in the manner of McMahan et al., 2017, section 3."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["CNN"]


class CNN(nn.Module):
    """A 5x5 and a 3x3 convolution with pooling, another 3x3 one, then two fully connected layers.

    Args:
        image_size: pixels along one side; a multiple of 4.
        in_channels: of the images.
        widths: channels of the three convolutions.
        hidden: width of the first fully connected layer.
        num_classes: outputs.
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        widths: tuple[int, int, int] = (8, 16, 32),
        hidden: int = 128,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 5, padding=2)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(widths[2] * (image_size // 4) ** 2, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] images to [N, num_classes] logits."""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.head(torch.relu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]
