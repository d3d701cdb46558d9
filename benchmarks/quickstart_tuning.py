"""Choose the quickstart's two learning rates equally carefully: the same grid for both sides.

    python benchmarks/quickstart_tuning.py [--rounds 20] [--seeds 0 1 2]

For each learning rate, trains the federation (simulated: the same arithmetic as the real one) and the
centralized rival, with the same model, data, batch size, momentum and number of samples processed.
Prints the mean test accuracy of each over the seeds and writes benchmarks/results/quickstart_tuning.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

import fedmp
from fedmp.data import Dirichlet, FashionMNISTExcerpt
from fedmp.learning_rate import Cosine
from fedmp.models import CNN
from fedmp.strategy import FedAvg

RATES = (0.01, 0.02, 0.05, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--server-momentum", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-microbatches", type=int, default=1)
    options = parser.parse_args()
    rows = [measure(options, rate) for rate in options.rates]
    for side in ("federated", "centralized"):
        best = max(rows, key=lambda row: statistics.mean(row[side]))
        print(f"best {side}: lr {best['lr']}, accuracy {statistics.mean(best[side]):.4f}")
    path = Path(__file__).parent / "results" / "quickstart_tuning.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1))
    print(f"wrote {path}")


def measure(options: argparse.Namespace, rate: float) -> dict[str, object]:
    """Both sides at one learning rate, for every seed."""
    row: dict[str, object] = {"lr": rate, "federated": [], "centralized": []}
    for seed in options.seeds:
        sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9)
        job = fedmp.Job(
            model=CNN,
            topology=fedmp.Topology(clients=[{"name": f"lab-{x}", "devices": 1} for x in "abc"]),
            data=FashionMNISTExcerpt(),
            split=Dirichlet(alpha=0.5),
            strategy=FedAvg(),
            optimizer=sgd,
            learning_rate=Cosine(),
            server_optimizer=partial(torch.optim.SGD, lr=1.0, momentum=options.server_momentum),
            centralized=fedmp.Centralized(optimizer=sgd),
            rounds=options.rounds,
            batch_size=options.batch_size,
            num_microbatches=options.num_microbatches,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            summary = job.run("simulate", run_dir=folder, observe=lambda event: None).summary
        row["federated"].append(summary.final_accuracy)  # type: ignore[attr-defined]
        row["centralized"].append(summary.centralized_accuracy)  # type: ignore[attr-defined]
    print(f"lr {rate}: federated {row['federated']}, centralized {row['centralized']}", flush=True)
    return row


if __name__ == "__main__":
    main()
