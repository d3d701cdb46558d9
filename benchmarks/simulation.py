"""Simulators side by side, in one run: fedmp, pfl-research, Flower, and a careful loop in plain PyTorch.

    python benchmarks/simulation.py --out out/simulation            # all workloads, all contenders
    python benchmarks/simulation.py --workloads W2 --contenders fedmp pfl
    python benchmarks/simulation.py --growth                        # how seconds a round grow

Every contender is a process of its own with the same arrays, the same split, the same model from the same
seed, and one process or two. The rivals run in environments that this script makes (`--envs`). Reported: the
median seconds of a round after the first fifth, start to finish, seconds until the first round, the largest
proportional set size of the whole process tree, and accuracy. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
RIVALS = {
    "pfl": ["torch", "pfl[pytorch]==0.6.0", "scikit-learn", "psutil"],
    "flower": ["torch", "flwr[simulation]==1.42.0", "psutil"],
}
CONTENDERS = ["fedmp", "fedmp-1", "pfl", "pfl-2", "loop", "flower"]
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": {"cohort": 50, "batch_size": 10, "rounds": 20, "lr": 0.05, "target": None},
    "W2": {"cohort": 100, "batch_size": 10, "rounds": 50, "lr": 0.1, "target": None},
    "W3": {"cohort": 10, "batch_size": 10, "rounds": 100, "lr": 0.03, "target": None},
    "W4": {"cohort": 10, "batch_size": 10, "rounds": 150, "lr": 0.1, "target": 0.97},
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/simulation"))
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache/fedmp-rivals")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--growth", action="store_true", help="cohort, population and model size instead")
    parser.add_argument("--timeout-s", type=float, default=600)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.growth:
        growth(options)
        return
    results: dict[str, dict[str, Any]] = {}
    for name in options.workloads:
        path = write_workload(name, options)
        results[name] = {c: run(c, path, options) for c in options.contenders}
        (options.out / "simulation.json").write_text(json.dumps(results, indent=1))
        show(name, results[name])


def environment(rival: str, envs: Path) -> str:
    """The python of a rival's environment, which is made if it is not there."""
    python = envs / ("flwr" if (envs / "flwr").exists() and rival == "flower" else rival) / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *RIVALS[rival]], check=True)
    return str(python)


def digits(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn, which lives in a rival's environment."""
    path = options.out / "digits.npz"
    if not path.exists():
        code = (
            "import sys, numpy as np; from sklearn.datasets import load_digits; d = load_digits();"
            "np.savez(sys.argv[1], x=d.images.astype('float32')[:, None] / 16, y=d.target)"
        )
        subprocess.run([environment("pfl", options.envs), "-c", code, str(path)], check=True)
    held = np.load(path)
    return held["x"], held["y"].astype(np.int64)


def mnist() -> tuple[np.ndarray, ...]:
    """MNIST from FEDMP_DATA_DIR."""
    held = np.load(Path(os.environ["FEDMP_DATA_DIR"]) / "mnist.npz")
    images = [held[k].astype(np.float32)[:, None] / 255 for k in ("x_train", "x_test")]
    return images[0], held["y_train"].astype(np.int64), images[1], held["y_test"].astype(np.int64)


def write_workload(name: str, options: argparse.Namespace, **changes: Any) -> Path:
    """Draw a workload's split and write all of it to a file."""
    settings = {"name": name, **WORKLOADS[name], **changes}
    generator = np.random.default_rng(0)
    if name in ("W1", "W2"):
        x, y = digits(options)
        order = generator.permutation(len(x))
        test, train = order[:297], order[297:]
        x, y, x_test, y_test = x[train], y[train], x[test], y[test]
        clients = settings.pop("clients", 50 if name == "W1" else 1000)
        if name == "W1":
            parts = np.array_split(generator.permutation(len(x)), clients)
        else:  # 20 images a client, classes by Dir(0.5); the images are few, so clients share them
            by_class = [np.flatnonzero(y == label) for label in range(10)]
            parts = []
            for _ in range(clients):
                labels = generator.choice(10, 20, p=generator.dirichlet(np.full(10, 0.5)))
                parts.append(np.array([generator.choice(by_class[label]) for label in labels]))
    else:
        x, y, x_test, y_test = mnist()
        parts = (
            power_law(y, generator) if name == "W3" else np.array_split(generator.permutation(len(x)), 100)
        )
    path = options.out / f"{name}.npz"
    np.savez(
        path,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        rows=np.concatenate(parts).astype(np.int64),
        ends=np.cumsum([len(part) for part in parts]),
        settings=json.dumps(settings),
    )
    return path


def power_law(y: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """1,000 clients with two labels each and lognormal sizes (Li et al., 2020, FedProx, appendix C.1)."""
    sizes = np.minimum(np.exp(generator.normal(3.3, 1.0, 1000)).astype(int) + 10, 600)
    by_class = [np.flatnonzero(y == label) for label in range(10)]
    return [
        np.concatenate(
            [generator.choice(by_class[(client + k) % 10], size // 2, replace=False) for k in (0, 1)]
        )
        for client, size in enumerate(sizes)
    ]


def run(contender: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender on a workload."""
    kind, _, processes = contender.partition("-")
    python = sys.executable if kind in ("fedmp", "loop") else environment(kind, options.envs)
    script = {"fedmp": "fedmp_run", "pfl": "pfl_run", "flower": "flower_run", "loop": "loop"}[kind]
    born_s = time.time()
    command = [python, str(HERE / "simulators" / f"{script}.py"), str(path), str(born_s), processes or "0"]
    environ = {**os.environ, "RAY_DEDUP_LOGS": "0"}
    extra: list[subprocess.Popen[str]] = []
    if kind == "pfl" and processes:
        workers = {"PFL_WORKER_ADDRESSES": "localhost:29517,localhost:29518"}
        extra = [
            subprocess.Popen(
                command,
                env={**environ, **workers, "PFL_WORKER_RANK": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        ]
        environ |= {**workers, "PFL_WORKER_RANK": "0"}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    memory = PeakMemory([process.pid, *(other.pid for other in extra)])
    try:
        out, errors = process.communicate(timeout=options.timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    finally:
        for other in extra:
            other.kill()
            other.wait()
        peak = memory.stop()
    line = next((line for line in out.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        print(f"{contender} failed: {errors.strip().splitlines()[-1:] or out[-300:]}")
        return {"failed": errors[-2000:]}
    found = json.loads(line.removeprefix("RESULT "))
    steady = found["rounds_s"][len(found["rounds_s"]) // 5 :]
    return {
        **found,
        "median_s": statistics.median(steady),
        "best_s": min(steady),
        "wall_s": time.time() - born_s,
        "peak_mb": peak / 1e6,
    }


class PeakMemory(threading.Thread):
    """The largest proportional set size of some processes and all below them, looked at twice a second."""

    def __init__(self, roots: list[int]) -> None:
        super().__init__(daemon=True)
        self._roots, self._peak, self._over = roots, 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look until stopped."""
        while not self._over.wait(0.5):
            total = 0
            for root in self._roots:
                try:
                    tree = [psutil.Process(root)]
                    tree += tree[0].children(recursive=True)
                    total += sum(process.memory_full_info().pss for process in tree)
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        """Stop looking; returns bytes."""
        self._over.set()
        self.join()
        return self._peak


def show(name: str, found: dict[str, Any]) -> None:
    """Print a workload's table, and how many times faster fedmp is than each rival's best."""
    print(
        f"\n{name}  {'contender':10} {'s/round':>9} {'best':>9} {'start s':>8} {'total s':>8} {'MB':>6} accuracy"
    )
    done = {c: r for c, r in found.items() if "median_s" in r}
    for contender, r in done.items():
        print(
            f"    {contender:10} {r['median_s']:9.4f} {r['best_s']:9.4f} {r['startup_s']:8.1f} "
            f"{r['wall_s']:8.1f} {r['peak_mb']:6.0f} {r['accuracy']:.3f}"
            + (f"  {r['target_round']} rounds, {r['target_s']:.1f} s to target" if "target_s" in r else "")
        )
    ours = min((r["median_s"] for c, r in done.items() if c.startswith("fedmp")), default=None)
    for rival in ("pfl", "flower", "loop"):
        theirs = min((r["median_s"] for c, r in done.items() if c.startswith(rival)), default=None)
        if ours and theirs:
            print(f"    fedmp is {theirs / ours:.1f} times as fast as {rival}")
    sys.stdout.flush()


def growth(options: argparse.Namespace) -> None:
    """Seconds a round by cohort and by population, as a table and a picture."""
    rows: dict[str, list[tuple[int, float, float]]] = {"cohort": [], "population": []}
    for cohort in (10, 30, 100, 300, 1000):
        path = write_workload("W2", options, cohort=cohort, rounds=10)
        rows["cohort"].append((cohort, *_figures(run("fedmp", path, options))))
    for population in (100, 1000, 10_000, 100_000):
        path = write_workload("W2", options, clients=population, rounds=10)
        rows["population"].append((population, *_figures(run("fedmp", path, options))))
    (options.out / "growth.json").write_text(json.dumps(rows, indent=1))
    for what, points in rows.items():
        print(f"\n{what:>11} {'s/round':>9} {'MB':>6}")
        for size, seconds, megabytes in points:
            print(f"{size:11} {seconds:9.4f} {megabytes:6.0f}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (what, points) in enumerate(rows.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.loglog([p[0] for p in points], [p[1] for p in points], marker="o")
        axes.set(xlabel=f"{what}, clients", ylabel="seconds a round")
    figure.savefig(options.out / "growth.png", dpi=120)


def _figures(found: dict[str, Any]) -> tuple[float, float]:
    return found["median_s"], found["peak_mb"]


if __name__ == "__main__":
    main()
