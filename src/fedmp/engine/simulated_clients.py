"""Simulated clients as the round loop sees them: their updates arrive in the order of their predicted times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedmp.coordinator import ClientUpdate, Opening, Trained
from fedmp.engine.arrivals import Arrivals, predict_arrivals
from fedmp.engine.at_once import is_mean_by_samples
from fedmp.engine.cohort_trainer import CohortTrainer
from fedmp.engine.held import Held, HeldUpdates
from fedmp.engine.population import Population, SomeClients
from fedmp.engine.session import Session
from fedmp.engine.setup import ClientSetup
from fedmp.engine.simulated_time import SimulatedTime
from fedmp.engine.simulated_wire import HandedOut, SimulatedWire
from fedmp.engine.traffic import Traffic

__all__ = ["SimulatedClients"]


class SimulatedClients:
    """Clients whose updates arrive in the order of their predicted times, as if they were real.

    A client's update is made when it begins, from the model of that moment, and held until it would arrive.

    Args:
        session: the job under way.
        trainer: trains a cohort.
        finish_s: seconds in which each of some clients that begin with a round finishes it; infinite if it never
            does; None lets the job's clock tell.

    Raises:
        ResumeError: late updates of an earlier run cannot be read.
    """

    def __init__(
        self,
        session: Session,
        trainer: CohortTrainer,
        finish_s: Callable[[SomeClients, int], Sequence[float]] | None = None,
    ) -> None:
        clients = session.prepared.clients
        assert isinstance(clients, Population)
        self._clients = clients
        self._trainer = trainer
        self._time = SimulatedTime(session)
        self._finish_s = finish_s or self._time.finish_s
        self._wire = SimulatedWire(session, session.prepared.specs)
        self._traffic = Traffic(self._wire.uplink, self._wire.downlink)
        self._is_mean = is_mean_by_samples(session.prepared.job) and self._wire.uplink.is_plain
        self._store = HeldUpdates(session.journal_folder / "late")
        self._held: Mapping[str, Held] = self._store.load(session.first_round - 1, session.late)

    def train(self, opening: Opening) -> Trained:
        """Train those whose updates count, now or later.

        Raises:
            RoundError: fewer clients than the minimum ever finish.
            TrainingError: a client's loss is not finite.
        """
        round, place = opening.round, self._clients.place
        self._time.open(opening)
        begun = self._clients.some(opening.cohort)
        arrivals = self._arrivals(opening, begun)
        late, lost = self._late(opening, arrivals)
        faults, recoveries = self._time.close(arrivals)
        if opening.spare:
            took_part = sorted((*arrivals.counted, *arrivals.left_s), key=place)
            begun = self._clients.some(name for name in took_part if name not in opening.late)
        needed = begun
        if lost:
            needed = self._clients.some(name for name in begun.names if name not in lost)
        handed_out = self._wire.hand_out(round)
        is_summed = self._is_mean and not late and not self._held
        made = self._trainer.train(
            needed, round=round, states=opening.states, handed_out=handed_out.tensors, keep=not is_summed
        )
        if is_summed:
            arriving, bytes_up = dict[str, Held](), self._bytes_up(needed, made, handed_out)
        else:
            arriving = dict(self._held)
            for client, kind, update in zip(needed.names, needed.kinds, made, strict=True):
                base = opening.states.get(client, "")
                arriving[client] = self._send(kind, update, base, handed_out.tensors)
            bytes_up = sum(arriving[name].num_bytes for name in arrivals.counted)
        self._held = {
            client: replace(self._held.get(client) or _by_itself(arriving[client]), left_s=left_s)
            for client, left_s in late.items()
        }
        self._store.save(round, self._held)
        updates = made
        if not is_summed:
            updates = [arriving[name].update for name in sorted(arrivals.counted, key=place)]
        return Trained(
            updates=updates,
            late={client: arriving[client].update.round for client in late},
            sat_out=lost,
            bytes_up=bytes_up,
            bytes_down=self._bytes_down(handed_out, begun, opening),
            faults=faults,
            recoveries=recoveries,
            simulated_s=arrivals.duration_s,
        )

    def _arrivals(self, opening: Opening, begun: SomeClients) -> Arrivals:
        """Who finishes when, of those who go on, begin, or begin as others are done."""
        finish_s = dict(zip(begun.names, self._finish_s(begun, opening.round), strict=True))

        def time_of(client: str) -> float:
            if client not in finish_s:
                (finish_s[client],) = self._finish_s(self._clients.some([client]), opening.round)
            return finish_s[client]

        left_s = {client: held.left_s for client, held in self._held.items()}
        return predict_arrivals(opening, place=self._clients.place, left_s=left_s, finish_s=time_of)

    def _bytes_down(self, handed_out: HandedOut, begun: SomeClients, opening: Opening) -> int:
        """Bytes of what those receive who begin; of clients that are cut alike found out once."""
        kinds, states = dict(zip(begun.names, begun.kinds, strict=True)), opening.states
        keeps = {kind: kind.work.scope.keeps_values for kind in set(begun.kinds)}
        total = 0
        for payload, names in self._wire.payloads(handed_out, begun.names):
            alike = Counter((kinds[name], keeps[kinds[name]] and not states.get(name)) for name in names)
            for (kind, is_first), count in alike.items():
                num_bytes = self._traffic.down(kind, payload, round=opening.round, is_first=is_first)
                total += count * num_bytes
        return total

    def _bytes_up(self, cohort: SomeClients, made: Sequence[ClientUpdate], handed_out: HandedOut) -> int:
        """Bytes of a cohort's updates, which all hold the same tensors, and travel as they are."""
        names = tuple(made[0]) if made else ()
        return sum(
            count * self._traffic.plain_up(kind, names, handed_out.tensors)
            for kind, count in Counter(cohort.kinds).items()
        )

    def _send(
        self, kind: ClientSetup, update: ClientUpdate, base: str, like: Mapping[str, torch.Tensor]
    ) -> Held:
        """An update as the coordinator will have it, and its bytes on the way there."""
        if self._wire.uplink.is_plain:
            return Held(update, 0.0, self._traffic.plain_up(kind, update, like))
        update, payload = self._wire.send(update, base)
        return Held(update, 0.0, self._traffic.up(kind, payload))

    def unreachable(self) -> frozenset[str]:
        """Clients that are away by the job's clock."""
        return self._time.away()

    def committed(self, round: int) -> None:
        """Delete late updates that have arrived."""
        self._store.committed(round, self._held)

    def _late(self, opening: Opening, arrivals: Arrivals) -> tuple[dict[str, float], dict[str, str]]:
        """Who goes on, with the seconds that are left; and whose updates count in no round, and why."""
        late, lost = dict[str, float](), dict[str, str]()
        oldest = opening.closing.oldest(opening.round)
        for client in sorted(arrivals.left_s, key=self._clients.place):
            left_s, begun = arrivals.left_s[client], opening.late.get(client, opening.round)
            if oldest is None or begun < oldest or math.isinf(left_s):
                lost[client] = self._time.reason(client)
            else:
                late[client] = left_s
        return late, lost


def _by_itself(held: Held) -> Held:
    """A late update with tensors of its own, so that it does not keep those of its cohort in memory."""
    tensors = {name: tensor.clone() for name, tensor in held.update.items()}
    return replace(held, update=replace(held.update, tensors=tensors))
