"""Simulators side by side, in one run: fedmp, pfl-research, Flower, and a careful loop in plain PyTorch.

    python benchmarks/simulation.py                        # all workloads, all contenders, and how seconds grow
    python benchmarks/simulation.py --only W1,W3 --contenders fedmp pfl
    python benchmarks/simulation.py --only W2 --repeats 5  # of each contender the run with the median of the medians
    python benchmarks/simulation.py --quick                # a few rounds of everything, to see that it runs
    python benchmarks/simulation.py --growth               # only how seconds a round grow

Every contender runs in processes of its own with the same arrays, the same split, the same model from the same
seed; pfl and the loop also in two processes, Flower with as many actors as there are cores. The rivals have
environments that this script makes where they are absent. Reported: the median seconds of a round after the
first fifth, start to finish, seconds from the command to the first round, the largest proportional set size of all
processes of a contender, and accuracy: for W3, where it goes up and down, the mean of every fifth of the last 20
rounds. All test only where it is needed, but for fedmp on W3, which tests in every fifth round; W4, which ends when
its accuracy is reached, is tested after every round by all.

Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulators.contenders import CONTENDERS, compile_ours, environment, run
from simulators.growth import measure_growth
from simulators.workloads import WORKLOADS, write

RIVALS = ("pfl", "flower", "loop")
STARTUP_S, W3_S = 4.0, 10.0
QUICK_ROUNDS = 3


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/simulation"))
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path.home() / ".cache/fedmp-rivals",
        help="the rivals' environments",
    )
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, e.g. W1,W3")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, in turn")
    parser.add_argument("--growth", action="store_true", help="only how seconds a round grow")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of each, a smoke test")
    parser.add_argument("--timeout-s", type=float, default=240, help="of each contender's run")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(WORKLOADS)):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    compile_ours()
    if not options.growth:
        compare(names, options)
    if options.growth or names == list(WORKLOADS):
        measure_growth(
            options.out,
            environment("pfl", options.environments),
            quick=options.quick,
            timeout_s=options.timeout_s,
        )
    print(f"\nall of it took {(time.monotonic() - began_s) / 60:.1f} minutes; written to {options.out}")


def compare(names: list[str], options: argparse.Namespace) -> None:
    """Every contender on every workload, as tables and as JSON."""
    results: dict[str, Any] = {"load_before": os.getloadavg(), "cores": os.cpu_count(), "workloads": {}}
    for name in names:
        work = WORKLOADS[name]
        if options.quick:
            work = replace(work, rounds=QUICK_ROUNDS, target=None)
        path = write(name, work, options.out, environment("pfl", options.environments))
        print(f"\n{name}: {work.title}, {work.rounds} rounds", flush=True)
        print(f"  {'':10}{'s/round':>9}{'best':>9}{'start s':>9}{'total s':>9}{'PSS MB':>8}  accuracy")
        runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in options.contenders}
        found: dict[str, dict[str, Any]] = {}
        # in turn, as a machine's speed goes up and down
        for contender in options.contenders * options.repeats:
            runs[contender].append(
                run(
                    contender,
                    path,
                    environments=options.environments,
                    logs=options.out,
                    timeout_s=options.timeout_s,
                )
            )
            print(f"  {contender:10}{_row(runs[contender][-1])}", flush=True)
            by_speed = sorted(runs[contender], key=lambda one: one.get("median_s", math.inf))
            found[contender] = by_speed[(len(by_speed) - 1) // 2]
            results["workloads"][name] = found
            (options.out / "simulation.json").write_text(json.dumps(results, indent=1))
        if options.repeats > 1:
            print("  the run of each with the median of the medians:")
            for contender, row in found.items():
                print(f"  {contender:10}{_row(row)}", flush=True)
        results["workloads"][name] = found | {"ratios": ratios(name, found)}
        (options.out / "simulation.json").write_text(json.dumps(results, indent=1))
        path.unlink()
        for line in verdict(name, found):
            print(f"  {line}", flush=True)


def _row(found: dict[str, Any]) -> str:
    def cell(key: str, width: int, digits: int) -> str:
        return f"{found[key]:{width}.{digits}f}" if key in found else " " * (width - 1) + "-"

    text = cell("median_s", 9, 4) + cell("best_s", 9, 4) + cell("startup_s", 9, 1) + cell("wall_s", 9, 1)
    text += cell("peak_mb", 8, 0) + (f"  {found['accuracy']:.3f}" if "accuracy" in found else "  -")
    if "target_round" in found:
        text += f", reached in {found['target_round']} rounds, {found['target_s']:.1f} s"
    if "failed" in found:
        text += f"  ({found['failed']}; {found['rounds']} rounds done)"
    return text


def ratios(name: str, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast fedmp is as the best setting of each rival, by median seconds of a round."""
    best: dict[str, float] = {}
    for contender, result in found.items():
        kind = contender.partition("-")[0]
        if "median_s" in result:
            best[kind] = min(best.get(kind, float("inf")), result["median_s"])
    return {rival: best[rival] / best["fedmp"] for rival in RIVALS if rival in best and "fedmp" in best}


def verdict(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """What was wanted, and what it is."""
    targets = WORKLOADS[name].targets
    lines = [
        f"fedmp is {ratio:.1f} times as fast as {rival}"
        + (f" (wanted: {targets[rival]:g} times)" if rival in targets else "")
        for rival, ratio in ratios(name, found).items()
    ]
    ours = found.get("fedmp", {})
    if "startup_s" in ours:
        lines.append(
            f"from the command to the first round: {ours['startup_s']:.1f} s (wanted: {STARTUP_S:g} s)"
        )
        lines.append(
            f"from the command to the result: {ours['wall_s']:.1f} s"
            + (f" (wanted: {W3_S:g} s)" if name == "W3" else "")
        )
        theirs = [result["peak_mb"] for key, result in found.items() if key.startswith("pfl")]
        if theirs:
            lines.append(
                f"peak memory: {ours['peak_mb']:.0f} MB (wanted: no more than pfl's {min(theirs):.0f} MB)"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
