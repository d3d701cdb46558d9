"""Small reference models: an MLP, a residual CNN with batch norm, a GPT with tied embeddings, a ViT.

They are ordinary modules, written without a thought of being cut; any other module works as well.
"""

from __future__ import annotations

from fedmp.models.cnn import ResidualCNN
from fedmp.models.gpt import GPT
from fedmp.models.mlp import MLP
from fedmp.models.vit import ViT

__all__ = ["GPT", "MLP", "ResidualCNN", "ViT"]
