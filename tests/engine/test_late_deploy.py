"""A coordinator that is killed while updates are late: what was acknowledged counts, and counts where it would have."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from fedmp.records import Fault
from fedmp.report import RunDirectory
from fedmp.strategy import FedBuff
from tests.support.deployment import Deployment, ends
from tests.support.jobs import assert_same, images, run, tiny_job, topology, weights

NEVER_S = 300.0
# c1 sleeps through its first round, c0 through all after its first: c1's update is late, and alone in round 2
JOB = tiny_job(
    rounds=3,
    topology=topology(2, 1),
    data=images(60),
    strategy=FedBuff(buffer_size=1),
    faults=(
        Fault(device="c1/d0", round=1, phase="push", kind="delay", delay_s=3.0),
        Fault(device="c0/d0", round=2, phase="pull", kind="delay", delay_s=NEVER_S),
    ),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the local engine makes of the job."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(JOB, folder / "run", "local")
    assert [(record.clients, dict(record.stale)) for record in result.history] == TAKEN
    return weights(result)


TAKEN = [(("c0",), {}), (("c1",), {"c1": 1}), (("c1",), {})]

ACCEPTED = "after an update is in the journal, before it is acknowledged"
# in the first round the two devices of c0 report, then c1 in the second and the third
STEPS = [
    ("after the round is opened", (2, 3)),
    ("before an update is checked", (3, 4)),
    (ACCEPTED, (2, 3)),
    ("after an update is noted", (2, 3)),
    ("before it is written down how the round closes", (1, 2)),
    ("after it is written down how the round closes", (1, 2)),
    ("after the round's model is kept for those who are late", (1, 2)),
    ("before the global model moves", (1, 2)),
    ("after the global model moved", (1, 2)),
    ("before the commit", (1, 2)),
    ("after the commit", (1, 2)),
    ("after the journal is closed", (1, 2)),
]


@pytest.mark.parametrize(
    ("step", "nth"),
    [pytest.param(step, nth, marks=pytest.mark.slow) for step, times in STEPS for nth in times],
)
def test_a_coordinator_killed_while_an_update_is_late_ends_with_the_same_model(
    step: str, nth: int, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # it does not wait at the end for a device that sleeps
    with Deployment(tmp_path, JOB, engine={"farewell_s": 0.5}) as federation:
        federation.devices()
        assert ends(federation.coordinator(kill_at=step, nth=nth)) == -signal.SIGKILL
        assert ends(federation.coordinator()) == 0
        assert_same(federation.final_state(), undisturbed)
        rows = RunDirectory.create(federation.folder / "run").read_metrics()
        assert [(row.clients, dict(row.stale)) for row in rows] == TAKEN
