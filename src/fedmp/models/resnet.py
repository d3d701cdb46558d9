"""A small residual network, after He et al., 2016, figure 2."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ResidualCNN"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first may halve the image."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels, groups)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), _norm(out_channels, groups)
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
        groups: of channels, for group norm (Wu and He, 2018), which depends neither on the size of micro-batches nor
            on whose data they hold; 0 for batch norm.
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        num_classes: int = 10,
        groups: int = 0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False),
            _norm(widths[0], groups),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, 1 if index == 0 else 2, groups)
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


def _norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)
