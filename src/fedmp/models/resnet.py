"""A small residual network with batch norm, after He et al., 2016, figure 2."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ResidualCNN"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first may halve the image."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


class ResidualCNN(nn.Module):
    """A stem and residual blocks, each but the first halving the image, then a linear head.

    Args:
        in_channels: of the images.
        widths: channels of each block.
        num_classes: outputs.
    """

    def __init__(
        self, in_channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, 1 if index == 0 else 2)
            for index, (before, after) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] images to [N, num_classes] logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]
