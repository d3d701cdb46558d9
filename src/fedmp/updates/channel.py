"""A chain bound to a model's tensors: a client's update on its way up, or a global stage on its way down.

Both sides of the federation plane make one, of the same job, and so agree on what travels and on every random
choice. Only trained parameters are transformed; buffers, frozen parameters and integers travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from fedmp.errors import ConfigError
from fedmp.graph import StateSpec
from fedmp.seeds import derive_seed
from fedmp.updates.chain import Chain
from fedmp.updates.transform import Part, PayloadError, is_finite

__all__ = ["Channel", "Decoded", "Estimates", "State", "no_estimates"]

State = Mapping[str, torch.Tensor]

# what a receiver held of a tensor before; None for nothing, which counts as zeros
Estimates: TypeAlias = Callable[[str], torch.Tensor | None]

_ESTIMATE = "estimate/"


def no_estimates(name: str) -> torch.Tensor | None:
    """Of a receiver that holds none."""
    return None


class Channel:
    """Encodes and decodes tensors by name.

    Args:
        transforms: in order.
        specs: of the tensors that may travel; others are taken for such as are not transformed.
        seed: the job's.
        direction: "up" for updates, "down" for global stages.

    Raises:
        ConfigError: the transforms are not in order, or not for this direction.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        specs: Mapping[str, StateSpec],
        *,
        seed: int,
        direction: Literal["up", "down"] = "up",
    ) -> None:
        self.chain = Chain(transforms)
        if direction == "down":
            _check_for_downlink(transforms, self.chain)
        self._specs = specs
        self._seed = seed
        self._direction = direction

    @property
    def is_plain(self) -> bool:
        """Whether every tensor travels as it is, and nothing is clipped."""
        return self.chain.is_empty and self.chain.clip is None

    def parts(self, name: str) -> dict[str, Part]:
        """The tensors of a payload that tell of one of the model's, by their names in it."""
        spec = self._specs[name]
        part = Part(spec.shape, spec.dtype)
        layout = self.chain.layout(part) if self._is_transformed(name) else {"": part}
        return {_payload_name(name, suffix): made for suffix, made in layout.items()}

    def num_bytes(self, name: str) -> int:
        """The most bytes that one of the model's tensors takes on its way, before entropy coding."""
        return sum(part.num_bytes for part in self.parts(name).values())

    def name_of(self, payload_name: str) -> str:
        """The model's tensor that a tensor of a payload tells of."""
        if payload_name in self._specs:
            return payload_name
        name = payload_name.rpartition(":")[0]
        return name if name in self._specs else payload_name

    def encode(
        self,
        tensors: Mapping[str, torch.Tensor],
        state: State,
        *,
        sender: str,
        round: int,
        norm: float | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A payload for the wire.

        Args:
            tensors: a client's update, or what one of its devices has of it; or a global stage.
            state: as the last call for this client returned it; empty at first.
            sender: the client's name; "" on the way down.
            round: in which the update began.
            norm: the 2-norm of the client's whole update, where `tensors` are not all of it and the chain clips.

        Returns:
            The payload, and the state to keep for the next round, by SLOT/TENSOR. It goes by the tensor, so that
            a plan may change between rounds; that of tensors which are not in this payload stays.
        """
        kept = {key: value for key, value in state.items() if key.partition("/")[2] not in tensors}
        if self.is_plain:
            return dict(tensors), kept
        factor = self._factor(tensors, norm)
        own = _by_name(state)
        payload: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if not self._is_transformed(name):
                payload[name] = tensor
                continue
            scaled = tensor if factor == 1.0 else tensor * factor
            seed = self._seed_of(name, sender, round)
            encoded = self.chain.encode(scaled, state=own.get(name, {}), seed=seed)
            payload |= {_payload_name(name, suffix): part for suffix, part in encoded.parts.items()}
            kept |= {f"{slot}/{name}": value for slot, value in encoded.state.items()}
        return payload, kept

    def estimated(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the tensors of which both sides hold an estimate."""
        if not self.chain.keeps_estimate:
            return ()
        return tuple(name for name in names if name in self._specs and not self._is_plain(name))

    @staticmethod
    def estimates_in(state: State) -> Estimates:
        """The sender's own estimates, which are the receiver's, in a state that `encode` returned."""
        return lambda name: state.get(_ESTIMATE + name)

    def decode(
        self,
        name: str,
        read: Callable[[str], torch.Tensor],
        *,
        sender: str,
        round: int,
        estimates: Estimates = no_estimates,
    ) -> torch.Tensor:
        """One of the model's tensors from a payload.

        Args:
            name: of the tensor.
            read: gives a tensor of the payload.
            sender, round: as it was encoded with.
            estimates: what was held of each before, where the chain keeps that.

        Raises:
            PayloadError: the payload makes no sense.
        """
        if self.chain.is_empty or not self._is_transformed(name):
            return read(name)
        spec = self._specs[name]
        part = Part(spec.shape, spec.dtype)
        layout = self.chain.layout(part)
        if layout == {"": part}:
            return read(name)
        parts = {suffix: read(_payload_name(name, suffix)) for suffix in layout}
        estimate = estimates(name) if self.chain.keeps_estimate else None
        return self.chain.decode(parts, part, seed=self._seed_of(name, sender, round), estimate=estimate)

    def decode_all(
        self, payload: Mapping[str, torch.Tensor], names: Iterable[str], *, sender: str, round: int
    ) -> dict[str, torch.Tensor]:
        """All of these tensors from a payload."""
        return {name: self.decode(name, payload.__getitem__, sender=sender, round=round) for name in names}

    def replaced(self, tensors: State, difference: State) -> dict[str, torch.Tensor]:
        """A payload of these tensors in which those that both sides have an estimate of are told as differences.

        Args:
            tensors: the model's, whole.
            difference: the payload that `encode` made of them, or of more.
        """
        estimated = set(self.estimated(tensors))
        payload = {name: tensor for name, tensor in tensors.items() if name not in estimated}
        return payload | {part: difference[part] for name in estimated for part in self.parts(name)}

    def receive(self, payload: State, *, sender: str, round: int, held: State) -> dict[str, torch.Tensor]:
        """All of the model's tensors from a payload in which some may be whole and some differences.

        Args:
            payload: as `replaced` made it, or whole tensors.
            sender, round: as it was encoded with.
            held: what was received before.

        Raises:
            PayloadError: the payload makes no sense, or nothing is held that a difference could be added to.
        """
        received = {}
        names = dict.fromkeys(map(self.name_of, payload))
        estimated = set(self.estimated(names))
        for name in names:
            if name not in estimated or self._is_whole(name, payload):
                received[name] = payload[name]
                continue
            if name not in held:
                raise PayloadError(f"{name} came as a difference to what was never received")
            received[name] = self.decode(
                name, payload.__getitem__, sender=sender, round=round, estimates=held.get
            )
        return received

    def check(
        self,
        name: str,
        read: Callable[[str], torch.Tensor],
        *,
        sender: str,
        round: int,
        estimates: Estimates = no_estimates,
    ) -> torch.Tensor:
        """One of the model's tensors from a payload that anyone may have written.

        Raises:
            PayloadError: a part has another shape or dtype, is not finite, or makes no sense.
        """
        for part_name, part in self.parts(name).items():
            tensor = read(part_name)
            if wrong := part.explain(tensor):
                raise PayloadError(f"{part_name} {wrong}", "wrong-shape-or-dtype")
            if tensor.dtype.is_floating_point and not is_finite(tensor):
                raise PayloadError(f"{part_name} holds NaN or infinity", "not-finite")
        try:
            return self.decode(name, read, sender=sender, round=round, estimates=estimates)
        except PayloadError as error:
            raise PayloadError(f"{name}: {error}", error.reason) from error

    def square_sum(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """The squared 2-norm of what is transformed, for clipping by the norm over several devices."""
        return math.fsum(
            float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
            for name, tensor in tensors.items()
            if self._is_transformed(name)
        )

    def _factor(self, tensors: Mapping[str, torch.Tensor], norm: float | None) -> float:
        if self.chain.clip is None:
            return 1.0
        return self.chain.clip.factor(math.sqrt(self.square_sum(tensors)) if norm is None else norm)

    def _is_plain(self, name: str) -> bool:
        """Whether one of the model's tensors travels as it is."""
        spec = self._specs[name]
        return self.parts(name) == {name: Part(spec.shape, spec.dtype)}

    def _is_whole(self, name: str, payload: State) -> bool:
        spec = self._specs[name]
        return name in payload and not Part(spec.shape, spec.dtype).explain(payload[name])

    def _is_transformed(self, name: str) -> bool:
        spec = self._specs.get(name)
        return (
            spec is not None
            and spec.kind == "parameter"
            and spec.requires_grad
            and spec.dtype.is_floating_point
        )

    def _seed_of(self, name: str, sender: str, round: int) -> int:
        return derive_seed(self._seed, "transforms", self._direction, sender, round, name)


class Decoded(Mapping[str, torch.Tensor]):
    """The model's tensors that a payload tells of, each decoded when asked for.

    Args:
        payload: by the names in it; may read each tensor from disk when asked.
        channel: that it came through.
        sender, round: as it was encoded with.
        estimates: what was held of each before, where the channel's chain keeps that.
    """

    def __init__(
        self,
        payload: Mapping[str, torch.Tensor],
        channel: Channel,
        sender: str,
        round: int,
        estimates: Estimates = no_estimates,
    ) -> None:
        self._payload = payload
        self._names = dict.fromkeys(map(channel.name_of, payload))
        self._channel = channel
        self._sender = sender
        self._round = round
        self._estimates = estimates

    @property
    def gives_views(self) -> bool:
        """Whether reading a tensor costs no memory; tensors that are decoded do."""
        is_mapped = isinstance(self._payload, dict) or bool(getattr(self._payload, "gives_views", False))
        return is_mapped and self._channel.chain.is_empty

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._channel.decode(
            name,
            self._payload.__getitem__,
            sender=self._sender,
            round=self._round,
            estimates=self._estimates,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_for_downlink(transforms: Sequence[Any], chain: Chain) -> None:
    if chain.clip is not None:
        raise ConfigError("downlink: Clip is for updates; global weights are not to be scaled")
    if chain.keeps_estimate:  # which makes up for all that is left out
        return
    for transform in transforms:
        if getattr(transform, "error_feedback", False):
            raise ConfigError(
                f"downlink: {type(transform).__name__} leaves out most of a tensor and makes up for it in later "
                f"updates; weights go out whole. Use bf16, fp16, int8 or int4, or let ef21 before it send differences"
            )


def _payload_name(name: str, suffix: str) -> str:
    return f"{name}:{suffix}" if suffix else name


def _by_name(state: State) -> dict[str, dict[str, torch.Tensor]]:
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        slot, _, name = key.partition("/")
        slots.setdefault(name, {})[slot] = value
    return slots
