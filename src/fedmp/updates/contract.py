"""What every update transform must do, as one function that a user's own tests can call."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping

import torch

from fedmp.updates.chain import Chain
from fedmp.updates.transform import Part, PayloadError, UpdateTransform, generator

__all__ = ["check_transform"]

_CASES = (
    *(Part(shape, torch.float32) for shape in ((64,), (1000,), (4097,), (65, 1), (40, 3, 3, 3), (150, 150))),
    *(Part((17, 129), dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
)
_ROUNDS = 30
_SEEDS = 200
_HOSTILE = 4


def check_transform(transform: UpdateTransform, *, is_unbiased: bool = False) -> None:
    """Encode tensors of many shapes, dtypes and kinds, and check all that fedmp relies on.

    The transform survives pickling. `encode` makes the parts that `layout` tells of, does not change the tensor,
    and gives the same for the same seed and state. `decode` gives back shape and dtype, zeros for zeros, and
    of parts that a peer made up either some tensor or `PayloadError`. With error feedback, what one round loses
    is no more than was to be sent, what all rounds have lost stays bounded, and is exactly what the
    coordinator lacks. Behind `EF21`, both sides hold the same estimate, and of a tensor that stays the same it comes
    nearer with each round. If it is unbiased, the mean over many seeds comes near the tensor.

    Args:
        transform: any object with the methods of `UpdateTransform`; a `Chain` is one.
        is_unbiased: whether it claims to be.

    Raises:
        AssertionError: the transform breaks a rule; the message names the case and the rule.

    Example:
        >>> from fedmp.updates import Int8
        >>> check_transform(Int8(), is_unbiased=True)
    """
    assert isinstance(transform, UpdateTransform), f"{transform!r} lacks methods of UpdateTransform"
    transform = pickle.loads(pickle.dumps(transform))
    for index, spec in enumerate(_CASES):
        case = f"{transform!r} of {spec.dtype} {spec.shape}"
        if transform.layout(spec) == {"": spec}:
            continue
        _check_round_trip(transform, spec, _tensor(spec, index), case)
        _check_zeros(transform, spec, case)
        _check_hostile(transform, spec, case)
    spec = Part((40, 50), torch.float32)
    if transform.layout(spec) != {"": spec}:
        _check_rounds(transform, spec)
        if is_unbiased:
            _check_mean(transform, spec)


def _check_round_trip(transform: UpdateTransform, spec: Part, tensor: torch.Tensor, case: str) -> None:
    before = tensor.clone()
    encoded = transform.encode(tensor, state={}, seed=1)
    assert torch.equal(tensor, before), f"{case}: encode changes the tensor that it is given"
    _check_layout(transform, spec, encoded.parts, case)
    again = transform.encode(tensor, state={}, seed=1)
    assert _same(again.parts, encoded.parts), f"{case}: the same seed gives other parts"
    assert _same(again.state, encoded.state), f"{case}: the same seed gives another state"
    decoded = transform.decode(encoded.parts, spec, seed=1)
    assert decoded.shape == tensor.shape, f"{case}: decodes to shape {tuple(decoded.shape)}"
    assert decoded.dtype == tensor.dtype, f"{case}: decodes to {decoded.dtype}"
    assert bool(torch.isfinite(decoded).all()), f"{case}: decodes to NaN or infinity"
    if transform.error_feedback:
        lost, all = _norm(tensor - decoded), _norm(tensor)
        rounding = 1 + 8 * torch.finfo(spec.dtype).eps
        assert lost <= all * rounding, f"{case}: loses {lost:g} of {all:g}, so what is lost would grow"
    next = transform.encode(tensor, state=encoded.state, seed=2)
    _check_layout(transform, spec, next.parts, f"{case}, second round")


def _check_layout(
    transform: UpdateTransform, spec: Part, parts: Mapping[str, torch.Tensor], case: str
) -> None:
    layout = transform.layout(spec)
    assert parts.keys() == layout.keys(), f"{case}: makes {sorted(parts)}, its layout is {sorted(layout)}"
    for name, part in layout.items():
        wrong = part.explain(parts[name])
        assert not wrong, f"{case}: part {name!r} {wrong}"


def _check_zeros(transform: UpdateTransform, spec: Part, case: str) -> None:
    zeros = torch.zeros(spec.shape, dtype=spec.dtype)
    encoded = transform.encode(zeros, state={}, seed=3)
    decoded = transform.decode(encoded.parts, spec, seed=3)
    assert not bool(decoded.any()), f"{case}: zeros decode to {float(decoded.abs().max()):g}"


def _check_hostile(transform: UpdateTransform, spec: Part, case: str) -> None:
    for seed in range(_HOSTILE):
        parts = {
            name: _anything(part, 10 * seed + 100 * index)
            for index, (name, part) in enumerate(transform.layout(spec).items())
        }
        try:
            decoded = transform.decode(parts, spec, seed=seed)
        except PayloadError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{case}: a made-up payload raises {type(error).__name__}: {error}"
            ) from error
        assert decoded.shape == spec.shape, f"{case}: a made-up payload decodes to {tuple(decoded.shape)}"


def _check_rounds(transform: UpdateTransform, spec: Part) -> None:
    """Send a tensor that changes little by little, as updates do."""
    chain = Chain([transform]) if not isinstance(transform, Chain) else transform
    case = f"{transform!r} over {_ROUNDS} rounds"
    state: Mapping[str, torch.Tensor] = {}
    wanted = torch.zeros(spec.shape, dtype=torch.float64)
    got = torch.zeros(spec.shape, dtype=torch.float64)
    constant, largest = _tensor(spec, 7), 0.0
    for round in range(_ROUNDS):
        tensor = constant + 0.1 * _tensor(spec, 100 + round)
        encoded = chain.encode(tensor, state=state, seed=round)
        wanted += tensor
        got += chain.decode(encoded.parts, spec, seed=round)
        state = encoded.state
        largest = max(largest, _norm(tensor))
    if chain.keeps_estimate:
        _check_estimates(chain, spec)
        return
    if not chain.keeps_residual:
        assert "residual" not in state, f"{case}: keeps a residual that nobody asked for"
        return
    residual = state["residual"]
    gap = _norm(wanted - got - residual)
    assert gap <= 1e-5 * _norm(wanted), f"{case}: the residual is {gap:g} off what the coordinator lacks"
    # a compressor that keeps a share s of what it is given leaves at most 1/s rounds' worth behind
    assert _norm(residual) <= _norm(wanted), (
        f"{case}: what was lost, {_norm(residual):g}, grows without bound"
    )


def _check_estimates(chain: Chain, spec: Part) -> None:
    """Send a tensor again and again: both sides hold the same, and it comes nearer."""
    case = f"{chain!r} over {_ROUNDS} rounds"
    tensor, state = _tensor(spec, 7), dict[str, torch.Tensor]()
    held: torch.Tensor | None = None
    gaps = [_norm(tensor)]
    for round in range(_ROUNDS):
        encoded = chain.encode(tensor, state=state, seed=round)
        held = chain.decode(encoded.parts, spec, seed=round, estimate=held)
        state = dict(encoded.state)
        assert torch.equal(state["estimate"], held), f"{case}: the two sides hold different estimates"
        gaps.append(_norm(tensor - held))
        assert gaps[-1] <= gaps[-2] * (1 + 1e-5), (
            f"{case}: the estimate is {gaps[-1]:g} off, after {gaps[-2]:g} the round before"
        )
    assert gaps[-1] < 0.9 * gaps[1], f"{case}: the estimate comes no nearer than the first, {gaps[1]:g}"


def _check_mean(transform: UpdateTransform, spec: Part) -> None:
    tensor = _tensor(spec, 9).double()
    total, squares = torch.zeros_like(tensor), torch.zeros_like(tensor)
    for seed in range(_SEEDS):
        encoded = transform.encode(tensor.to(spec.dtype), state={}, seed=seed)
        decoded = transform.decode(encoded.parts, spec, seed=seed).double()
        total += decoded
        squares += (decoded - tensor.to(spec.dtype)) ** 2
    # the mean of n draws is off by sqrt(variance / n); of all numbers together, by 1 in the square mean
    error = (total / _SEEDS - tensor).square().sum() / (squares.sum() / _SEEDS**2).clamp(min=1e-30)
    assert float(error) < 1.5, (
        f"{transform!r}: the mean of {_SEEDS} draws is {math.sqrt(float(error)):.3g} times as far off as chance "
        f"would have it"
    )


def _tensor(spec: Part, seed: int) -> torch.Tensor:
    """Numbers like those of an update: many small ones, a few large ones."""
    random = generator(seed)
    normal = torch.randn(spec.shape, generator=random, dtype=torch.float64)
    return (normal * normal.abs() * 1e-2).to(spec.dtype)


def _anything(part: Part, seed: int) -> torch.Tensor:
    """A tensor that fits a part, with finite numbers that no encoder may have made."""
    random = generator(seed)
    shape = (int(torch.randint(part.shape[0] + 1, (), generator=random)),) if part.is_bound else part.shape
    if part.dtype.is_floating_point:
        return (
            torch.randn(shape, generator=random, dtype=torch.float64).mul_(10.0 ** (seed % 40)).to(part.dtype)
        )
    size = torch.Size(shape).numel() * part.dtype.itemsize
    return torch.randint(256, (size,), generator=random, dtype=torch.uint8).view(part.dtype).view(shape)


def _same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
