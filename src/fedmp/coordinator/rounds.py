"""The round loop of every engine: pick a cohort, let it train, aggregate, commit. Reads like the algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmp.aggregate import Aggregator
from fedmp.aggregate.aggregator import enough_clients, refusal
from fedmp.coordinator.checkpoint import Checkpoint, CheckpointStore
from fedmp.coordinator.clients import Clients, ClientUpdate, Opening, Trained
from fedmp.coordinator.global_model import GlobalModel
from fedmp.coordinator.roster import Roster, after_round, facts_of, states_of
from fedmp.errors import RoundError
from fedmp.records import Observer, RoundFinished, RoundRecord, RoundStarted
from fedmp.seeds import derive_seed
from fedmp.strategy import Strategy, figures

__all__ = ["RoundSettings", "run_rounds"]

Evaluation = tuple[float | None, float | None]


@dataclass(frozen=True)
class RoundSettings:
    """What the round loop needs to know.

    Attributes:
        clients: in client order.
        round_samples: samples that each client processes in one round; 0 while that is not known.
        predicted_s: seconds that each client's round takes by its plan and links; 0 alike.
        first_round, last_round: rounds to run, both included.
        seed: the job's.
        fingerprint: of the model, for the checkpoints.
        late: clients that go on, in the first round, with an earlier one: which.
        num_samples: that each client has; 0 while that is not known.
        roster: what is remembered of the clients from before the first round.
        evaluate_every: rounds from one evaluation to the next; the last round has one.
    """

    clients: Sequence[str]
    round_samples: Mapping[str, int]
    predicted_s: Mapping[str, float]
    first_round: int
    last_round: int
    seed: int
    fingerprint: str
    late: Mapping[str, int] = field(default_factory=dict)
    num_samples: Mapping[str, int] = field(default_factory=dict)
    roster: Roster = field(default_factory=dict)
    evaluate_every: int = 1


def run_rounds(
    settings: RoundSettings,
    *,
    strategy: Strategy,
    aggregator: Aggregator,
    model: GlobalModel,
    clients: Clients,
    checkpoints: CheckpointStore,
    evaluate: Callable[[], Evaluation],
    observe: Observer,
    on_updates: Callable[[Sequence[ClientUpdate]], None] = lambda _: None,
) -> list[RoundRecord]:
    """Run the rounds of a job.

    Args:
        settings: what to run.
        strategy, aggregator: who takes part, and how updates are combined.
        model: the global model; moved by every round.
        clients: those who train.
        checkpoints: where each round is committed.
        evaluate: loss and accuracy of the global model on the held-out set.
        observe: told of starts and ends.
        on_updates: given every committed round's updates.

    Returns:
        One record a round.

    Raises:
        RoundError: a round did not close in time, or too few clients can begin it.
        FedmpError: a client cannot go on.
    """
    records = []
    late, roster = settings.late, settings.roster
    for round in range(settings.first_round, settings.last_round + 1):
        started_s = time.monotonic()
        opening = _open(settings, strategy, round, late, roster, clients.unreachable())
        _check_size(opening, aggregator, wanted=strategy.closing(len(settings.clients)).wanted)
        observe(_started(settings, opening))

        trained = clients.train(opening)
        updates = _discounted(opening, trained.updates)
        model.step(
            updates,
            strategy.weights(updates),
            combine=aggregator.combine,
            num_clients=len(settings.clients),
        )
        roster = after_round(roster, updates)

        is_evaluated = round % settings.evaluate_every == 0 or round == settings.last_round
        evaluation = evaluate() if is_evaluated else (None, None)
        record = _record(round, trained, evaluation, started_s)
        _commit(checkpoints, settings.fingerprint, model, record, roster)
        clients.committed(round)
        on_updates(trained.updates)
        observe(RoundFinished(record))
        records.append(record)
        late = trained.late
    return records


def _open(
    settings: RoundSettings,
    strategy: Strategy,
    round: int,
    late: Mapping[str, int],
    roster: Roster,
    unreachable: Collection[str],
) -> Opening:
    """Let so many clients begin that, with those who are late, as many train as the strategy wants."""
    closing = strategy.closing(len(settings.clients))
    everyone = settings.clients  # of whom there may be 100,000
    free = [client for client in everyone if client not in late] if late else everyone
    size = min(closing.num_training - len(late), len(free))
    facts = facts_of(free, roster, num_samples=settings.num_samples, unreachable=unreachable)
    cohort = (
        strategy.cohort(free, round=round, seed=settings.seed, size=size, facts=facts) if size > 0 else ()
    )
    beginning = set(cohort)
    spare = [client for client in free if client not in beginning] if closing.refills else []
    order = torch.randperm(
        len(spare), generator=torch.Generator().manual_seed(derive_seed(settings.seed, "spare", round))
    )
    closing = closing.among(len(cohort) + len(late) + len(spare))
    return Opening(
        round, cohort, closing, late, tuple(spare[index] for index in order.tolist()), states_of(roster)
    )


def _check_size(opening: Opening, aggregator: Aggregator, *, wanted: int) -> None:
    """Let nobody train for a round whose updates could not be combined: who is away makes cohorts smaller."""
    closing = opening.closing
    error = refusal(aggregator, minimum=closing.minimum, wanted=closing.wanted)
    if error is None:
        return
    enough = enough_clients(aggregator, wanted=wanted)
    waits = "rounds then wait for clients that are away"
    remedy = f", with strategy.min_clients={enough} ({waits})" if enough else ""
    raise RoundError(
        f"round {opening.round} would begin with {opening.num_clients} of the {wanted} clients that it wants: the "
        f"others are away, or strategy.effort leaves them out. {error}. Nobody has trained for it, and what was "
        f"committed is safe: resume the run when more are there{remedy}, or with another effort or aggregator"
    ) from error


def _started(settings: RoundSettings, opening: Opening) -> RoundStarted:
    clients = opening.cohort
    if opening.late:
        taking_part = {*opening.cohort, *opening.late}
        clients = tuple(client for client in settings.clients if client in taking_part)
    return RoundStarted(opening.round, clients, sum(settings.round_samples[client] for client in clients))


def _discounted(opening: Opening, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
    """The updates, those that are late discounted; as they are, if none is."""
    if all(round == opening.round for round in figures(updates, "round")):
        return updates
    return [update.discounted(opening.closing.discount(opening.round - update.round)) for update in updates]


def _record(round: int, trained: Trained, evaluation: Evaluation, started_s: float) -> RoundRecord:
    """A round's row from its device reports and the new global model's loss and accuracy."""
    clients, rounds = (figures(trained.updates, name) for name in ("client", "round"))

    def total(name: str) -> Any:
        return sum(figures(trained.updates, name))

    weight, evaluated = total("weight"), total("evaluation_weight")
    return RoundRecord(
        round=round,
        clients=tuple(clients),
        num_examples=total("num_examples"),
        train_loss=total("loss_sum") / weight if weight else 0.0,
        test_loss=evaluation[0],
        test_accuracy=evaluation[1],
        federated_loss=total("evaluation_loss_sum") / evaluated if evaluated else None,
        federated_accuracy=total("evaluation_correct") / evaluated if evaluated else None,
        bytes_up=trained.bytes_up,
        bytes_down=trained.bytes_down,
        pipeline_bytes=total("pipeline_bytes"),
        wall_s=time.monotonic() - started_s,
        simulated_s=trained.simulated_s,
        faults=trained.faults,
        recoveries=trained.recoveries,
        sat_out=tuple(trained.sat_out),
        late=dict(trained.late),
        stale={client: begun for client, begun in zip(clients, rounds, strict=True) if begun != round},
    )


def _commit(
    checkpoints: CheckpointStore, fingerprint: str, model: GlobalModel, record: RoundRecord, roster: Roster
) -> None:
    tensors, values = model.optimizer_state()
    checkpoints.save(
        Checkpoint(
            round=record.round,
            fingerprint=fingerprint,
            state=model.state,
            optimizer_tensors=tensors,
            optimizer_values=values,
            optimizer=model.optimizer_name,
            record=record,
            slots=model.slots,
            roster=roster,
        )
    )
