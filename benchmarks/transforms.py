"""Speed and size of update transforms: GB/s of float32 encoded and decoded on one thread, and bytes before and after.

Encoding takes in error feedback: adding the residual, decoding, keeping what was lost. The target is the speed of
a 1 Gbit/s link, 0.125 GB/s, so that compressing never takes longer than sending would have. Beside the time that passed
stands the processor's, which a busy machine lengthens less: nearly all that is measured computes on one thread.

    python benchmarks/transforms.py [--numbers 4000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmp.client.body import update_body
from fedmp.records import DeviceReport
from fedmp.updates import (
    EF21,
    BFloat16,
    Chain,
    Float16,
    Int4,
    Int8,
    LowRank,
    Part,
    RandomK,
    Sign,
    TopK,
    Zstd,
    decompress,
)

_LINK_GB_PER_S = 0.125
_REPEATS = 5

_CHAINS: dict[str, list[Any]] = {
    "bf16": [BFloat16()],
    "fp16": [Float16()],
    "int8": [Int8()],
    "int4": [Int4()],
    "topk 10 %": [TopK(fraction=0.1)],
    "topk 1 %": [TopK(fraction=0.01)],
    "ef21, topk 1 %": [EF21(), TopK(fraction=0.01)],
    "topk 0.1 %": [TopK(fraction=0.001)],
    "randomk 10 %": [RandomK(fraction=0.1)],
    "randomk 1 %": [RandomK(fraction=0.01)],
    "lowrank 1": [LowRank(rank=1)],
    "lowrank 4": [LowRank(rank=4)],
    "sign": [Sign()],
    "topk 1 %, int8": [TopK(fraction=0.01), Int8()],
    "topk 1 %, int8, zstd": [TopK(fraction=0.01), Int8(), Zstd()],
    "lowrank 4, int8": [LowRank(rank=4), Int8()],
    "int8, zstd": [Int8(), Zstd()],
    "int4, zstd": [Int4(), Zstd()],
    "zstd": [Zstd()],
}


def main() -> None:
    """Measure every transform and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=4_000_000, help="float32 numbers in the update")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensor = _update(options.numbers)
    rows = [_measure(name, transforms, tensor) for name, transforms in _CHAINS.items()]
    print(f"one tensor of {tensor.numel():,} float32 numbers ({tensor.nbytes / 1e6:.0f} MB), one thread")
    print(
        f"{'transforms':<22}{'encode GB/s':>12}{'by CPU time':>12}{'decode GB/s':>12}{'times fewer bytes':>19}"
    )
    for row in rows:
        slow = "" if row["encode_gb_per_s"] >= _LINK_GB_PER_S else "  slower than 1 Gbit/s"
        print(
            f"{row['transforms']:<22}{row['encode_gb_per_s']:>12.2f}{row['encode_cpu_gb_per_s']:>12.2f}"
            f"{row['decode_gb_per_s']:>12.2f}"
            f"{row['ratio']:>19.1f}{slow}"
        )
    if options.json:
        options.json.write_text(json.dumps({"numbers": tensor.numel(), "rows": rows}, indent=2))


def _update(count: int) -> torch.Tensor:
    """A matrix with numbers as those of an update are spread: many small ones, few large ones."""
    rows = int(count**0.5)
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, count // rows, generator=random)
    return normal * normal.abs() * 1e-3


def _measure(name: str, transforms: list[Any], tensor: torch.Tensor) -> dict[str, Any]:
    """Best of several rounds, as one after another would be: with the state of the one before."""
    chain, spec = Chain(transforms), Part(tuple(tensor.shape), tensor.dtype)
    kept: dict[str, Any] = {"state": chain.encode(tensor, state={}, seed=0).state}
    report = DeviceReport(num_examples=1)
    plain = update_body({"weight": tensor}, report)

    def encode() -> None:
        encoded = chain.encode(tensor, state=kept["state"], seed=1)
        kept["state"], kept["parts"] = encoded.state, encoded.parts
        if chain.zstd is not None:
            kept["body"] = update_body(dict(encoded.parts), report, chain.zstd)

    def decode() -> None:
        if chain.zstd is not None and kept["body"].is_compressed:
            for _ in decompress([kept["body"].content], max_bytes=2 * len(plain.content)):
                pass
        chain.decode(kept["parts"], spec, seed=1)

    encode_s, encode_cpu_s = _best_s(encode)
    decode_s, _ = _best_s(decode)
    body = update_body(dict(kept["parts"]), report, chain.zstd)
    return {
        "transforms": name,
        "encode_gb_per_s": tensor.nbytes / encode_s / 1e9,
        "encode_cpu_gb_per_s": tensor.nbytes / encode_cpu_s / 1e9,
        "decode_gb_per_s": tensor.nbytes / decode_s / 1e9,
        "ratio": len(plain.content) / len(body.content),
    }


def _best_s(call: Callable[[], None]) -> tuple[float, float]:
    """The shortest of some times: seconds that passed, and seconds of the processor."""
    passed, computed = [], []
    for _ in range(_REPEATS):
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        call()
        passed.append(time.perf_counter() - start_s)
        computed.append(time.process_time() - cpu_start_s)
    return max(min(passed), 1e-9), max(min(computed), 1e-9)


if __name__ == "__main__":
    main()
