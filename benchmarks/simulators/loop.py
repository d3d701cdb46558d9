"""A careful loop in plain PyTorch: one model, overwritten for each client; each client's SGD by hand.

Two processes take every other client of a round and add their sums.
"""

from __future__ import annotations

import os
import sys

import torch
from common import Report, Work
from torch.nn import functional as F

torch.set_num_threads(1)
work = Work(sys.argv[1])
report = Report(work)
addresses = os.environ.get("PFL_WORKER_ADDRESSES", "localhost").split(",")
rank = int(os.environ.get("PFL_WORKER_RANK", "0"))
if len(addresses) > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{addresses[0]}", rank=rank, world_size=len(addresses)
    )
model = work.make_model()
parameters = list(model.parameters())
state = [p.detach().clone() for p in parameters]
generator = torch.Generator().manual_seed(0)


def load(values):
    with torch.no_grad():
        for p, s in zip(parameters, values, strict=False):
            p.copy_(s)


report.begin()
for _ in range(work.rounds):
    cohort = torch.randperm(len(work.rows), generator=generator)[: work.cohort].tolist()
    total = sum(len(work.rows[c]) for c in cohort)
    sums = [torch.zeros_like(p) for p in parameters]
    for client in cohort[rank :: len(addresses)]:
        rows = work.rows[client]
        load(state)
        for batch in rows[torch.randperm(len(rows))].split(work.batch_size):
            gradients = torch.autograd.grad(F.cross_entropy(model(work.x[batch]), work.y[batch]), parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=False):
                    p.sub_(g, alpha=work.lr)
        with torch.no_grad():
            for s, p in zip(sums, parameters, strict=False):
                s.add_(p, alpha=len(rows) / total)
    if len(addresses) > 1:
        flat = torch.cat([s.flatten() for s in sums])
        torch.distributed.all_reduce(flat)
        sums = [f.view_as(s) for f, s in zip(flat.split([s.numel() for s in sums]), sums, strict=False)]
    state = sums
    load(state)
    if report.round(lambda: work.accuracy(model)):
        break
report.finish()
