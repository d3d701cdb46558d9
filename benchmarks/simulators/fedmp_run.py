"""fedmp: the simulating engine, as a training script would use it."""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

from common import Report, Work, make_model

report, work = Report(), Work(sys.argv[1])
from functools import partial  # noqa: E402

import torch  # noqa: E402

from fedmp import Job, Topology  # noqa: E402
from fedmp.engine.simulate import SimulateEngine  # noqa: E402
from fedmp.records import Note, RoundFinished, RoundStarted  # noqa: E402
from fedmp.strategy import FedAvg  # noqa: E402


class Rows:
    """The workload's own split."""

    def assign(self, dataset, num_clients, seed):
        return work.rows


reached, started = [], []


def observe(event):
    if isinstance(event, RoundStarted) and not started:
        started.append(True)
        report.begin()
    elif isinstance(event, RoundFinished):
        report.round()
        if work.target and not reached and event.record.test_accuracy >= work.target:
            reached.append((event.record.round, report.marks[-1] - report.marks[0]))
    elif isinstance(event, Note):
        print(event.message, flush=True)


job = Job(
    model=make_model(work.name),
    topology=Topology(clients={"count": len(work.rows), "devices": 1}),
    data=(work.x, work.y, work.x_test, work.y_test),
    split=Rows(),
    strategy=FedAvg(fraction=work.cohort / len(work.rows)),
    optimizer=partial(torch.optim.SGD, lr=work.lr),
    rounds=work.rounds,
    batch_size=work.batch_size,
)
engine = SimulateEngine(workers=int(sys.argv[3]) or None)
with tempfile.TemporaryDirectory() as folder:
    result = job.run(engine, run_dir=f"{folder}/run", observe=observe)
more = {"target_round": reached[0][0], "target_s": reached[0][1]} if reached else {}
report.finish(result.summary.final_accuracy or 0.0, **more)
