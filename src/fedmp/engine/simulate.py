"""The simulating engine: all clients in this process, one after another, on the same batches."""

from __future__ import annotations

import time
from dataclasses import replace

from fedmp.client import LocalTrainer
from fedmp.component import Component
from fedmp.coordinator import Checkpoint
from fedmp.coordinator.rounds import make_record
from fedmp.engine.job import Job
from fedmp.engine.prepare import ClientSetup, Prepared, prepare
from fedmp.engine.session import Outcome, Session, evaluator
from fedmp.errors import ConfigError
from fedmp.pipeline import BatchResult, StageRunner
from fedmp.records import DeviceReport, Progress, RoundFinished, RoundRecord, RoundStarted
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage
from fedmp.updates import difference

__all__ = ["SimulateEngine"]


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
        simulation = _Simulation(session)
        startup_s = time.monotonic() - session.started_s
        records = tuple(
            simulation.round(round) for round in range(session.first_round, session.prepared.job.rounds + 1)
        )
        return Outcome(records, startup_s)


class _Simulation:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._prepared = session.prepared
        self._stage = Stage(session.prepared.whole_stage()).materialize("cpu")
        options = replace(
            session.prepared.job.pipeline.options(), compress_activations="none", compress_gradients="none"
        )
        self._runner = StageRunner(self._stage, session.prepared.job.task, options=options)
        self._evaluate = evaluator(session)
        self._names = next(iter(self._prepared.clients.values())).pushed(
            self._stage.blueprint, with_buffers=not self._prepared.job.strategy.keep_statistics_local
        )
        self._own_buffers: dict[str, dict[str, object]] = {}

    def round(self, round: int) -> RoundRecord:
        """One round of the algorithm."""
        session, job = self._session, self._prepared.job
        started_s = time.monotonic()
        cohort = job.strategy.cohort(list(self._prepared.clients), round=round, seed=job.seed)
        setups = [self._prepared.clients[name] for name in cohort]
        session.observe(RoundStarted(round, cohort, sum(setup.round_samples for setup in setups)))
        updates, reports = [], {}
        for setup in setups:
            update, report = self._client(setup, round)
            updates.append(update)
            reports[setup.name] = (report,)
        session.model.apply(
            job.aggregator.combine(updates, [float(r[0].num_examples) for r in reports.values()])
        )
        traffic = [_traffic(setup, self._prepared) for setup in setups]
        record = make_record(round, reports, self._evaluate()).model_copy(
            update={
                "bytes_up": sum(up for up, _ in traffic),
                "bytes_down": sum(down for _, down in traffic),
                "pipeline_bytes": sum(_pipeline_bytes(setup) for setup in setups),
                "wall_s": time.monotonic() - started_s,
                "simulated_s": max(setup.predicted_s for setup in setups),
            }
        )
        tensors, values = session.model.optimizer_state()
        session.checkpoints.save(
            Checkpoint(
                round,
                self._prepared.graph.fingerprint,
                session.model.state,
                tensors,
                values,
                session.model.optimizer_name,
                record,
            )
        )
        session.observe(RoundFinished(record))
        return record

    def _client(self, setup: ClientSetup, round: int) -> tuple[dict, DeviceReport]:  # type: ignore[type-arg]
        # one stage takes any schedule of one stage a device; gradients are the same under all
        work = replace(setup.work, schedule=OneFOneB(warmup="short"))
        before = self._session.model.state
        self._stage.load_state({**before, **self._own_buffers.get(setup.name, {})})  # type: ignore[dict-item]
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
        if self._prepared.job.strategy.keep_statistics_local:
            kept = [n for n, spec in self._stage.blueprint.state.items() if spec.kind == "buffer"]
            tensors = self._stage.state_tensors(kept)
            self._own_buffers[setup.name] = {n: t.clone() for n, t in zip(kept, tensors, strict=True)}
        report = DeviceReport(
            num_examples=setup.round_samples,
            loss_sum=result.loss_sum,
            weight=result.weight,
            num_correct=result.num_correct,
            evaluation_loss_sum=evaluation.loss_sum,
            evaluation_weight=evaluation.weight,
            evaluation_correct=evaluation.num_correct,
        )
        return difference({name: tensor.detach() for name, tensor in after.items()}, before), report


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
