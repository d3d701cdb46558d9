"""pfl-research: FederatedAveraging on its simulated backend."""

from __future__ import annotations

import os
import sys

import torch
from common import Report, Work

torch.set_num_threads(1)
work = Work(sys.argv[1])
report = Report(work)
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.aggregate.weighting import WeightByDatapoints  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.sampling import get_user_sampler  # noqa: E402
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # noqa: E402
from pfl.metrics import Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from torch.nn import functional as F  # noqa: E402

model = work.make_model()


def loss(inputs, targets, is_eval=False):
    model.eval() if is_eval else model.train()
    return F.cross_entropy(model(inputs), targets)


@torch.no_grad()
def metrics(inputs, targets):
    return {"loss": Weighted(float(F.cross_entropy(model(inputs), targets, reduction="sum")), len(targets))}


model.loss, model.metrics = loss, metrics


class Mark(TrainingProcessCallback):
    def on_train_begin(self, *, model):
        report.begin()
        return super().on_train_begin(model=model)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        _, metrics = super().after_central_iteration(
            aggregate_metrics, model, central_iteration=central_iteration
        )
        return report.round(lambda: work.accuracy(model.pytorch_model)), metrics


ids = list(range(len(work.rows)))
data = FederatedDataset(
    lambda user: Dataset(raw_data=[work.x[work.rows[user]], work.y[work.rows[user]]]),
    get_user_sampler("random", ids),
)
wrapped = PyTorchModel(model, torch.optim.SGD, central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=work.cohort,
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
    model=wrapped,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch_size
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=10_000),
    callbacks=[Mark()],
)
if int(os.environ.get("PFL_WORKER_RANK", "0")) == 0:
    report.finish()
