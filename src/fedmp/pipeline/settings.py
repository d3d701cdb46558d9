"""How a job's clients run their stages: the choices of `RunnerOptions` as a config names them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.pipeline.compression import Compression
from fedmp.pipeline.options import RunnerOptions

__all__ = ["PipelineSettings"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PipelineSettings(Component):
    """What to trade for memory, bytes or speed; the same for all clients.

    Args:
        checkpoint: keep only a stage's inputs until its backward and compute its activations again: for
            all stages (True), or for those of these numbers.
        autocast: compute in this dtype where torch thinks it safe; None computes in the weights' dtype.
        compress_activations, compress_gradients: how wide what crosses a boundary is: "none", "bf16", or
            "int8" with a scale for each channel.
    """

    checkpoint: bool | tuple[int, ...] = False
    autocast: Literal["bf16", "fp16"] | None = None
    compress_activations: Compression = Field(default="none")
    compress_gradients: Compression = Field(default="none")

    def options(self) -> RunnerOptions:
        """As the runner takes them."""
        return RunnerOptions(
            checkpoint=self.checkpoint,
            autocast=None if self.autocast is None else _DTYPES[self.autocast],
            compress_activations=self.compress_activations,
            compress_gradients=self.compress_gradients,
        )
