"""A job whose clients need no plan: whole models, trained in this process. Nothing is traced at the start.

Tracing a model and planning it costs more than many a simulation (torch's compiler alone takes 2 s to
import), and a population of 100,000 clients should not cost 100,000 objects. What only a plan can tell
(predicted times, boundaries) is therefore not known of such a job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import nn

from fedmp.cohort import Probe
from fedmp.data import TrainTest
from fedmp.engine.job import Job
from fedmp.engine.prepare import ClientSetup, Prepared, example_input, plan_split
from fedmp.graph import LayerGraph, StateSpec, state_specs
from fedmp.records import Plan
from fedmp.strategy import Scope

__all__ = ["Rows", "Unplanned"]


class Rows(Mapping[str, torch.Tensor]):
    """Each client's rows of the training set, in one tensor.

    Args:
        names: the clients.
        parts: as many lists of rows.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[torch.Tensor]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._rows = torch.cat(list(parts))
        sizes = torch.tensor([len(part) for part in parts])
        self._ends: list[int] = [0, *sizes.cumsum(0).tolist()]

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._places[name]
        return self._rows[self._ends[place] : self._ends[place + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def size(self, name: str) -> int:
        """Samples of a client."""
        place = self._places[name]
        return self._ends[place + 1] - self._ends[place]


class Unplanned(Prepared):
    """A job that is ready to be simulated without plans.

    Args:
        job: the job.
        model: with the initial weights.
        data: training and test samples.
        rows: of each client, in the topology's order.
        probe: how the model can be trained for many clients at once.

    What a plan would be needed for is made when it is asked for.
    """

    rows: Rows

    def __init__(self, job: Job, model: nn.Module, data: TrainTest, rows: Rows, probe: Probe) -> None:
        example = example_input(data.train, 1)
        given = {
            "job": job,
            "model": model,
            "data": data,
            "table": (),
            "sample_shape": tuple(example.shape[1:]),
            "sample_dtype": example.dtype,
            "notes": (),
            "scope": Scope(),
            "rows": rows,
            "probe": probe,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def is_planned(self) -> bool:
        """False."""
        return False

    @cached_property
    def _planned(self) -> Prepared:
        return plan_split(self.job, self.data, list(self.rows), list(self.rows.values()))

    @property
    def graph(self) -> LayerGraph:
        """The traced model; traced now, if it was not."""
        return self._planned.graph

    @property
    def clients(self) -> Mapping[str, ClientSetup]:
        """The clients with their plans; made now, if they were not."""
        return self._planned.clients

    @property
    def num_clients(self) -> int:
        """Clients of the job."""
        return len(self.rows)

    @cached_property
    def specs(self) -> Mapping[str, StateSpec]:
        """Of the model's tensors, by canonical name."""
        return state_specs(self.model)

    @property
    def num_devices(self) -> int:
        """Devices of all clients."""
        return self.job.topology.num_devices

    @property
    def plans(self) -> dict[str, Plan]:
        """None were made."""
        return {}

    @property
    def has_clients_data(self) -> bool:
        """True."""
        return True

    def initial_state(self) -> dict[str, torch.Tensor]:
        """The model's own tensors by canonical name."""
        own: dict[str, torch.Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own.update(self.model.named_buffers(remove_duplicate=False))
        return {name: own[name] for name in self.specs}
