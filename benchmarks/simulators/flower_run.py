"""Flower: its in-process Ray simulation with the fewest resources a client, so that it runs all at once."""

from __future__ import annotations

import sys
from collections import OrderedDict

import torch
from common import Report, Work, make_model
from torch.nn import functional as F

torch.set_num_threads(1)
report, work = Report(), Work(sys.argv[1])
from flwr.client import ClientApp, NumPyClient  # noqa: E402
from flwr.common import ndarrays_to_parameters  # noqa: E402
from flwr.server import ServerApp, ServerAppComponents, ServerConfig  # noqa: E402
from flwr.server.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

names = list(make_model(work.name).state_dict())


def load(model, arrays):
    model.load_state_dict(
        OrderedDict((n, torch.from_numpy(a.copy())) for n, a in zip(names, arrays, strict=False))
    )


class Client(NumPyClient):
    def __init__(self, client):
        self.rows, self.model = work.rows[client], make_model(work.name)

    def fit(self, parameters, config):
        load(self.model, parameters)
        weights = list(self.model.parameters())
        for batch in self.rows[torch.randperm(len(self.rows))].split(work.batch_size):
            gradients = torch.autograd.grad(
                F.cross_entropy(self.model(work.x[batch]), work.y[batch]), weights
            )
            with torch.no_grad():
                for p, g in zip(weights, gradients, strict=False):
                    p.sub_(g, alpha=work.lr)
        return [v.numpy() for v in self.model.state_dict().values()], len(self.rows), {}


last = {}


class Marked(FedAvg):
    def configure_fit(self, server_round, parameters, client_manager):
        if server_round == 1:
            report.begin()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round, results, failures):
        found = super().aggregate_fit(server_round, results, failures)
        last["parameters"] = found[0]
        report.round()
        return found


def server_fn(context):
    start = [v.numpy() for v in make_model(work.name).state_dict().values()]
    share = work.cohort / len(work.rows)
    strategy = Marked(
        fraction_fit=share,
        min_fit_clients=work.cohort,
        min_available_clients=len(work.rows),
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(start),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=work.rounds))


run_simulation(
    server_app=ServerApp(server_fn=server_fn),
    client_app=ClientApp(
        client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client()
    ),
    num_supernodes=len(work.rows),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
from flwr.common import parameters_to_ndarrays  # noqa: E402

model = make_model(work.name)
load(model, parameters_to_ndarrays(last["parameters"]))
report.finish(work.accuracy(model))
