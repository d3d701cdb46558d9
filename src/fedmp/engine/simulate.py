"""The simulating engine: all clients in this process, on the same batches as devices elsewhere would take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from fedmp.client import LocalTrainer
from fedmp.component import Component
from fedmp.coordinator import ClientUpdate, Opening, Trained
from fedmp.engine.job import Job
from fedmp.engine.prepare import ClientSetup, Prepared, prepare
from fedmp.engine.session import Outcome, Session, round_settings, run_session
from fedmp.errors import ConfigError
from fedmp.pipeline import BatchResult, StageRunner
from fedmp.records import DeviceReport, Progress
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage
from fedmp.updates import difference

__all__ = ["CohortTrainer", "OneByOne", "SimulateEngine", "SimulatedClients"]


class SimulateEngine(Component):
    """One process, one copy of the model, overwritten for each client in turn."""

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
        return prepare(job)

    def run(self, session: Session) -> Outcome:
        """Run the rounds.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        clients = SimulatedClients(session, OneByOne(session))
        startup_s = time.monotonic() - session.started_s
        return Outcome(run_session(session, round_settings(session), clients), startup_s)


class CohortTrainer(Protocol):
    """A way to train clients in this process."""

    def train(self, cohort: Sequence[ClientSetup], *, round: int) -> Sequence[ClientUpdate]:
        """Train from the present global model, which stays as it is.

        Args:
            cohort: who trains.
            round: seeds the order of the batches.

        Returns:
            The clients' updates, in the order of the cohort; each may still be read after later calls.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        ...


class SimulatedClients:
    """Clients that all finish every round.

    Args:
        session: the job under way.
        trainer: trains a cohort.
    """

    def __init__(self, session: Session, trainer: CohortTrainer) -> None:
        self._prepared = session.prepared
        self._trainer = trainer

    def train(self, opening: Opening) -> Trained:
        """Train the cohort.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        setups = [self._prepared.clients[name] for name in opening.cohort]
        updates = self._trainer.train(setups, round=opening.round)
        traffic = [_traffic(setup, self._prepared) for setup in setups]
        return Trained(
            updates=updates,
            bytes_up=sum(up for up, _ in traffic),
            bytes_down=sum(down for _, down in traffic),
            simulated_s=max(setup.predicted_s for setup in setups),
        )

    def committed(self, round: int) -> None:
        """Nothing was kept."""


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
        self._names = next(iter(self._prepared.clients.values())).pushed(
            self._stage.blueprint, with_buffers=not self._prepared.job.strategy.keep_statistics_local
        )
        self._own_buffers: dict[str, dict[str, torch.Tensor]] = {}

    def train(self, cohort: Sequence[ClientSetup], *, round: int) -> list[ClientUpdate]:
        """Train each client of the cohort in turn.

        Raises:
            TrainingError: a client's loss is not finite.
        """
        return [self._train(setup, round) for setup in cohort]

    def _train(self, setup: ClientSetup, round: int) -> ClientUpdate:
        # one stage takes any schedule of one stage a device; gradients are the same under all
        work = replace(setup.work, schedule=OneFOneB(warmup="short"))
        before = self._session.model.state
        self._stage.load_state({**before, **self._own_buffers.get(setup.name, {})})
        trainer = LocalTrainer(
            self._runner,
            work,
            client=setup.name,
            dataset=setup.own_samples,
            num_samples=len(setup.own_samples),
        )
        evaluation = trainer.evaluate(round=round) if work.evaluate_first else BatchResult()

        def tell(step: int, samples_done: int, sums: BatchResult) -> None:
            loss = sums.loss_sum / max(sums.weight, 1e-12)
            self._session.observe(Progress(round, setup.name, samples_done, setup.round_samples, loss))

        result = trainer.train(round=round, on_step=tell)
        after = dict(zip(self._names, self._stage.state_tensors(self._names), strict=True))
        self._keep_buffers(setup)
        report = DeviceReport(
            num_examples=setup.round_samples,
            loss_sum=result.loss_sum,
            weight=result.weight,
            num_correct=result.num_correct,
            evaluation_loss_sum=evaluation.loss_sum,
            evaluation_weight=evaluation.weight,
            evaluation_correct=evaluation.num_correct,
            pipeline_bytes=_pipeline_bytes(setup),
        )
        change = difference({name: tensor.detach() for name, tensor in after.items()}, before)
        return ClientUpdate(setup.name, round, change, (report,))

    def _keep_buffers(self, setup: ClientSetup) -> None:
        """Statistics that stay at the client, where the strategy wants that."""
        if self._prepared.job.strategy.keep_statistics_local:
            kept = [n for n, spec in self._stage.blueprint.state.items() if spec.kind == "buffer"]
            tensors = self._stage.state_tensors(kept)
            self._own_buffers[setup.name] = {n: t.clone() for n, t in zip(kept, tensors, strict=True)}


def _traffic(setup: ClientSetup, prepared: Prepared) -> tuple[int, int]:
    """Bytes of tensors that the client's stages would push and pull in a round."""
    with_buffers = not prepared.job.strategy.keep_statistics_local
    up = sum(
        blueprint.state[name].num_bytes
        for blueprint in setup.blueprints
        for name in setup.pushed(blueprint, with_buffers=with_buffers)
    )
    down = sum(spec.num_bytes for blueprint in setup.blueprints for spec in blueprint.state.values())
    return up, down


def _pipeline_bytes(setup: ClientSetup) -> int:
    """Bytes of boundary tensors, there and back, for the samples of a round."""
    size = setup.plan.microbatch_size
    per_sample = sum(stage.boundary_bytes for stage in setup.plan.stages) / size
    return int(2 * per_sample * setup.round_samples)
