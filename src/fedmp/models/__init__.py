"""Small reference models: MLP, CNN, a residual CNN with batch norm, a GPT with tied embeddings, a ViT.

They are ordinary modules, written without a thought of being cut; any other module works as well.
"""

from __future__ import annotations

from fedmp.models.cnn import CNN
from fedmp.models.gpt import GPT
from fedmp.models.mlp import MLP
from fedmp.models.resnet import ResidualCNN
from fedmp.models.vit import ViT

__all__ = ["CNN", "GPT", "MLP", "ResidualCNN", "ViT"]
