"""A population may be large: what is held does not grow with it, and who trains is who would have trained alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmp import Job, Topology
from fedmp.data import Dataset, Rows
from fedmp.engine.simulate import SimulateEngine
from fedmp.errors import DataError
from fedmp.strategy import FedAvg
from tests.support.jobs import assert_same, run, sgd, weights

NUM_ROWS = 200_000


class Pairs:
    """Each client has two rows of its own."""

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Rows:
        return Rows(torch.arange(2 * num_clients), [2] * num_clients)


class Given:
    """Rows as a user's own split might return them.

    Args:
        parts: each client's.
    """

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def assign(self, dataset: Dataset, num_clients: int, seed: int) -> Any:
        return self.parts


def population_job(clients: Any, cohort: int, *, split: Any = None, num_rows: int = NUM_ROWS) -> Job:
    """A small model, and the same data however many clients there are."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(num_rows, 4, generator=generator),
        torch.randint(0, 3, (num_rows,), generator=generator),
    )
    topology = Topology(clients=clients)
    return Job(
        model=partial(nn.Linear, 4, 3),
        topology=topology,
        data=(x, y, x[:100], y[:100]),
        split=split or Pairs(),
        strategy=FedAvg(fraction=cohort / len(topology.clients)),
        optimizer=sgd(0.1),
        rounds=2,
    )


def many(count: int) -> dict[str, int]:
    return {"count": count, "devices": 1}


def test_a_client_of_many_takes_a_few_bytes() -> None:
    def held(num_clients: int) -> int:
        """Bytes of Python objects, at most, until the first round could begin."""
        job = population_job(many(num_clients), 10, num_rows=20_000)
        tracemalloc.start()
        try:
            topology = Topology(clients=many(num_clients))
            prepared = SimulateEngine().prepare(replace(job, topology=topology))
            assert len(prepared.clients) == num_clients
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    held(10)  # imports
    more = held(10_000) - held(1_000)
    assert more < 9_000 * 60, f"{more / 9_000:.0f} bytes a client"


@pytest.mark.parametrize("kind", [list, tuple, torch.Tensor.numpy])
def test_a_users_split_may_return_any_row_numbers(kind: Any, tmp_path: Path) -> None:
    parts = list(torch.arange(40).split(2))
    expected = run(population_job(many(20), 5, split=Given(parts), num_rows=40), tmp_path / "tensors")
    taken = [kind(part) if kind is torch.Tensor.numpy else kind(part.tolist()) for part in parts]
    result = run(population_job(many(20), 5, split=Given(taken), num_rows=40), tmp_path / "others")
    assert_same(weights(result), weights(expected))


def test_rows_that_the_data_do_not_have_are_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="client c1 row 40, but the 40 rows are numbered from 0 to 39"):
        run(population_job(many(2), 2, split=Given([[0], [40]]), num_rows=40), tmp_path / "run")


@pytest.mark.slow
def test_a_thousand_of_a_hundred_thousand_train_as_if_there_were_no_others(tmp_path: Path) -> None:
    result = run(population_job(many(100_000), 1_000), tmp_path / "all")
    first, second = result.history
    assert result.summary.clients == 100_000
    for record in (first, second):
        places = [int(name.removeprefix("c")) for name in record.clients]
        assert places == sorted(set(places))
        assert len(places) == 1_000
        assert record.num_examples == 2_000
        assert math.isfinite(record.train_loss)
    assert 0 < len({*first.clients} & {*second.clients}) < 100, "another cohort each round"
    assert second.train_loss < first.train_loss
    assert second.wall_s < 5 + 2 * first.wall_s

    job = population_job(many(100_000), 1_000)
    parts = Pairs().assign(job.source().load().train, 100_000, 0)
    own = [parts[int(name.removeprefix("c"))] for name in first.clients]
    clients = [{"name": name, "devices": 1} for name in first.clients]
    alone = run(population_job(clients, 1_000, split=Given(own)), tmp_path / "alone")
    assert alone.history[0].clients == first.clients
    assert (alone.history[0].train_loss, alone.history[0].test_loss) == (first.train_loss, first.test_loss)


SCRIPT = """
import json, sys, tempfile, time
from dataclasses import replace
from tests.engine.test_population import many, population_job
from fedmp.records import RoundStarted
started_s = time.process_time()
begun_s = []

def observe(event):
    if isinstance(event, RoundStarted):
        begun_s.append(time.process_time() - started_s)

with tempfile.TemporaryDirectory() as folder:
    job = replace(population_job(many(int(sys.argv[1])), 1_000), rounds=40)
    result = job.run("simulate", run_dir=f"{folder}/run", observe=observe)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak_kib = int(status["VmHWM"].split()[0])  # ru_maxrss would be that of the process before exec as well
print(json.dumps([peak_kib / 1024, begun_s[0], len(result.history[-1].clients)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_times_the_clients_take_no_more_memory_and_start_as_soon() -> None:
    """The data are the same for both, and so are the row numbers: 8 bytes a sample.

    In 40 rounds a third of the 100,000 take part, of whom their loss and their last round are remembered.
    """

    def measure(num_clients: int) -> tuple[float, float, int]:
        command = [sys.executable, "-c", SCRIPT, str(num_clients)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        peak_mib, begun_s, cohort = json.loads(child.stdout)
        return peak_mib, begun_s, cohort

    few_mib, few_s, _ = measure(1_000)
    many_mib, many_s, cohort = measure(100_000)
    assert cohort == 1_000
    assert many_mib < few_mib + 16
    assert many_s < few_s + 1  # of this process's own time
