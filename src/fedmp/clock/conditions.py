"""How the simulated world differs from an ideal one; the config group `clock`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydantic import Field

from fedmp.clock.availability import Always, Availability
from fedmp.component import Component
from fedmp.seeds import derive_seed

__all__ = ["Clock", "Draw", "Loss"]

_LOGGED_CLIENTS = 500


class Loss(Component):
    """A device that is lost for good; its client goes on with a plan for the others, if there is one.

    Args:
        device: "client/device", by the names of the topology.
        round: in which it happens, at a moment of the training that is drawn uniformly.
    """

    device: str = Field(pattern=r"^[^/]+/.+$")
    round: int = Field(ge=1)


class Draw(NamedTuple):
    """What chance decided for a client's round.

    Attributes:
        slowness: of each device, in order of rank: computing takes so many times as long as planned.
        link_slowness: transfers take so many times as long.
        is_lost: by attempt, whether the client drops out of it.
        when: by attempt, the share of the training that is done by then.
    """

    slowness: tuple[float, ...]
    link_slowness: float
    is_lost: tuple[bool, ...]
    when: tuple[float, ...]


class Clock(Component):
    """What devices, links and clients do beside what the topology says. With nothing set: nothing.

    Every draw is made by the job's seed, the round and the client alone, so that one knob does not change what
    another does, and a run that is resumed has the same weather.

    Args:
        server_bandwidth_bytes_per_s: of the coordinator's own link, each way, which all transfers of a round share
            max-min fairly; None for one that is never the bottleneck.
        compute_sigma: each device's computing takes `exp(sigma * N(0, 1))` times as long in each round: 0.1 is a
            tenth up or down, as of other load and heat.
        link_sigma: likewise for the transfers of each client.
        straggler_probability: that a client is a straggler in a round.
        straggler_factor: a straggler's devices compute so many times as long.
        dropout_probability: that a client drops out of its round, at a moment of its training that is drawn
            uniformly.
        restart_s: after so many seconds a client that dropped out begins the round anew; None lets it sit out.
        attempts: of a client at one round.
        losses: devices that are lost for good.
        notice_s: seconds until a client has noticed that a device is lost, and begins the round anew without it.
        availability: when clients can take part at all; one that is away when the round begins comes when it is
            back, if the round is still open.
        log: write `events.jsonl` and draw it; None does for jobs of at most 500 clients.
    """

    server_bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    compute_sigma: float = Field(default=0.0, ge=0, le=3)
    link_sigma: float = Field(default=0.0, ge=0, le=3)
    straggler_probability: float = Field(default=0.0, ge=0, le=1)
    straggler_factor: float = Field(default=4.0, ge=1)
    dropout_probability: float = Field(default=0.0, ge=0, le=1)
    restart_s: float | None = Field(default=None, ge=0)
    attempts: int = Field(default=8, ge=1)
    losses: tuple[Loss, ...] = ()
    notice_s: float = Field(default=10.0, ge=0)
    availability: Availability = Field(default_factory=Always)
    log: bool | None = None

    @property
    def is_ideal(self) -> bool:
        """Whether nothing is set: all goes as plans and links say."""
        return self.model_copy(update={"log": None}) == Clock()

    def is_logged(self, num_clients: int) -> bool:
        """Whether the events of a job with so many clients are written down."""
        return num_clients <= _LOGGED_CLIENTS if self.log is None else self.log

    def draw(self, client: str, num_devices: int, *, round: int, seed: int) -> Draw:
        """Let chance decide.

        Args:
            client: its name.
            num_devices: that its plan uses.
            round: which.
            seed: the job's.
        """
        knobs = (self.compute_sigma, self.link_sigma, self.straggler_probability, self.dropout_probability)
        if not any(knobs) and not self.losses:
            return Draw((1.0,) * num_devices, 1.0, (False,) * self.attempts, (0.0,) * self.attempts)
        generator = np.random.default_rng(derive_seed(seed, "clock", round, client))
        # drawn in one order, whatever is on, so that knobs do not disturb each other
        straggler, link = generator.random(), generator.standard_normal()
        lost, when = generator.random((2, self.attempts))
        devices = np.exp(self.compute_sigma * generator.standard_normal(num_devices))
        factor = self.straggler_factor if straggler < self.straggler_probability else 1.0
        return Draw(
            tuple(float(factor * device) for device in devices),
            float(np.exp(self.link_sigma * link)),
            tuple(bool(chance < self.dropout_probability) for chance in lost),
            tuple(map(float, when)),
        )
