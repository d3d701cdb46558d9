"""fedmp: the simulating engine, as a training script would use it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

from functools import partial

import torch
from common import Report, Work

from fedmp import Job, Topology
from fedmp.records import Note, RoundFinished, RoundStarted
from fedmp.strategy import FedAvg

if "RANK" in os.environ:
    torch.set_num_threads(1)  # as torchrun sets it
work = Work(sys.argv[1])
report = Report(work)


class Rows:
    """The workload's own split."""

    def assign(self, dataset, num_clients, seed):
        return work.rows


class ReachedError(Exception):
    """The target is."""


def observe(event):
    if isinstance(event, RoundStarted) and event.round == 1:
        report.begin()
    elif isinstance(event, RoundFinished):
        if report.round(lambda: event.record.test_accuracy):
            raise ReachedError
    elif isinstance(event, Note):
        print(event.message, flush=True)


job = Job(
    model=work.make_model(),
    topology=Topology(clients={"count": len(work.rows), "devices": 1}),
    data=(work.x, work.y, work.x_test, work.y_test),
    split=Rows(),
    strategy=FedAvg(fraction=work.cohort / len(work.rows)),
    optimizer=partial(torch.optim.SGD, lr=work.lr),
    rounds=work.rounds,
    batch_size=work.batch_size,
    evaluate_every=work.every if work.target or work.tested > 1 else work.rounds,
)
with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ReachedError):
    job.run("simulate", run_dir=f"{folder}/run", observe=observe)
if int(os.environ.get("RANK", "0")) == 0:
    report.finish()
