"""Reading many updates of one tensor in blocks: what all aggregators' arithmetic is built on.

A block is a run of elements of the flattened tensor, so small that what is computed of it over all clients
stays in a core's cache. Updates are read once from memory (or from the journal's mapped files) and never
copied as a whole. Each element is computed by one thread, in client order, so results do not depend on how
many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["combine_sorted", "gives_views", "non_finite", "read", "weighted_sum", "working_dtype"]

Updates = Sequence[Mapping[str, torch.Tensor]]

# 1 MiB of float32: with blocks of 128 KiB a call for each client's takes about as long as its sum, and the calls wait
# for the interpreter's lock; benchmarks/aggregation.py --blocks compares
_SUM_BLOCK = 1 << 18
_SORT_BLOCK_BYTES = 1 << 20
_MAX_THREADS = 4
# below this a thread costs more than it saves
_THREAD_BYTES = 8 << 20


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are computed in: itself for float32 and float64, float64 for all narrower."""
    if dtype in (torch.float32, torch.float64):
        return dtype
    return torch.promote_types(dtype, torch.float64)


def gives_views(update: Mapping[str, torch.Tensor]) -> bool:
    """Whether reading a tensor gives a view of memory or of a mapped file, so that many may be held at once."""
    return isinstance(update, dict) or bool(getattr(update, "gives_views", False))


def read(updates: Updates, name: str) -> list[torch.Tensor]:
    """One tensor of every client, flattened; views where updates give views.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    tensors = [update[name] for update in updates]
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} is {first.dtype} {tuple(first.shape)} in update 0 but {tensor.dtype} "
                f"{tuple(tensor.shape)} in update {index}; all updates must be alike"
            )
    return [tensor.reshape(-1) for tensor in tensors]


def weighted_sum(updates: Updates, name: str, coefficients: Sequence[float]) -> torch.Tensor:
    """`sum_i coefficients[i] * updates[i][name]`, added up in client order, in the tensor's own dtype.

    Integers are rounded; a flag (bool) is set where the sum is above a half. Updates that do not give
    views are read one after another and not kept.
    """
    first = updates[0][name]
    total = torch.zeros_like(first, dtype=working_dtype(first.dtype))
    if all(gives_views(update) for update in updates) and total.is_contiguous():
        tensors, flat = read(updates, name), total.view(-1)

        def add_up(start: int, stop: int) -> None:
            accumulator = flat[start:stop]
            for tensor, coefficient in zip(tensors, coefficients, strict=True):
                accumulator.add_(tensor[start:stop].to(flat.dtype), alpha=coefficient)

        num_bytes = first.element_size() * first.numel() * len(updates)
        _over_blocks(first.numel(), _SUM_BLOCK, num_bytes, add_up)
    else:
        for update, coefficient in zip(updates, coefficients, strict=True):
            total.add_(update[name].to(total.dtype), alpha=coefficient)
    return _cast(total, first.dtype)


def combine_sorted(
    updates: Updates, name: str, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Sort each element's values over the clients and reduce them.

    Holds one tensor of every client if updates do not give views, blocks of it otherwise.

    Args:
        updates: of all clients.
        name: the tensor.
        reduce: from values [elements, clients], ascending, to [elements]; of float64 or float32, in which
            every float32, bfloat16 and float16 is exact, or of int64.

    Raises:
        ValueError: an update holds NaN or infinity, or complex numbers.
    """
    tensors = read(updates, name)
    first = updates[0][name]
    if first.is_complex():
        raise ValueError(f"{name} is {first.dtype}; complex numbers have no order")
    dtype = torch.int64 if not first.is_floating_point() else torch.float32
    if first.dtype == torch.float64:
        dtype = torch.float64
    combined = torch.empty(first.shape, dtype=first.dtype)
    flat = combined.view(-1)
    block = max(64, _SORT_BLOCK_BYTES // (dtype.itemsize * len(tensors)))

    def reduce_block(start: int, stop: int) -> None:
        rows = torch.stack([tensor[start:stop] for tensor in tensors])
        values = rows.t().to(dtype, memory_format=torch.contiguous_format).contiguous()
        # numpy sorts short rows with vector instructions, many times faster than torch
        values.numpy().sort(axis=1)
        if first.is_floating_point() and not bool(torch.isfinite(values[:, (0, -1)]).all()):
            raise ValueError(non_finite(updates, name))
        flat[start:stop] = _cast(reduce(values), first.dtype)

    _over_blocks(first.numel(), block, first.numel() * dtype.itemsize * len(tensors), reduce_block)
    return combined


def non_finite(updates: Updates, name: str) -> str:
    """The message about updates of which some are not finite."""
    bad = [index for index, update in enumerate(updates) if not bool(torch.isfinite(update[name]).all())]
    if not bad:
        return f"{name} holds numbers whose squares overflow; leave such clients out"
    return f"{name} holds NaN or infinity in update {', '.join(map(str, bad))}; leave such clients out"


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return values > 0.5
    is_rounded = values.is_floating_point() and not dtype.is_floating_point
    return (values.round() if is_rounded else values).to(dtype)


def _over_blocks(num_elements: int, block: int, num_bytes: int, work: Callable[[int, int], None]) -> None:
    """Call `work(start, stop)` for each block of the elements, on a few threads if there is much to do."""
    starts = range(0, num_elements, block)
    num_threads = min(torch.get_num_threads(), _MAX_THREADS, len(starts))

    def run(start: int) -> None:
        work(start, min(start + block, num_elements))

    if num_threads <= 1 or num_bytes < _THREAD_BYTES:
        for start in starts:
            run(start)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(run, starts):
            pass
