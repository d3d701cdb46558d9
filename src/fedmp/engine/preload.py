"""Imported once by the fork server, so that every device process starts with torch ready.

The first optimizer of a process imports torch's compiler stack, which takes longer than many a round;
here that happens once. Freezing the heap keeps the collector from touching, and so copying, shared pages.
"""

from __future__ import annotations

import gc
import warnings

import torch
import torch.distributed

import fedmp.client

# torch 2.13 warns about its own tree specs whenever a stage is unpickled
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
gc.collect()
gc.freeze()

__all__ = ["fedmp"]
