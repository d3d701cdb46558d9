"""Transforms in a row, with the error feedback around them.

A tensor goes through the transforms in their order. Each one is applied to whatever numbers the one before it
made, such as the values of a sparse tensor; what is not a floating-point number (places, levels,
signs) is left as it is, and so is what is too small for naming its parts to pay.

If a transform wants error feedback, it goes around the whole chain (Seide et al., 2014; Karimireddy et al.,
2019, algorithm 2): the difference between what went in and what the coordinator will make of it is kept,
in at least single precision, and added to the tensor of the next round. With `EF21` before the transforms, the
difference to what the coordinator holds of the tensor goes through them instead, and nothing is left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedmp.errors import ConfigError
from fedmp.seeds import derive_seed
from fedmp.updates.clip import Clip
from fedmp.updates.ef21 import EF21
from fedmp.updates.random_k import RandomK
from fedmp.updates.transform import Encoded, Part, PayloadError, UpdateTransform, is_finite, working_dtype
from fedmp.updates.zstd import Zstd

__all__ = ["Chain"]

_SMALLEST = 64  # numbers; a part's name, shape and place in a body take about 80 bytes
_RESIDUAL, _ESTIMATE = "residual", "estimate"


class Chain:
    """Transforms in a row; itself one.

    Args:
        transforms: in order: `Clip` first if there is one, then `EF21` if there is one; `Zstd` last if there is one.

    Attributes:
        clip: scales the whole update before all else; None if there is none.
        keeps_estimate: whether both sides hold an estimate of each tensor, to which differences are sent (EF21).
        zstd: compresses the whole body after all else; None if there is none.

    Raises:
        ConfigError: what is given is no transform, or not in this order.
    """

    def __init__(self, transforms: Sequence[Any] = ()) -> None:
        middle = list(transforms)
        self.clip: Clip | None = middle.pop(0) if middle and isinstance(middle[0], Clip) else None
        self.zstd: Zstd | None = middle.pop() if middle and isinstance(middle[-1], Zstd) else None
        self.keeps_estimate = bool(middle) and isinstance(middle[0], EF21)
        if self.keeps_estimate:
            _check_for_estimates(middle := middle[1:])
        for transform in middle:
            if isinstance(transform, Clip | EF21 | Zstd):
                where = {Clip: "first of all", EF21: "first, after Clip alone", Zstd: "last of all"}
                raise ConfigError(
                    f"transforms: {_name(transform)} comes {where[type(transform)]}, not between {_names(transforms)}"
                )
            if not isinstance(transform, UpdateTransform):
                raise ConfigError(
                    f"transforms: {_name(transform)} is no transform: it needs error_feedback, layout, encode "
                    f"and decode, as fedmp.updates.UpdateTransform has them"
                )
        self._transforms: tuple[UpdateTransform, ...] = tuple(middle)

    def __repr__(self) -> str:
        return f"Chain([{', '.join(map(repr, self._transforms))}])"

    @property
    def is_empty(self) -> bool:
        """Whether tensors go through as they are."""
        return not self._transforms

    @property
    def error_feedback(self) -> bool:
        """False: what is lost is added next time by the chain itself, for its transforms."""
        return False

    @property
    def keeps_residual(self) -> bool:
        """Whether any of its transforms wants error feedback, and gets a residual for it."""
        return not self.keeps_estimate and any(transform.error_feedback for transform in self._transforms)

    def layout(self, spec: Part) -> dict[str, Part]:
        """The parts that a tensor becomes in the end."""
        parts = {"": spec}
        for transform in self._transforms:
            parts = {
                _join(name, inner): made
                for name, part in parts.items()
                for inner, made in _layout(transform, part).items()
            }
        return parts

    def encode(self, tensor: torch.Tensor, *, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        """Apply the transforms in order; the state returned holds theirs and what was lost."""
        spec = Part(tuple(tensor.shape), tensor.dtype)
        if self.layout(spec) == {"": spec}:
            return Encoded({"": tensor}, {})
        if self.keeps_estimate:
            return self._encode_difference(tensor, state, seed)
        if not self.keeps_residual:
            return self._encode(tensor, state, seed)
        wanted = tensor.to(working_dtype(tensor.dtype))
        if _RESIDUAL in state:
            wanted = wanted + state[_RESIDUAL]
        encoded = self._encode(wanted.to(tensor.dtype), state, seed)
        got = self.decode(encoded.parts, spec, seed=seed)
        return Encoded(encoded.parts, {**encoded.state, _RESIDUAL: wanted - got})

    def decode(
        self,
        parts: Mapping[str, torch.Tensor],
        spec: Part,
        *,
        seed: int,
        estimate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Undo the transforms in reverse order.

        Args:
            parts, spec, seed: as `UpdateTransform.decode` has them.
            estimate: what the receiver held of the tensor before, where it holds estimates; None for zeros.

        Raises:
            PayloadError: the parts make no sense, or what they make is not finite.
        """
        tensor = self._undo(parts, spec, "", 0, seed)
        if estimate is not None:
            tensor = estimate + tensor
        is_made = parts.keys() != {""} or estimate is not None
        if tensor.is_floating_point() and is_made and not is_finite(tensor):
            raise PayloadError("the numbers that it makes are too large to be finite")
        return tensor

    def _encode_difference(
        self, tensor: torch.Tensor, state: Mapping[str, torch.Tensor], seed: int
    ) -> Encoded:
        estimate = state.get(_ESTIMATE)
        encoded = self._encode(tensor if estimate is None else tensor - estimate, state, seed)
        spec = Part(tuple(tensor.shape), tensor.dtype)
        held = self.decode(encoded.parts, spec, seed=seed, estimate=estimate)
        return Encoded(encoded.parts, {**encoded.state, _ESTIMATE: held})

    def _encode(self, tensor: torch.Tensor, state: Mapping[str, torch.Tensor], seed: int) -> Encoded:
        parts: dict[str, torch.Tensor] = {"": tensor}
        kept: dict[str, torch.Tensor] = {}
        for index, transform in enumerate(self._transforms):
            made: dict[str, torch.Tensor] = {}
            for name, part in parts.items():
                spec = Part(tuple(part.shape), part.dtype)
                if _layout(transform, spec) == {"": spec}:
                    made[name] = part
                    continue
                slot = f"{index}.{name}."
                own = {key[len(slot) :]: value for key, value in state.items() if key.startswith(slot)}
                encoded = transform.encode(part, state=own, seed=derive_seed(seed, index, name))
                made |= {_join(name, inner): value for inner, value in encoded.parts.items()}
                kept |= {slot + key: value for key, value in encoded.state.items()}
            parts = made
        return Encoded(parts, kept)

    def _undo(
        self, parts: Mapping[str, torch.Tensor], spec: Part, name: str, index: int, seed: int
    ) -> torch.Tensor:
        """The part of this name as it was before the transform of this index."""
        if index == len(self._transforms):
            return parts[name]
        transform = self._transforms[index]
        layout = _layout(transform, spec)
        if layout == {"": spec}:
            return self._undo(parts, spec, name, index + 1, seed)
        inner = {
            key: self._undo(parts, part, _join(name, key), index + 1, seed) for key, part in layout.items()
        }
        return transform.decode(inner, spec, seed=derive_seed(seed, index, name))


def _check_for_estimates(transforms: Sequence[object]) -> None:
    """EF21 needs transforms that lose less than they are given."""
    if not transforms or isinstance(transforms[0], Zstd):
        raise ConfigError("transforms: EF21 compresses nothing itself; say with what, such as [ef21,topk]")
    for transform in transforms:
        if isinstance(transform, RandomK) and not transform.error_feedback:
            raise ConfigError(
                f"transforms: EF21 needs transforms that lose less than they are given; RandomK without error_feedback "
                f"multiplies numbers by 1 / fraction = {1 / transform.fraction:g} to be unbiased. Leave "
                f"error_feedback on"
            )


def _layout(transform: UpdateTransform, part: Part) -> Mapping[str, Part]:
    """What a transform makes of a part; itself if it is not for transforms."""
    if not part.dtype.is_floating_point or part.is_bound or part.numel < _SMALLEST:
        return {"": part}
    return transform.layout(part)


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _name(transform: object) -> str:
    return type(transform).__name__


def _names(transforms: Sequence[object]) -> str:
    return ", ".join(map(_name, transforms))
