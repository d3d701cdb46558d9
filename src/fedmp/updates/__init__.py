"""Updates: what a device pushes for its stage, as differences to the round's global stage.

    after - before ──Channel──▶ payload ──wire──▶ Channel ──▶ update as the coordinator has it

A `Channel` is a `Chain` of transforms bound to a model's tensors. Transforms of updates (`UpdateTransform`):
`Clip` first, then `EF21`, then any of `BFloat16`, `Float16`, `Int8`, `Int4`, `TopK`, `RandomK`, `LowRank`,
`Sign` and the user's own, then `Zstd` last.
"""

from __future__ import annotations

from fedmp.updates.cast import BFloat16, Float16
from fedmp.updates.chain import Chain
from fedmp.updates.channel import Channel, Decoded, Estimates, no_estimates
from fedmp.updates.clip import Clip
from fedmp.updates.delta import apply_update, difference, trained_names
from fedmp.updates.ef21 import EF21
from fedmp.updates.low_rank import LowRank
from fedmp.updates.quantize import Int4, Int8
from fedmp.updates.random_k import RandomK
from fedmp.updates.sign import Sign
from fedmp.updates.top_k import TopK
from fedmp.updates.transform import Encoded, Part, PayloadError, UpdateTransform
from fedmp.updates.zstd import CONTENT_ENCODING, Zstd, decompress

__all__ = [
    "CONTENT_ENCODING",
    "EF21",
    "BFloat16",
    "Chain",
    "Channel",
    "Clip",
    "Decoded",
    "Encoded",
    "Estimates",
    "Float16",
    "Int4",
    "Int8",
    "LowRank",
    "Part",
    "PayloadError",
    "RandomK",
    "Sign",
    "TopK",
    "UpdateTransform",
    "Zstd",
    "apply_update",
    "decompress",
    "difference",
    "no_estimates",
    "trained_names",
]
