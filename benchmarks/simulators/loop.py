"""A careful loop in plain PyTorch: one model, overwritten for each client; each client's SGD by hand."""

from __future__ import annotations

import sys

import torch
from common import Report, Work, make_model
from torch.nn import functional as F

torch.set_num_threads(1)
report, work = Report(), Work(sys.argv[1])
model = make_model(work.name)
parameters = list(model.parameters())
state = [p.detach().clone() for p in parameters]
generator = torch.Generator().manual_seed(0)
report.begin()
for _ in range(work.rounds):
    cohort = torch.randperm(len(work.rows), generator=generator)[: work.cohort].tolist()
    total = sum(len(work.rows[c]) for c in cohort)
    sums = [torch.zeros_like(p) for p in parameters]
    for client in cohort:
        rows = work.rows[client]
        with torch.no_grad():
            for p, s in zip(parameters, state, strict=False):
                p.copy_(s)
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(work.batch_size):
            gradients = torch.autograd.grad(F.cross_entropy(model(work.x[batch]), work.y[batch]), parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=False):
                    p.sub_(g, alpha=work.lr)
        with torch.no_grad():
            for s, p in zip(sums, parameters, strict=False):
                s.add_(p, alpha=len(rows) / total)
    state = sums
    report.round()
with torch.no_grad():
    for p, s in zip(parameters, state, strict=False):
        p.copy_(s)
report.finish(work.accuracy(model))
