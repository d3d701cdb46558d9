"""A small vision transformer (Dosovitskiy et al., 2021), built from `torch.nn`'s own encoder layers."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ViT"]


class ViT(nn.Module):
    """Patches, a class token, learned positions, encoder layers, and a linear head on the class token.

    Args:
        image_size, patch_size: pixels along one side; the second divides the first.
        in_channels: of the images.
        width: embedding size; a multiple of `num_heads`.
        num_layers, num_heads: encoder layers, and attention heads of each.
        num_classes: outputs.
        dropout: rate in training.
    """

    def __init__(
        self,
        image_size: int = 28,
        patch_size: int = 7,
        in_channels: int = 1,
        width: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, num_patches + 1, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] images to [N, num_classes] logits."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))  # type: ignore[no-any-return]
