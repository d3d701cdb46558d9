"""Clients trained one after another: a `CohortTrainer` for whatever cannot be stacked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from fedmp.client import LocalRound, StateStore
from fedmp.cohort import cutting_matters, is_small, one_thread
from fedmp.coordinator import ClientUpdate
from fedmp.engine.population import SomeClients
from fedmp.engine.session import Session
from fedmp.engine.setup import ClientSetup
from fedmp.pipeline import BatchResult, StageRunner
from fedmp.records import Progress, state_key
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage

__all__ = ["OneByOne"]


class OneByOne:
    """Trains one client after another, with the code that a client with a single device runs.

    Args:
        session: the job under way; told of every step.
        is_exact: do as devices do in everything; otherwise a batch is not cut into micro-batches where that only
            changes the order in which floats are added.
    """

    def __init__(self, session: Session, *, is_exact: bool = True) -> None:
        self._session = session
        self._prepared = session.prepared
        self._stage = Stage(session.prepared.whole_stage()).materialize("cpu")
        options = replace(
            session.prepared.job.pipeline.options(), compress_activations="none", compress_gradients="none"
        )
        self._runner = StageRunner(self._stage, session.prepared.job.task, options=options)
        self._store = StateStore(session.state_folder, is_durable=False)
        job, model = session.prepared.job, session.prepared.model
        first = next(iter(session.prepared.clients.values())).own_samples
        inputs, targets = first.batch(range(min(len(first), job.batch_size)))
        is_cut = is_exact or job.pipeline.autocast is not None
        is_cut = is_cut or cutting_matters(model, job.task, inputs[:8], targets[:8])
        self._num_microbatches = job.num_microbatches if is_cut else 1
        samples = -(-len(inputs) // self._num_microbatches)
        self._is_small = is_small(model, inputs[:samples])

    def train(
        self,
        cohort: SomeClients,
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
        with one_thread() if self._is_small else nullcontext():
            return [self._train(setup, round, handed_out, states.get(setup.name, "")) for setup in cohort]

    def _train(
        self, setup: ClientSetup, round: int, handed_out: Mapping[str, torch.Tensor], base: str
    ) -> ClientUpdate:
        # one stage takes any schedule of one stage a device; gradients are the same under all
        work = replace(setup.work, schedule=OneFOneB(warmup="short"), num_microbatches=self._num_microbatches)
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
