"""How fedmp's seconds a round and memory grow with the cohort, the population and the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulators.contenders import run
from simulators.workloads import WORKLOADS, Workload, write

__all__ = ["measure_growth"]

ROUNDS = 40  # steps are recorded after some
BASE = replace(WORKLOADS["W2"], rounds=ROUNDS)
COHORTS = (10, 30, 100, 300, 1000)
POPULATIONS = (100, 1000, 10_000, 100_000)
HIDDEN = (32, 128, 512, 2048)


def measure_growth(out: Path, digits_python: str, *, quick: bool, timeout_s: float) -> None:
    """Print tables, and write `growth.json` and `growth.png`.

    Args:
        out: a folder.
        digits_python: an interpreter that has scikit-learn.
        quick: only the smallest and a larger one of each.
        timeout_s: of each point.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for what, points in _points().items():
        unit = "parameters" if what == "model" else "clients"
        print(f"\n{what:>12}, {unit}{'s/round':>9}{'PSS MB':>8}", flush=True)
        for size, work in points[:2] if quick else points:
            path = write("W2", work, out, digits_python)
            found = run("fedmp", path, environments=out, logs=out, timeout_s=timeout_s)
            if "failed" in found:
                print(f"{size:{14 + len(unit)},}  {found['failed']}", flush=True)
                continue
            rows.setdefault(what, []).append(
                {"size": size, "seconds": found["median_s"], "peak_mb": found["peak_mb"]}
            )
            print(f"{size:{14 + len(unit)},}{found['median_s']:9.4f}{found['peak_mb']:8.0f}", flush=True)
    (out / "growth.json").write_text(json.dumps(rows, indent=1))
    _draw(rows, out / "growth.png")


def _points() -> dict[str, list[tuple[int, Workload]]]:
    """What is varied, one thing at a time; the model's middle is as wide as its first layer."""
    return {
        "cohort": [(cohort, replace(BASE, cohort=cohort)) for cohort in COHORTS],
        "population": [(clients, replace(BASE, clients=clients)) for clients in POPULATIONS],
        "model": [
            (64 * h + h * h + 12 * h + 10, replace(BASE, widths=(64, h, h, 10), rounds=20)) for h in HIDDEN
        ],
    }


def _draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    labels = {"cohort": "clients in a round", "population": "clients in all", "model": "parameters"}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for place, (what, points) in enumerate(rows.items(), start=1):
        axes = figure.add_subplot(1, len(rows), place)
        axes.loglog([p["size"] for p in points], [p["seconds"] for p in points], marker="o", color="#1f5fa8")
        axes.set(xlabel=labels[what], ylabel="seconds a round" if place == 1 else "", ylim=(1e-3, None))
        axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
        memory = axes.twinx()
        memory.semilogx(
            [p["size"] for p in points], [p["peak_mb"] for p in points], marker="s", ls="--", color="#999999"
        )
        memory.set(ylabel="MB (dashed)" if place == len(rows) else "", ylim=(0, None))
    figure.savefig(path, dpi=120)
