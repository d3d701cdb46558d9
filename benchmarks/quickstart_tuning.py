"""Choose the quickstart's two learning rates equally carefully: the same grid for both sides.

    python benchmarks/quickstart_tuning.py [--seeds 1 2 3] [--rates 0.02 0.03 0.05] [HYDRA_OVERRIDE ...]

For each learning rate, trains the quickstart's federation (simulated: the same arithmetic as the real one) and its
centralized rival: the same model, data and number of samples processed, each side with its own batch size.
Overrides change both. Prints the test accuracies and the gap between each side's best rate, and writes
benchmarks/results/quickstart_tuning.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from fedmp.config import config_dir, load_config

RATES = (0.01, 0.02, 0.03, 0.05, 0.07)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    rows = [measure(options.overrides, rate, options.seeds) for rate in options.rates]
    best = {
        side: max(rows, key=lambda row: statistics.mean(row[side])) for side in ("federated", "centralized")
    }
    for side, row in best.items():
        print(f"best {side}: lr {row['lr']}, accuracy {statistics.mean(row[side]):.4f}")
    gap = statistics.mean(best["centralized"]["centralized"]) - statistics.mean(
        best["federated"]["federated"]
    )
    print(f"gap: {100 * gap:.2f} points, the mean over {len(options.seeds)} seeds")
    path = Path(__file__).parent / "results" / "quickstart_tuning.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"options": vars(options), "rows": rows, "gap": gap}, indent=1))
    print(f"wrote {path}")


def measure(overrides: list[str], rate: float, seeds: list[int]) -> dict[str, Any]:
    """Both sides at one learning rate, for every seed."""
    row: dict[str, Any] = {"lr": rate, "federated": [], "centralized": []}
    for seed in seeds:
        rates = [f"optimizer.lr={rate}", f"centralized.optimizer.lr={rate}", f"seed={seed}"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = load_config(compose("config", [*overrides, *rates]))
        with tempfile.TemporaryDirectory() as folder:
            summary = config.job().run("simulate", run_dir=folder, observe=lambda event: None).summary
        row["federated"].append(summary.final_accuracy)
        row["centralized"].append(summary.centralized_accuracy)
    print(f"lr {rate}: federated {row['federated']}, centralized {row['centralized']}", flush=True)
    return row


if __name__ == "__main__":
    main()
