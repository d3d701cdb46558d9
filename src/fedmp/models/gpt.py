"""A small decoder-only transformer whose output layer is tied to its embedding (Radford et al., 2019)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GPT"]

# shapes: N samples, T tokens, D width, H heads, V vocabulary


class Block(nn.Module):
    """Pre-norm causal self-attention and a two-layer perceptron."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        """[N, T, D] to [N, T, D]."""
        num, length, width = x_ntd.shape
        heads = self.qkv(self.norm1(x_ntd)).view(num, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=rate)
        x_ntd = x_ntd + F.dropout(
            self.out(mixed.transpose(1, 2).reshape(num, length, width)), self.dropout, self.training
        )
        return x_ntd + F.dropout(self.down(F.gelu(self.up(self.norm2(x_ntd)))), self.dropout, self.training)


class GPT(nn.Module):
    """Token and position embeddings, blocks, a final norm, and logits by the token embedding.

    Args:
        vocab_size: tokens.
        max_length: longest sequence.
        width: embedding size; a multiple of `num_heads`.
        num_layers, num_heads: blocks, and attention heads of each.
        dropout: rate in training.
    """

    def __init__(
        self,
        vocab_size: int = 96,
        max_length: int = 80,
        width: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_nt: torch.Tensor) -> torch.Tensor:
        """[N, T] token indices to [N, T, V] logits of the next token."""
        positions = torch.arange(tokens_nt.shape[1], device=tokens_nt.device)
        x = self.tokens(tokens_nt) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
