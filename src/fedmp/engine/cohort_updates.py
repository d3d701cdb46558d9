"""The updates of clients that were trained at once: each read when asked for, or summed up already."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from fedmp.cohort import CohortResult, FlatLayout, RoundStart
from fedmp.coordinator import ClientUpdate
from fedmp.engine.population import SomeClients
from fedmp.records import DeviceReport

__all__ = ["CohortUpdates"]

_REPORTED = (
    "num_examples",
    "num_samples",
    "num_steps",
    "loss_sum",
    "weight",
    "num_correct",
    "rate_sum",
    "evaluation_loss_sum",
    "evaluation_weight",
    "evaluation_correct",
    "pipeline_bytes",
)
# an update tells the same of these
_SUMMED = tuple(name for name in _REPORTED if name not in ("rate_sum", "num_correct"))


class CohortUpdates(Sequence[ClientUpdate]):
    """A cohort's updates, which are already summed up where only their mean is wanted.

    Args:
        cohort: who trained.
        result: of the training.
        layout: of the trained parameters.
        start: from which they were trained.
        still: names of what an update holds beside what was trained: buffers that training left alone.
        own: names of what stays at the clients.
        round: in which.
    """

    def __init__(
        self,
        cohort: SomeClients,
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
        reported = _reported(cohort, result, round)
        start_losses = _means(reported["evaluation_loss_sum"], reported["evaluation_weight"])
        losses = _means(reported["loss_sum"], reported["weight"])
        self._reported = reported
        self._made: dict[int, ClientUpdate] = {}
        self._figures: dict[str, Sequence[Any]] = {
            "client": cohort.names,
            "round": [round] * len(cohort),
            "generation": [""] * len(cohort),
            "start_loss": start_losses,
            "loss": [own if told is None else told for told, own in zip(start_losses, losses, strict=True)],
            **{name: reported[name] for name in _SUMMED},
        }

    @overload
    def __getitem__(self, place: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ClientUpdate]: ...
    def __getitem__(self, place: int | slice) -> ClientUpdate | Sequence[ClientUpdate]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, place: int) -> ClientUpdate:
        report = DeviceReport(**{name: column[place] for name, column in self._reported.items()})
        client, round = (self._figures[name][place] for name in ("client", "round"))
        return ClientUpdate(client, round, _Own(self, place), (report,))

    def __len__(self) -> int:
        return len(self._figures["client"])

    def figures(self, name: str) -> Sequence[Any]:
        """One attribute of each update (`fedmp.strategy.figures`)."""
        known = self._figures.get(name)
        return [getattr(update, name) for update in self] if known is None else known

    def weighted_mean(self, weights: Sequence[float]) -> dict[str, torch.Tensor] | None:
        """The mean of all, without any of them; None if it was summed with other weights."""
        if list(weights) != self._reported["num_examples"]:
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


def _reported(cohort: SomeClients, result: CohortResult, round: int) -> dict[str, Sequence[Any]]:
    """What each client reports, by field of `DeviceReport`."""
    amounts = cohort.amounts(round)
    columns = [
        [amount.examples for amount in amounts],
        cohort.sizes,
        [amount.steps for amount in amounts],
        *result.figures.tolist(),
        *result.evaluation.t().tolist(),
        cohort.pipeline_bytes(round),
    ]
    return dict(zip(_REPORTED, columns, strict=True))


def _means(sums: Sequence[float], weights: Sequence[float]) -> list[float | None]:
    return [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)
