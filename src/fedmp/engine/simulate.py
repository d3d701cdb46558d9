"""The simulating engine: all clients in this process, on the same batches as devices elsewhere would take."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedmp.client import Wire
from fedmp.cohort import Probe
from fedmp.component import Component
from fedmp.engine.at_once import ManyAtOnce, deals_out_fragments, try_out, why_one_by_one
from fedmp.engine.cohort_trainer import CohortTrainer
from fedmp.engine.fit import check_fit
from fedmp.engine.job import Job
from fedmp.engine.one_by_one import OneByOne
from fedmp.engine.paced import PacedCheckpoints
from fedmp.engine.population import Population
from fedmp.engine.prepare import Prepared, build_model, load_and_split, plan_split
from fedmp.engine.ranked import RankedTrainer, serve
from fedmp.engine.ranks import Message, RankSettings
from fedmp.engine.session import Outcome, Session, round_settings, run_session
from fedmp.engine.simulated_clients import SimulatedClients
from fedmp.engine.untraced import Untraced, needs_no_trace
from fedmp.errors import ConfigError
from fedmp.records import Note

__all__ = ["SimulateEngine"]


class SimulateEngine(Component):
    """One process, many clients at once where the model can be run so, otherwise one after another.

    Args:
        cohort: "vectorized" trains many clients at once, "sequential" one after another; "auto" does the first
            where it gives the same result, and says so where it does not.
        chunk: clients at once; None for as many as fit the cache.
        workers: threads that train chunks; None for as many as torch uses, or fewer for small models and cohorts.
        replay: record the operations of a chunk's step, and run these alone from then on; only where that gives the
            same. False runs the model's Python in each step.
        checkpoint_s: seconds between checkpoints where many clients are trained at once; 0 for one a round.
        ranks: how several processes talk, if torchrun or srun started them.
    """

    cohort: Literal["auto", "vectorized", "sequential"] = "auto"
    chunk: int | None = Field(default=None, ge=1)
    workers: int | None = Field(default=None, ge=1)
    replay: bool = True
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
        data, rows = load_and_split(job)
        model = build_model(job)
        check_fit(model, job.task, data.train, rows[0])
        reason = "as asked" if self.cohort == "sequential" else why_one_by_one(job)
        reason = reason or deals_out_fragments(job, model)
        found = Probe(reason)
        if not reason:
            found = try_out(job, model, data.train, rows[0], draws_noise=self.cohort == "vectorized")
        if self.cohort == "vectorized" and found.refusal:
            raise ConfigError(
                f"engine.cohort=vectorized: {found.refusal}; use engine.cohort=auto or sequential"
            )
        if needs_no_trace(job):
            return Untraced(job, model, data, rows, found)
        return replace(plan_split(job, model, data, rows), probe=found)

    def run(self, session: Session) -> Outcome:
        """Run the rounds.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        if not _is_at_once(session.prepared):
            assert session.prepared.probe is not None
            session.observe(Note(f"clients are trained one after another: {session.prepared.probe.refusal}"))
            clients = SimulatedClients(session, _with_ranks(session, self._one_by_one(session)))
            startup_s = time.monotonic() - session.started_s
            return Outcome(run_session(session, round_settings(session), clients), startup_s)
        trainer = self._at_once(session)
        told = f"clients are trained {trainer.chunk} at once by {trainer.workers} thread(s)"
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

    def _at_once(self, session: Session) -> ManyAtOnce:
        return ManyAtOnce(session, chunk=self.chunk, workers=self.workers, replays=self.replay)

    def _one_by_one(self, session: Session) -> OneByOne:
        return OneByOne(session, is_exact=self.cohort == "sequential")

    def follow(self, session: Session) -> Message:
        """Train what rank 0 tells, until the job is over; for the other ranks.

        Returns:
            What rank 0 says at the end.

        Raises:
            RoundError: the job has failed, or a rank is lost.
        """
        ranks, clients = session.ranks, session.prepared.clients
        assert ranks is not None
        assert isinstance(clients, Population)
        if not _is_at_once(session.prepared):
            return serve(ranks, self._one_by_one(session), clients)
        trainer = self._at_once(session)
        try:
            return serve(ranks, trainer, clients)
        finally:
            trainer.close()


def _with_ranks(session: Session, trainer: CohortTrainer) -> CohortTrainer:
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
