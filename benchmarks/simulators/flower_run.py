"""Flower: its in-process Ray simulation with the fewest resources a client, so that it runs all at once."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict

import torch
from common import Report, shared_work
from torch.nn import functional as F

torch.set_num_threads(1)
PATH = sys.argv[1]


work = shared_work(PATH)
report = Report(work)
import ray  # noqa: E402
from flwr.client import ClientApp, NumPyClient  # noqa: E402
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server import ServerApp, ServerAppComponents, ServerConfig  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402


def load(model, arrays):
    names = list(model.state_dict())
    model.load_state_dict(
        OrderedDict((n, torch.from_numpy(a.copy())) for n, a in zip(names, arrays, strict=False))
    )


class Client(NumPyClient):
    def __init__(self, client):
        self.work = shared_work(PATH)
        self.rows, self.model = self.work.rows[client], self.work.make_model()

    def fit(self, parameters, config):
        work, rows = self.work, self.rows
        load(self.model, parameters)
        weights = list(self.model.parameters())
        for batch in rows[torch.randperm(len(rows))].split(work.batch_size):
            gradients = torch.autograd.grad(
                F.cross_entropy(self.model(work.x[batch]), work.y[batch]), weights
            )
            with torch.no_grad():
                for p, g in zip(weights, gradients, strict=False):
                    p.sub_(g, alpha=work.lr)
        return [v.numpy() for v in self.model.state_dict().values()], len(rows), {}


class Marked(FedAvg):
    def configure_fit(self, server_round, parameters, client_manager):
        if server_round == 1:
            report.begin()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round, results, failures):
        found = super().aggregate_fit(server_round, results, failures)
        if failures:
            raise RuntimeError(f"{len(failures)} clients failed: {failures[0]}")

        def test():
            model = work.make_model()
            load(model, parameters_to_ndarrays(found[0]))
            return work.accuracy(model)

        is_reached, is_last = report.round(test), server_round == work.rounds
        if is_reached or is_last:
            report.finish()
        if is_reached and not is_last:
            ray.shutdown()
            os._exit(0)  # Flower has no way to end a simulation early
        return found


def server_fn(context):
    start = [v.numpy() for v in work.make_model().state_dict().values()]
    strategy = Marked(
        fraction_fit=work.cohort / len(work.rows),
        min_fit_clients=work.cohort,
        min_available_clients=len(work.rows),
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(start),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=work.rounds))


def client_fn(context):
    return Client(int(context.node_config["partition-id"])).to_client()


run_simulation(
    server_app=ServerApp(server_fn=server_fn),
    client_app=ClientApp(client_fn=client_fn),
    num_supernodes=len(work.rows),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
