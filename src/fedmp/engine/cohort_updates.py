"""The updates of clients that were trained at once: each read when asked for, or summed up already."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import torch

from fedmp.cohort import CohortResult, FlatLayout, RoundStart
from fedmp.coordinator import ClientUpdate
from fedmp.engine.setup import ClientSetup
from fedmp.records import DeviceReport

__all__ = ["CohortUpdates", "Counts"]


class Counts(NamedTuple):
    """How much a client does in a round."""

    batches: int
    examples: int
    steps: int


class CohortUpdates(Sequence[ClientUpdate]):
    """A cohort's updates, which are already summed up where only their mean is wanted.

    Args:
        cohort: who trained.
        counts: how much each one did.
        result: of the training.
        layout: of the trained parameters.
        start: from which they were trained.
        still: names of what an update holds beside what was trained: buffers that training left alone.
        own: names of what stays at the clients.
        round: in which.
    """

    def __init__(
        self,
        cohort: Sequence[ClientSetup],
        counts: Sequence[Counts],
        result: CohortResult,
        layout: FlatLayout,
        start: RoundStart,
        *,
        still: Sequence[str],
        own: Container[str],
        round: int,
    ) -> None:
        self._result, self._layout, self._start = result, layout, start
        self._names = [name for name in (*layout.names, *start.statistics, *still) if name not in own]
        self._updates = [
            ClientUpdate(one.name, round, _Own(self, place), (report,))
            for place, (one, report) in enumerate(zip(cohort, _reports(cohort, counts, result), strict=True))
        ]

    @overload
    def __getitem__(self, place: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ClientUpdate]: ...
    def __getitem__(self, place: int | slice) -> ClientUpdate | Sequence[ClientUpdate]:
        return self._updates[place]

    def __len__(self) -> int:
        return len(self._updates)

    def weighted_mean(self, weights: Sequence[float]) -> dict[str, torch.Tensor] | None:
        """The mean of all, without any of them; None if it was summed with other weights."""
        if list(weights) != [float(update.num_examples) for update in self._updates]:
            return None
        total = float(sum(weights))
        mean = self._layout.by_name(self._result.total / total - self._start.parameters)
        for name, tensor in self._result.buffers.items():
            before = self._start.statistics[name]
            mean[name] = _as(tensor / total - before, before.dtype)
        return {name: mean[name] if name in mean else self._zeros(name) for name in self._names}

    def names(self) -> list[str]:
        """The tensors of each update."""
        return self._names

    def of(self, place: int, name: str) -> torch.Tensor:
        """One client's update of one tensor.

        Raises:
            LookupError: the updates were only summed up.
        """
        result, start = self._result, self._start
        if result.parameters.shape[0] == 0:
            raise LookupError("the updates were summed up as they were made")
        if name in self._layout.spans:
            span = self._layout.spans[name]
            change = result.parameters[place, span.begin : span.end] - start.parameters[span.begin : span.end]
            return change.view(span.shape)
        if name in start.statistics:
            return result.own_buffers[name][place] - start.statistics[name]
        return self._zeros(name)

    def _zeros(self, name: str) -> torch.Tensor:
        return torch.zeros_like(self._start.still[name])


class _Own(Mapping[str, torch.Tensor]):
    """One client's update, read when asked for."""

    def __init__(self, updates: CohortUpdates, place: int) -> None:
        self._updates, self._place = updates, place

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._updates.of(self._place, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates.names())

    def __len__(self) -> int:
        return len(self._updates.names())


def _reports(
    cohort: Sequence[ClientSetup], counts: Sequence[Counts], result: CohortResult
) -> list[DeviceReport]:
    """What each client reports."""
    sums = torch.stack([result.loss_sums, result.weights, result.num_correct, result.rate_sums], 1).tolist()
    reports = []
    for one, count, (loss, weight, correct, rates), told in zip(
        cohort, counts, sums, result.evaluation.tolist(), strict=True
    ):
        reports.append(
            DeviceReport(
                num_examples=count.examples,
                num_samples=one.own_rows.shape[0],
                num_steps=count.steps,
                rate_sum=rates,
                loss_sum=loss,
                weight=weight,
                num_correct=correct,
                evaluation_loss_sum=told[0],
                evaluation_weight=told[1],
                evaluation_correct=told[2],
                pipeline_bytes=one.pipeline_bytes(count.examples),
            )
        )
    return reports


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)
