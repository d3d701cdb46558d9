"""What every aggregator must do, as one function that a user's own tests can call."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch

from fedmp.aggregate.aggregator import Aggregator

__all__ = ["StagedUpdate", "check_aggregator", "sample_updates"]

_SCALES = (1.0, 1e3, 1e12)


def check_aggregator(
    aggregator: Aggregator,
    *,
    uses_weights: bool,
    is_within_hull: bool = True,
    tolerates: int = 0,
    num_clients: int = 11,
) -> None:
    """Check all that fedmp relies on in an aggregator, and what it promises beyond.

    Names, shapes and dtypes are those of the updates, which are left as they were; equal updates give that
    update; the order of clients does not matter; clients may be cut into stages in different ways, and read
    from disk a tensor at a time, without any change to the result; tensors of one name are let go before
    those of the next are read; weights matter in proportion, or not at all; bad weights are refused.

    Args:
        aggregator: any object with a `combine` method.
        uses_weights: whether a client's weight decides how much it counts.
        is_within_hull: whether each element stays between the least and the largest of the clients'.
        tolerates: so many clients of `num_clients` may send anything finite, and the result stays near the
            honest ones, whose spread decides what is near. Above 0, NaN must be refused, too.
        num_clients: to check with.

    Raises:
        AssertionError: the aggregator breaks a rule; the message names it.

    Example:
        >>> from fedmp.aggregate import CoordinateMedian
        >>> check_aggregator(CoordinateMedian(), uses_weights=False, tolerates=5)
    """
    updates = sample_updates(num_clients)
    weights = [1.0 + index % 4 for index in range(num_clients)]
    _check_form(aggregator, updates, weights)
    _check_equal(aggregator, updates[0], weights)
    _check_order(aggregator, updates, weights)
    _check_stages(aggregator, updates, weights)
    _check_weights(aggregator, updates, weights, uses_weights=uses_weights)
    if is_within_hull:
        _check_hull(aggregator.combine(updates, weights), updates)
    if tolerates:
        _check_tolerance(aggregator, updates, tolerates)
        _check_finite(aggregator, updates, weights)


def sample_updates(num_clients: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Updates around a common step: matrices, vectors and single numbers of all dtypes, counters, flags."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "a.weight": ((7, 5), torch.float32),
        "a.bias": ((5,), torch.float32),
        "b.weight": ((3, 2, 2), torch.float64),
        "b.scale": ((), torch.float32),
        "c.weight": ((6,), torch.bfloat16),
        "c.bias": ((6,), torch.float16),
        "empty": ((0, 3), torch.float32),
    }
    common = {name: torch.randn(shape, generator=generator) for name, (shape, _) in shapes.items()}
    updates = []
    for _ in range(num_clients):
        update = {
            name: (common[name] + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
            for name, (shape, dtype) in shapes.items()
        }
        update["batches"] = torch.randint(3, 9, (), generator=generator)
        update["flags"] = torch.rand(4, generator=generator) < 0.5
        updates.append(update)
    return updates


class StagedUpdate(Mapping[str, torch.Tensor]):
    """An update read a tensor at a time, as from a journal: stages cut anywhere, nothing kept in memory.

    Args:
        update: what to read.
        num_stages: into which its names are cut; stages are listed in turn, from the one numbered `first` on.
        live: what has been read of any update and may still be held; shared by all updates of a round.
    """

    def __init__(
        self,
        update: Mapping[str, torch.Tensor],
        num_stages: int,
        *,
        first: int = 0,
        live: list[tuple[str, weakref.ref[torch.Tensor]]] | None = None,
    ) -> None:
        names = list(update)
        stages = [names[index::num_stages] for index in range(num_stages)]
        self._names = [name for stage in (*stages[first:], *stages[:first]) for name in stage]
        self._update = update
        self._live = [] if live is None else live

    def __getitem__(self, name: str) -> torch.Tensor:
        self._live[:] = [(other, held) for other, held in self._live if held() is not None]
        others = {other for other, _ in self._live} - {name}
        assert not others, (
            f"{name} is read while {sorted(others)} of other names are held: let go of them first"
        )
        tensor = self._update[name].clone()
        self._live.append((name, weakref.ref(tensor)))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_form(
    aggregator: Aggregator, updates: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]
) -> None:
    copies = [{name: tensor.clone() for name, tensor in update.items()} for update in updates]
    combined = aggregator.combine(updates, weights)
    assert set(combined) == set(updates[0]), (
        f"the result must hold {sorted(updates[0])}, not {sorted(combined)}"
    )
    for name, tensor in updates[0].items():
        got = combined[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), (
            f"{name} must stay {tensor.dtype} {tuple(tensor.shape)}, not {got.dtype} {tuple(got.shape)}"
        )
    for update, copy in zip(updates, copies, strict=True):
        assert all(torch.equal(update[name], copy[name]) for name in copy), "combine changes its updates"
    for wrong in ([], [*weights[:-1], 0.0], [*weights[:-1], -1.0], weights[:-1]):
        try:
            aggregator.combine(updates, wrong)
        except ValueError:
            continue
        raise AssertionError(f"weights {wrong} of {len(updates)} updates must raise ValueError")


def _check_equal(aggregator: Aggregator, update: dict[str, torch.Tensor], weights: Sequence[float]) -> None:
    combined = aggregator.combine([update] * len(weights), weights)
    _assert_close(combined, update, "equal updates must give that update")


def _check_order(
    aggregator: Aggregator, updates: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]
) -> None:
    expected = aggregator.combine(updates, weights)
    order = torch.randperm(len(updates), generator=torch.Generator().manual_seed(1)).tolist()
    combined = aggregator.combine([updates[i] for i in order], [weights[i] for i in order])
    _assert_close(combined, expected, "the order of clients must not matter")


def _check_stages(
    aggregator: Aggregator, updates: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]
) -> None:
    expected = aggregator.combine(updates, weights)
    live: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    staged = [
        StagedUpdate(update, 1 + index % 3, first=index % (1 + index % 3), live=live)
        for index, update in enumerate(updates)
    ]
    combined = aggregator.combine(staged, weights)
    for name, tensor in expected.items():
        assert torch.equal(combined[name], tensor), f"{name} differs when updates are read stage by stage"


def _check_weights(
    aggregator: Aggregator,
    updates: Sequence[dict[str, torch.Tensor]],
    weights: Sequence[float],
    *,
    uses_weights: bool,
) -> None:
    expected = aggregator.combine(updates, weights)
    even = aggregator.combine(updates, [1.0] * len(weights))
    if uses_weights:
        tripled = aggregator.combine(updates, [3 * weight for weight in weights])
        _assert_close(tripled, expected, "weights must matter in proportion only")
        assert any(not torch.equal(even[name], expected[name]) for name in even), (
            "the aggregator is said to use weights, but unequal ones give what equal ones give"
        )
    else:
        for name in even:
            assert torch.equal(even[name], expected[name]), f"{name} depends on weights, which it should not"


def _check_hull(combined: Mapping[str, torch.Tensor], updates: Sequence[dict[str, torch.Tensor]]) -> None:
    for name, tensor in combined.items():
        values = torch.stack([update[name] for update in updates]).double()
        low, high = values.amin(dim=0), values.amax(dim=0)
        margin = _margin(tensor) * (1 + values.abs().amax(dim=0))
        inside = (tensor.double() >= low - margin) & (tensor.double() <= high + margin)
        assert bool(inside.all()), f"{name} leaves the range of the clients' values"


def _check_tolerance(
    aggregator: Aggregator, updates: Sequence[dict[str, torch.Tensor]], num_byzantine: int
) -> None:
    """Byzantine clients that agree with each other, at several scales, at both ends of the client order."""
    floating = [name for name, tensor in updates[0].items() if tensor.is_floating_point() and tensor.numel()]
    for scale in _SCALES:
        for are_first in (True, False):
            honest = list(updates[num_byzantine:])
            bad = [_attacked(update, scale, seed) for seed, update in enumerate(updates[:num_byzantine])]
            round = bad + honest if are_first else honest + bad
            combined = aggregator.combine(round, [1.0] * len(round))
            mean = {name: torch.stack([u[name].double() for u in honest]).mean(dim=0) for name in floating}
            spread = max(_distance(update, mean, floating) for update in honest)
            error = _distance(combined, mean, floating)
            assert error <= 4 * spread, (
                f"{num_byzantine} of {len(round)} clients at scale {scale:g} move the result {error:.3g} away from "
                f"the honest mean; the farthest honest client is {spread:.3g} away"
            )


def _check_finite(
    aggregator: Aggregator, updates: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]
) -> None:
    spoiled = dict(updates[1])
    spoiled["a.weight"] = spoiled["a.weight"].clone()
    for value in (float("nan"), float("inf")):
        spoiled["a.weight"][2, 3] = value
        try:
            aggregator.combine([updates[0], spoiled, *updates[2:]], weights)
        except ValueError:
            continue
        raise AssertionError(f"an update with {value} must raise ValueError")


def _attacked(update: dict[str, torch.Tensor], scale: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attacked = {}
    for name, tensor in update.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        attacked[name] = tensor.clone()
        if tensor.is_floating_point():
            limit = torch.finfo(tensor.dtype).max / 4
            attacked[name] = (-scale * (2 + 0.1 * noise)).clamp(-limit, limit).to(tensor.dtype)
    return attacked


def _distance(
    update: Mapping[str, torch.Tensor], mean: Mapping[str, torch.Tensor], names: Sequence[str]
) -> float:
    return math.sqrt(sum(float((update[name].double() - mean[name]).square().sum()) for name in names))


def _assert_close(
    combined: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], rule: str
) -> None:
    for name, tensor in expected.items():
        margin = _margin(tensor) * (1 + tensor.double().abs())
        assert bool(((combined[name].double() - tensor.double()).abs() <= margin).all()), (
            f"{rule}; {name} differs"
        )


def _margin(tensor: torch.Tensor) -> float:
    """A few units in the last place, relative; nothing for whole numbers."""
    return 8 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
