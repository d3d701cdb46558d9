"""Every attack against every aggregator on Fashion-MNIST: which of them keep the accuracy of a run without attack.

    python benchmarks/byzantine.py [--setting iid] [--seeds 2] [--attacks sign_flip ...] [--aggregators mean ...]

20 clients, of which 4 attack in every round, train a perceptron on the 6,000 images of the excerpt in the
simulating engine. A setting is one of

- iid: one local epoch a round, images dealt equally at random;
- dirichlet: the same with classes in unequal shares, alpha = 0.5;
- gradients: one local step a round and momentum at the server, the synchronous SGD that a little is enough was
  published for. Updates differ between clients far more than they move, which is where quiet attacks hide.

Each cell is the accuracy on the 1,000 test images, averaged over the last quarter of the rounds and over the seeds.
"Holds" is within three points of federated averaging without attackers. Results go to `results/byzantine-SETTING.json`,
a cell that is there is not run again, and a picture beside it shows all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedmp import Client, Job, Topology
from fedmp.aggregate import (
    Aggregator,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
    WeightedMean,
)
from fedmp.attacks import ALittleIsEnough, Attack, Gaussian, LabelFlip, MinMax, Scaling, SignFlip
from fedmp.data import IID, Dirichlet, FashionMNISTExcerpt, Split
from fedmp.models import MLP
from fedmp.strategy import FedAvg, FedAvgM, Strategy

NUM_CLIENTS, NUM_ATTACKERS = 20, 4
MARGIN = 0.03
AGGREGATORS: dict[str, Aggregator] = {
    "mean": WeightedMean(),
    "median": CoordinateMedian(),
    "trimmed_mean": TrimmedMean(trim=0.2),
    "krum": Krum(num_byzantine=4),
    "multi_krum": MultiKrum(num_byzantine=4),
    "geometric_median": GeometricMedian(),
    "bulyan": Bulyan(num_byzantine=4),
    "norm_clipping": NormClipping(),
    "centered_clipping": CenteredClipping(),
}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign_flip": SignFlip(),
    "scaling": Scaling(),
    "gaussian": Gaussian(),
    "label_flip": LabelFlip(),
    "a_little_is_enough": ALittleIsEnough(),
    "min_max": MinMax(),
}


@dataclass(frozen=True)
class Setting:
    """How the clients train.

    Attributes:
        split: of the images.
        strategy: what clients and server do in a round.
        rounds: how many.
        title: for people.
    """

    split: Split
    strategy: Strategy
    rounds: int
    title: str


SETTINGS = {
    "iid": Setting(IID(), FedAvg(local_epochs=1), 25, "IID"),
    "dirichlet": Setting(Dirichlet(alpha=0.5), FedAvg(local_epochs=1), 25, "Dirichlet 0.5"),
    "gradients": Setting(IID(), FedAvgM(local_steps=1, momentum=0.9), 200, "IID, one step a round"),
}


def accuracy(aggregator: Aggregator, attack: Attack | None, setting: Setting, seed: int) -> float:
    """Mean accuracy of the last quarter of the rounds; chance where the loss is not finite any more."""
    job = Job(
        model=partial(MLP, 784, (64,)),
        topology=Topology(clients=[Client(name=f"c{index}", devices=1) for index in range(NUM_CLIENTS)]),
        data=FashionMNISTExcerpt(),
        split=setting.split,
        strategy=setting.strategy,
        aggregator=aggregator,
        attack=attack,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        rounds=setting.rounds,
        batch_size=20,
        num_microbatches=1,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = job.run("simulate", run_dir=Path(folder) / "run", observe=lambda _: None)
        except Exception as error:  # a diverged model is a result, not a failure of the benchmark
            if "finite" not in str(error):
                raise
            return 0.1
    late = result.history[-max(1, setting.rounds // 4) :]
    return statistics.fmean(record.test_accuracy or 0.0 for record in late)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--setting", choices=SETTINGS, default="iid")
    parser.add_argument("--aggregators", nargs="*", choices=AGGREGATORS, default=list(AGGREGATORS))
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    given = parser.parse_args()
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"byzantine-{given.setting}.json"
    setting = SETTINGS[given.setting]
    cells: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.exists() else {}
    for attack in given.attacks:
        started_s = time.monotonic()
        for name in given.aggregators:
            by_seed = cells.setdefault(attack, {}).setdefault(name, [])
            for seed in range(len(by_seed), given.seeds):
                by_seed.append(accuracy(AGGREGATORS[name], ATTACKS[attack], setting, seed))
                path.write_text(json.dumps(cells, indent=1) + "\n")
        print(f"{attack}: {cells[attack]} in {time.monotonic() - started_s:.0f} s", flush=True)
    found = {
        attack: {name: statistics.fmean(by_seed) for name, by_seed in by_name.items()}
        for attack, by_name in cells.items()
    }
    print(table(found))
    draw(found, path.with_suffix(".png"), setting.title)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row an aggregator, a column an attack; bold where it holds, empty where it has not run."""
    attacks = [attack for attack in ATTACKS if attack in found]
    clean = found.get("none", {}).get("mean", 0.0)
    lines = ["| | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]
    for name in _names(found):
        cells = (found[attack].get(name) for attack in attacks)
        lines.append(f"| `{name}` | " + " | ".join(_cell(value, clean) for value in cells) + " |")
    return "\n".join(lines)


def _names(found: dict[str, dict[str, float]]) -> list[str]:
    return [name for name in AGGREGATORS if any(name in by_name for by_name in found.values())]


def _cell(value: float | None, clean: float) -> str:
    if value is None:
        return ""
    return f"**{value:.1%}**" if value >= clean - MARGIN else f"{value:.1%}"


def draw(found: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """The table as colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attacks, names = [attack for attack in ATTACKS if attack in found], _names(found)
    figure = Figure(figsize=(1.4 + 1.2 * len(attacks), 0.8 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [[found[attack].get(name, math.nan) for attack in attacks] for name in names]
    axes.imshow(
        values,
        vmin=0.1,
        vmax=max(value for by_name in found.values() for value in by_name.values()),
        cmap="viridis",
        aspect="auto",
    )
    for row, own in enumerate(values):
        for column, value in enumerate(own):
            if math.isnan(value):
                continue
            shade = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.1%}", ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(len(attacks)), [attack.replace("_", " ") for attack in attacks], fontsize=9)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=9)
    axes.set_title(
        f"Test accuracy with {NUM_ATTACKERS} of {NUM_CLIENTS} clients attacking, {title}", fontsize=10
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
