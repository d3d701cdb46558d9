"""The simulating engine: all clients in this process, on the same batches as devices elsewhere would take."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field

from fedmp.client import LocalRound, StateStore, Wire
from fedmp.cohort import Probe
from fedmp.component import Component
from fedmp.coordinator import ClientUpdate, Opening, Trained
from fedmp.engine.arrivals import Arrivals, predict_arrivals
from fedmp.engine.at_once import ManyAtOnce, deals_out_fragments, is_mean_by_samples, try_out, why_one_by_one
from fedmp.engine.cohort_updates import Trainee
from fedmp.engine.held import Held, HeldUpdates
from fedmp.engine.job import Job
from fedmp.engine.paced import PacedCheckpoints
from fedmp.engine.population import Population
from fedmp.engine.prepare import Prepared, build_model, load_and_split, plan_split
from fedmp.engine.ranked import RankedTrainer, serve
from fedmp.engine.ranks import Message, Ranks, RankSettings
from fedmp.engine.session import Outcome, Session, round_settings, run_session
from fedmp.engine.setup import ClientSetup
from fedmp.engine.simulated_time import SimulatedTime
from fedmp.engine.simulated_wire import HandedOut, SimulatedWire
from fedmp.engine.traffic import Traffic
from fedmp.engine.untraced import Untraced, needs_no_trace
from fedmp.errors import ConfigError
from fedmp.pipeline import BatchResult, StageRunner
from fedmp.records import Note, Progress, state_key
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage

__all__ = ["CohortTrainer", "OneByOne", "SimulateEngine", "SimulatedClients"]


class SimulateEngine(Component):
    """One process, many clients at once where the model can be run so, otherwise one after another.

    Args:
        cohort: "vectorized" trains many clients at once, "sequential" one after another; "auto" does the first
            where it gives the same result, and says so where it does not.
        chunk: clients at once; None for as many as fit the cache.
        workers: threads that train chunks; None for as many as torch uses.
        checkpoint_s: seconds between checkpoints where many clients are trained at once; 0 for one a round.
        ranks: how several processes talk, if torchrun or srun started them.
    """

    cohort: Literal["auto", "vectorized", "sequential"] = "auto"
    chunk: int | None = Field(default=None, ge=1)
    workers: int | None = Field(default=None, ge=1)
    checkpoint_s: float = Field(default=2.0, ge=0)
    ranks: RankSettings = RankSettings()

    @property
    def name(self) -> str:
        """`simulate`."""
        return "simulate"

    def warm_up(self) -> None:
        """Nothing takes long here."""

    def prepare(self, job: Job) -> Prepared:
        """All of the job, which may have no faults: there are no processes for them to happen to.

        Raises:
            FedmpError: the job cannot be prepared.
        """
        if job.faults:
            raise ConfigError(
                "faults happen to device processes, which engine 'simulate' has none of; use engine=local"
            )
        data, names, parts = load_and_split(job)
        reason = "as asked" if self.cohort == "sequential" else why_one_by_one(job)
        model = build_model(job)
        reason = reason or deals_out_fragments(job, model)
        found = Probe(reason)
        if not reason:
            found = try_out(job, model, data.train, parts[0], draws_noise=self.cohort == "vectorized")
        if self.cohort == "vectorized" and found.refusal:
            raise ConfigError(
                f"engine.cohort=vectorized: {found.refusal}; use engine.cohort=auto or sequential"
            )
        if needs_no_trace(job):
            return Untraced(job, model, data, parts, found)
        return replace(plan_split(job, data, names, parts), probe=found)

    def run(self, session: Session) -> Outcome:
        """Run the rounds.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        if not _is_at_once(session.prepared):
            found = session.prepared.probe
            why = found.refusal if found else "as asked"
            session.observe(Note(f"clients are trained one after another: {why}"))
            clients = SimulatedClients(session, _with_ranks(session, OneByOne(session)))
            startup_s = time.monotonic() - session.started_s
            return Outcome(run_session(session, round_settings(session), clients), startup_s)
        trainer = ManyAtOnce(session, chunk=self.chunk, workers=self.workers)
        told = f"clients are trained {trainer.chunk} at once by {trainer.workers} threads"
        if session.ranks is not None:
            told += f" of each of {session.ranks.size} processes"
        session.observe(Note(told))
        if not _remembers(session.prepared):
            paced = PacedCheckpoints(
                session.checkpoints, last_round=session.prepared.job.rounds, every_s=self.checkpoint_s
            )
            session = replace(session, checkpoints=paced)
        clients = SimulatedClients(session, _with_ranks(session, trainer))
        startup_s = time.monotonic() - session.started_s
        try:
            return Outcome(run_session(session, round_settings(session), clients), startup_s)
        finally:
            trainer.close()

    def follow(self, session: Session) -> Message:
        """Train what rank 0 tells, until the job is over; for the other ranks.

        Returns:
            What rank 0 says at the end.

        Raises:
            RoundError: the job has failed, or a rank is lost.
        """
        prepared, ranks = session.prepared, session.ranks
        assert ranks is not None
        return self._serve(session, ranks, lambda name: prepared.clients[name])

    def _serve(self, session: Session, ranks: Ranks, member: Callable[[str], Trainee]) -> Message:
        if not _is_at_once(session.prepared):
            return serve(ranks, OneByOne(session), member)
        trainer = ManyAtOnce(session, chunk=self.chunk, workers=self.workers)
        try:
            return serve(ranks, trainer, member)
        finally:
            trainer.close()


class CohortTrainer(Protocol):
    """A way to train clients in this process."""

    def train(
        self,
        cohort: Sequence[ClientSetup],
        *,
        round: int,
        states: Mapping[str, str],
        handed_out: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> Sequence[ClientUpdate]:
        """Train from what the coordinator hands out, which stays as it is.

        Args:
            cohort: who trains.
            round: seeds the order of the batches.
            states: names what each client kept, from which it starts.
            handed_out: the global model and what goes with it, as clients receive it.
            keep: whether each update is wanted. Otherwise their mean may be all that there is, weighted by the
                samples that each client processed (`fedmp.aggregate.SummedUpdates`).

        Returns:
            The clients' updates, in the order of the cohort; each may still be read after later calls.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        ...


class SimulatedClients:
    """Clients whose updates arrive in the order of their predicted times, as if they were real.

    A client's update is made when it begins, from the model of that moment, and held until it would arrive.

    Args:
        session: the job under way.
        trainer: trains a cohort.
        finish_s: seconds in which a client that begins with a round finishes it; infinite if it never does; None
            lets the job's clock tell.

    Raises:
        ResumeError: late updates of an earlier run cannot be read.
    """

    def __init__(
        self,
        session: Session,
        trainer: CohortTrainer,
        finish_s: Callable[[ClientSetup, int], float] | None = None,
    ) -> None:
        self._prepared = session.prepared
        clients = session.prepared.clients
        assert isinstance(clients, Population)
        self._place = clients.places.__getitem__
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
        known, round = dict[str, ClientSetup](), opening.round
        self._time.open(opening)

        def setup_of(client: str) -> ClientSetup:
            if client not in known:
                known[client] = self._prepared.clients[client]
            return known[client]

        arrivals = predict_arrivals(
            opening,
            place=self._place,
            left_s={client: held.left_s for client, held in self._held.items()},
            finish_s=lambda client: self._finish_s(setup_of(client), round),
        )
        late, lost = self._late(opening, arrivals)
        faults, recoveries = self._time.close(arrivals)
        took_part = sorted((*arrivals.counted, *arrivals.left_s), key=self._place)
        begun = [setup_of(name) for name in took_part if name not in opening.late]
        needed = [setup for setup in begun if setup.name not in lost]
        handed_out = self._wire.hand_out(round)
        is_summed = self._is_mean and not late and not self._held
        made = self._trainer.train(
            needed, round=round, states=opening.states, handed_out=handed_out.tensors, keep=not is_summed
        )
        if is_summed:
            arriving, bytes_up = dict[str, Held](), self._bytes_up(needed, made, handed_out)
        else:
            arriving = dict(self._held)
            for setup, update in zip(needed, made, strict=True):
                base = opening.states.get(setup.name, "")
                arriving[setup.name] = self._send(setup, update, base, handed_out.tensors)
            bytes_up = sum(arriving[name].num_bytes for name in arrivals.counted)
        self._held = {
            client: replace(self._held.get(client) or _by_itself(arriving[client]), left_s=left_s)
            for client, left_s in late.items()
        }
        self._store.save(round, self._held)
        counted = sorted(arrivals.counted, key=self._place)
        updates = made if is_summed else [arriving[name].update for name in counted]
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

    def _bytes_down(self, handed_out: HandedOut, begun: Sequence[ClientSetup], opening: Opening) -> int:
        """Bytes of what those receive who begin; of clients that are cut alike found out once."""
        by_name = {setup.name: setup for setup in begun}
        total = 0
        for payload, names in self._wire.payloads(handed_out, list(by_name)):
            known: dict[tuple[int, bool], int] = {}
            for name in names:
                setup, is_first = by_name[name], not opening.states.get(name)
                key = id(setup.pieces), is_first and setup.work.scope.keeps_values
                if key not in known:
                    known[key] = self._traffic.down(setup, payload, round=opening.round, is_first=is_first)
                total += known[key]
        return total

    def _bytes_up(
        self, cohort: Sequence[ClientSetup], made: Sequence[ClientUpdate], handed_out: HandedOut
    ) -> int:
        """Bytes of a cohort's updates, which all hold the same tensors, and travel as they are."""
        names = tuple(made[0]) if made else ()
        alike = Counter(id(setup.pieces) for setup in cohort)
        one_of = {id(setup.pieces): setup for setup in cohort}
        return sum(
            count * self._traffic.plain_up(one_of[kind], names, handed_out.tensors)
            for kind, count in alike.items()
        )

    def _send(
        self, setup: ClientSetup, update: ClientUpdate, base: str, like: Mapping[str, torch.Tensor]
    ) -> Held:
        """An update as the coordinator will have it, and its bytes on the way there."""
        if self._wire.uplink.is_plain:
            return Held(update, 0.0, self._traffic.plain_up(setup, update, like))
        update, payload = self._wire.send(update, base)
        return Held(update, 0.0, self._traffic.up(setup, payload))

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
        for client in sorted(arrivals.left_s, key=self._place):
            left_s, begun = arrivals.left_s[client], opening.late.get(client, opening.round)
            if oldest is None or begun < oldest or math.isinf(left_s):
                lost[client] = self._time.reason(client)
            else:
                late[client] = left_s
        return late, lost


class OneByOne:
    """Trains one client after another, with the code that a client with a single device runs.

    Args:
        session: the job under way; told of every step.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prepared = session.prepared
        self._stage = Stage(session.prepared.whole_stage()).materialize("cpu")
        options = replace(
            session.prepared.job.pipeline.options(), compress_activations="none", compress_gradients="none"
        )
        self._runner = StageRunner(self._stage, session.prepared.job.task, options=options)
        self._store = StateStore(session.state_folder, is_durable=False)

    def train(
        self,
        cohort: Sequence[ClientSetup],
        *,
        round: int,
        states: Mapping[str, str],
        handed_out: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> list[ClientUpdate]:
        """Train each client of the cohort in turn.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        return [self._train(setup, round, handed_out, states.get(setup.name, "")) for setup in cohort]

    def _train(
        self, setup: ClientSetup, round: int, handed_out: Mapping[str, torch.Tensor], base: str
    ) -> ClientUpdate:
        # one stage takes any schedule of one stage a device; gradients are the same under all
        work = replace(setup.work, schedule=OneFOneB(warmup="short"))
        local = LocalRound(
            self._runner,
            work,
            client=setup.name,
            dataset=setup.own_samples,
            num_samples=setup.num_samples,
        )
        state = local.usable(self._store.load(setup.name, base), key=base, round=round)
        names = work.scope.pulled(handed_out, round, whole=local.needs_whole(state))
        num_samples = setup.examples_in(round)

        def tell(step: int, samples_done: int, sums: BatchResult) -> None:
            loss = sums.loss_sum / max(sums.weight, 1e-12)
            self._session.observe(Progress(round, setup.name, samples_done, num_samples, loss))

        result = local.run({name: handed_out[name] for name in names}, state, round=round, on_step=tell)
        self._store.save(setup.name, state_key(round), "all", result.state, base=base)
        report = result.report.model_copy(update={"pipeline_bytes": setup.pipeline_bytes(num_samples)})
        return ClientUpdate(setup.name, round, result.update, (report,))


def _by_itself(held: Held) -> Held:
    """A late update with tensors of its own, so that it does not keep those of its cohort in memory."""
    tensors = {name: tensor.clone() for name, tensor in held.update.items()}
    return replace(held, update=replace(held.update, tensors=tensors))


def _with_ranks(session: Session, trainer: ManyAtOnce | OneByOne) -> Any:
    """The trainer, or all ranks' if there are several."""
    return trainer if session.ranks is None else RankedTrainer(session.ranks, trainer)


def _is_at_once(prepared: Prepared) -> bool:
    """Whether clients can be trained many at once."""
    return prepared.probe is not None and not prepared.probe.refusal


def _remembers(prepared: Prepared) -> bool:
    """Whether rounds leave more behind than the global model, so that each must be committed by itself."""
    job = prepared.job
    closing = job.strategy.closing(prepared.num_clients)
    rule, specs = job.strategy.local_rule, prepared.specs
    wire = Wire("", job.uplink_channel(specs), job.downlink_channel(specs))
    return (
        closing.oldest(job.rounds) is not None
        or wire.keeps_state
        or wire.downlink.chain.keeps_estimate
        or job.strategy.keeps_optimizer
        or bool(rule and rule.kept)
        or job.strategy.scope(prepared.specs).keeps_values
    )
