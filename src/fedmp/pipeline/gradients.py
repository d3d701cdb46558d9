"""What a gradient needs from the other devices before the optimizer's step: tied sums, the global norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fedmp.pipeline.frames import Frame, FrameKind, FrameLayout, FrameTag, message_tag
from fedmp.pipeline.links import StepId
from fedmp.pipeline.transport import Pending, Transport
from fedmp.stages import Stage

__all__ = ["Exchange", "clip_gradients", "sum_over_stages", "sum_tied_gradients"]

_GRADIENTS, _OTHER = 0, 1  # numbers that tell sums of one round apart
_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Exchange:
    """Small all-to-all messages between a client's devices.

    Args:
        transport: to the other devices; None if there are none.
        device: this device's number.
        placement: the stages of each device.
    """

    def __init__(self, transport: Transport | None, device: int, placement: Sequence[Sequence[int]]) -> None:
        self._transport = transport
        self._device = device
        self.placement = placement
        self.device_of = {stage: rank for rank, own in enumerate(placement) for stage in own}
        self._id = StepId(0, 0, 0)
        self.bytes_sent = 0

    def begin(self, step: StepId) -> None:
        """Start a step."""
        self._id = step

    def swap(
        self, kind: FrameKind, number: int, own: dict[int, torch.Tensor], wanted: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """Give each other the tensors of some stages.

        Args:
            kind: of the frames.
            number: tells several exchanges of one step apart.
            own: this device's tensors by stage, all of one shape and dtype.
            wanted: the stages that take part, on whatever device; the same on all of their devices.

        Returns:
            Every wanted stage's tensor, on the CPU or wherever the transport's buffers are.
        """
        everything = dict(own)
        peers = sorted({self.device_of[stage] for stage in wanted} - {self._device})
        if not peers:
            return everything
        assert self._transport is not None
        sample = next(iter(own.values()))
        layout = FrameLayout([tuple(sample.shape)], [sample.dtype])
        arriving: dict[int, tuple[Pending, Frame]] = {}
        for stage in wanted:
            if stage not in own:
                frame = Frame(layout, self._transport.device)
                tag = message_tag(kind, stage, number, layout.num_bytes)
                pending = self._transport.receive(frame.buffer, self.device_of[stage], tag)
                arriving[stage] = pending, frame
        leaving: list[tuple[Pending, Frame]] = []
        for stage, tensor in own.items():
            frame = Frame(layout, self._transport.device)
            frame.pack(FrameTag(*self._id, number, kind), [tensor])
            tag = message_tag(kind, stage, number, layout.num_bytes)
            for peer in peers:
                leaving.append((self._transport.send(frame.buffer, peer, tag), frame))
                self.bytes_sent += layout.num_bytes
        for stage, (pending, frame) in arriving.items():
            pending.wait()
            everything[stage] = frame.unpack(FrameTag(*self._id, number, kind))[0]
        for pending, _ in leaving:
            pending.wait()
        return everything


def sum_tied_gradients(stages: Sequence[Stage], exchange: Exchange) -> None:
    """Give every stage that uses a tied parameter the sum of the gradients, added in stage order.

    Args:
        stages: of this device.
        exchange: to the other devices.
    """
    names = sorted({name for stage in stages for name in stage.blueprint.shared})
    for name in names:
        users = next(s.blueprint.shared[name] for s in stages if name in s.blueprint.shared)
        parameters = {
            stage.blueprint.index: stage.state_tensors([name])[0]
            for stage in stages
            if name in stage.blueprint.shared
        }
        # stages of one process may share the parameter itself, whose gradient is then a sum already
        seen: set[int] = set()
        own: dict[int, torch.Tensor] = {}
        for stage, parameter in parameters.items():
            is_new = id(parameter) not in seen and parameter.grad is not None
            own[stage] = parameter.grad if is_new else torch.zeros_like(parameter)  # type: ignore[assignment]
            seen.add(id(parameter))
        # a number that all users of the name agree on, whatever other tied parameters they have
        number = _number(name)
        everything = exchange.swap(FrameKind.TIED_GRADIENT, number, own, users)
        total = torch.zeros_like(next(iter(parameters.values())))
        for stage in users:
            total += everything[stage]
        for parameter in parameters.values():
            parameter.grad = total if len(parameters) == 1 else total.clone()


def clip_gradients(stages: Sequence[Stage], exchange: Exchange, max_norm: float) -> float:
    """Scale gradients down so that the whole model's 2-norm is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` on the whole model: a tied parameter counts once, on its owner.

    Args:
        stages: of this device, with complete gradients.
        exchange: to the other devices.
        max_norm: above 0.

    Returns:
        The norm before clipping, summed in stage order and so the same on all devices.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}")
    own = {stage.blueprint.index: _square_sum(stage) for stage in stages}
    norm = math.sqrt(_sum(own, exchange, _GRADIENTS))
    scale = max_norm / (norm + _EPSILON)
    if scale < 1:
        clipped: set[int] = set()
        for stage in stages:
            for parameter in stage.parameters():
                if parameter.grad is not None and id(parameter) not in clipped:
                    parameter.grad.mul_(scale)
                    clipped.add(id(parameter))
    return norm


def sum_over_stages(own: Mapping[int, float], exchange: Exchange) -> float:
    """The sum of a number of each stage, added in stage order.

    Args:
        own: of this device's stages, by index.
        exchange: to the other devices.
    """
    return _sum(
        {stage: torch.tensor(number, dtype=torch.float64) for stage, number in own.items()}, exchange, _OTHER
    )


def _sum(own: dict[int, torch.Tensor], exchange: Exchange, number: int) -> float:
    wanted = sorted(stage for group in exchange.placement for stage in group)
    everything = exchange.swap(FrameKind.NORM, number, own, wanted)
    return sum(float(everything[stage]) for stage in wanted)


def _square_sum(stage: Stage) -> torch.Tensor:
    owned = stage.state_tensors(stage.blueprint.owned)
    gradients = [tensor.grad.detach() for tensor in owned if tensor.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).cpu() for g in gradients])
    return norms.square().sum()


def _number(name: str) -> int:
    return sum(ord(letter) * (index + 1) for index, letter in enumerate(name)) & 0x3FF
