"""A cohort trained by several ranks: rank 0 tells who trains what, all train their part, the parts come together.

A round is one message from rank 0 (the model, and who trains where) and one reduction to it: the weighted sums of
the updates and each client's figures in one vector. Where every update is wanted by itself, or clients are trained
one after another, each rank sends its clients' updates instead.

Shape letters: K clients of the cohort, P trained parameters, R ranks.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedmp.cohort import CohortResult, RoundStart
from fedmp.coordinator import ClientUpdate
from fedmp.engine.at_once import ManyAtOnce
from fedmp.engine.cohort_trainer import CohortTrainer
from fedmp.engine.population import Population, SomeClients
from fedmp.engine.ranks import Message, Ranks
from fedmp.errors import FedmpError, RoundError, TrainingError
from fedmp.records import DeviceReport

__all__ = ["RankedTrainer", "serve", "share_out"]

_LOG = logging.getLogger(__name__)


class RankedTrainer:
    """Trains cohorts with all ranks; for rank 0.

    Args:
        ranks: all of them.
        trainer: trains this rank's part.
    """

    def __init__(self, ranks: Ranks, trainer: CohortTrainer) -> None:
        self._ranks, self._trainer = ranks, trainer

    def train(
        self,
        cohort: SomeClients,
        *,
        round: int,
        states: Mapping[str, str],
        handed_out: Mapping[str, torch.Tensor],
        keep: bool,
    ) -> Sequence[ClientUpdate]:
        """Train a cohort.

        Raises:
            TrainingError: a client's loss is not finite, here or at another rank.
            RoundError: a rank is lost.
        """
        parts = share_out([amount.examples for amount in cohort.amounts(round)], self._ranks.size)
        order = {
            "do": "train",
            "round": round,
            "keep": keep,
            "num_clients": len(cohort),
            "places": parts,
            "clients": [[cohort.names[place] for place in part] for part in parts],
            "states": {name: states[name] for name in cohort.names if name in states},
        }
        self._ranks.tell(order, handed_out)
        own = cohort.take(parts[0])
        if not keep and isinstance(self._trainer, ManyAtOnce):
            start = self._trainer.start(handed_out)
            result = _summed(self._ranks, self._trainer, own, start, order)
            return self._trainer.updates(cohort, result, start, round=round)
        return self._gathered(cohort, own, order, handed_out)

    def _gathered(
        self,
        cohort: SomeClients,
        own: SomeClients,
        order: Mapping[str, Any],
        handed_out: Mapping[str, torch.Tensor],
    ) -> list[ClientUpdate]:
        """Every update, in the order of the cohort."""
        failure: Exception | None = None
        made: dict[str, ClientUpdate] = {}
        try:
            made = {update.client: update for update in _train(self._trainer, own, order, handed_out)}
        except Exception as error:
            failure = error
        answers = [self._ranks.answer_of(rank) for rank in range(1, self._ranks.size)]  # of a failure, too
        if failure is not None:
            raise failure
        for answer in answers:
            made.update({update.client: update for update in _read_updates(answer, order["round"])})
        return [made[name] for name in cohort.names]


def serve(ranks: Ranks, trainer: CohortTrainer, clients: Population) -> Message:
    """Train what rank 0 tells until it says that the job is over; for the other ranks.

    Args:
        ranks: all of them.
        trainer: trains this rank's part.
        clients: all of them, by name.

    Returns:
        What rank 0 says at the end.

    Raises:
        RoundError: the job has failed, here or at another rank, or rank 0 is lost.
    """
    while True:
        order, handed_out = ranks.hear()
        if order["do"] == "end":
            if order["error"]:
                raise RoundError(
                    f"rank {ranks.rank} of {ranks.size} ends, because the job has: {order['error']}"
                )
            return order, handed_out
        own = clients.some(order["clients"][ranks.rank])
        if not order["keep"] and isinstance(trainer, ManyAtOnce):
            try:
                _summed(ranks, trainer, own, trainer.start(handed_out), order)
            except _OwnFailureError as failure:
                ranks.answer({"error": str(failure)})
            continue
        try:
            updates = _train(trainer, own, order, handed_out)
        except Exception as error:
            ranks.answer({"error": _told(ranks, error)})
        else:
            ranks.answer(*_written_updates(updates))


def share_out(amounts: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Give clients to ranks so that all have about as much to do: the largest first, to who has the least.

    Args:
        amounts: samples that each client processes.
        num_ranks: how many ranks there are.

    Returns:
        For each rank the places of its clients, ascending; each place once in all.
    """
    loads = [(0.0, rank) for rank in range(num_ranks)]
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in sorted(range(len(amounts)), key=lambda place: -amounts[place]):
        load, rank = heapq.heappop(loads)
        parts[rank].append(place)
        heapq.heappush(loads, (load + amounts[place], rank))
    return [sorted(part) for part in parts]


class _OwnFailureError(Exception):
    """This rank's training failed, and rank 0 waits for the reason."""


def _summed(
    ranks: Ranks, trainer: ManyAtOnce, own: SomeClients, start: RoundStart, order: Mapping[str, Any]
) -> CohortResult:
    """Train this rank's part and add up everybody's; at rank 0, the result of the whole cohort.

    The vector of each rank: [R] who has failed, [P] the sum of the parameters, the sums of the statistics, and [K, 7]
    figures of each client, which one rank alone fills in. In double precision, so that a client's weight does not
    depend on who trained it.

    Raises:
        TrainingError: rank 0 has failed, or another.
        _OwnFailureError: another rank than 0 has failed.
    """
    failed = torch.zeros(ranks.size, dtype=torch.float64)
    total = torch.zeros(len(start.parameters), dtype=torch.float64)
    buffers = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in start.statistics.items()
    }
    figures = torch.zeros(order["num_clients"], 7, dtype=torch.float64)
    failure: Exception | None = None
    try:
        if own:
            result = trainer.run(own, start, round=order["round"], states=order["states"], keep=False)
            total.copy_(result.total)
            for name, tensor in result.buffers.items():
                buffers[name].copy_(tensor)
            figures[order["places"][ranks.rank]] = torch.cat([result.figures.t(), result.evaluation], 1)
    except Exception as error:
        failure = error
        failed[ranks.rank] = 1
    pieces = [failed, total, *(tensor.flatten() for tensor in buffers.values()), figures.flatten()]
    summed = ranks.add(torch.cat(pieces)).split([piece.numel() for piece in pieces])
    if failure is not None and not ranks.is_first:
        raise _OwnFailureError(_told(ranks, failure)) from failure
    if ranks.is_first:
        told = [ranks.answer_of(rank)[0]["error"] for rank in summed[0].nonzero().flatten().tolist() if rank]
        if failure is not None:
            raise failure
        if told:
            raise TrainingError(told[0])
    return CohortResult(
        figures=summed[-1].view(-1, 7)[:, :4].t(),
        evaluation=summed[-1].view(-1, 7)[:, 4:],
        total=summed[1].to(start.parameters.dtype),
        buffers={
            name: sums.view_as(tensor)
            for (name, tensor), sums in zip(buffers.items(), summed[2:-1], strict=True)
        },
        parameters=start.parameters.new_empty(0, len(start.parameters)),
    )


def _train(
    trainer: CohortTrainer,
    own: SomeClients,
    order: Mapping[str, Any],
    handed_out: Mapping[str, torch.Tensor],
) -> Sequence[ClientUpdate]:
    """This rank's updates, each by itself."""
    if not own:
        return []
    return trainer.train(own, round=order["round"], states=order["states"], handed_out=handed_out, keep=True)


def _written_updates(updates: Sequence[ClientUpdate]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Updates as a message."""
    head = {
        "updates": [
            {"client": update.client, "reports": [report.model_dump_json() for report in update.reports]}
            for update in updates
        ]
    }
    return head, {f"{i} {name}": update[name] for i, update in enumerate(updates) for name in update}


def _read_updates(message: Message, round: int) -> list[ClientUpdate]:
    """The updates of a message.

    Raises:
        TrainingError: the rank has failed, and says so.
    """
    head, tensors = message
    if "error" in head:
        raise TrainingError(head["error"])
    own: list[dict[str, torch.Tensor]] = [{} for _ in head["updates"]]
    for key, tensor in tensors.items():
        place, _, name = key.partition(" ")
        own[int(place)][name] = tensor
    blank = ClientUpdate("", round, {}, ())
    return [
        replace(
            blank,
            client=told["client"],
            tensors=held,
            reports=tuple(map(DeviceReport.model_validate_json, told["reports"])),
        )
        for told, held in zip(head["updates"], own, strict=True)
    ]


def _told(ranks: Ranks, error: Exception) -> str:
    """An error of this rank, for rank 0 to tell the user."""
    if not isinstance(error, FedmpError):
        _LOG.error("rank %d of %d failed", ranks.rank, ranks.size, exc_info=error)
        return f"rank {ranks.rank} of {ranks.size}: {type(error).__name__}: {error}"
    return f"rank {ranks.rank} of {ranks.size}: {error}"
