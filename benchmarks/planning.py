"""How fast the planners are, and how good their plans: tables, and JSON in benchmarks/results/.

    python benchmarks/planning.py            # about two minutes on one core
    python benchmarks/planning.py --quick    # a tenth of the instances

Speed: `exact` on 50 layers and 8 devices of 3 types; `balanced` and `exact` on 100 layers and 50 devices,
where the exact search is too large and a neighbourhood search takes its place. Quality: the simulated step
time of `uniform`, of the dynamic program for a fixed device order (`balanced`, the published way) and of
`exact` on 100 random problems with 20 layers, 4-8 devices whose speeds spread 1:10, and links of 100 or
1000 Mbit/s. Everything is seeded; only the seconds differ from run to run. Last, a decoder of 7 billion
parameters on the meta device is traced, profiled and planned over 12 devices in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmp.partition import Balanced, Exact, Partitioner, Uniform
from fedmp.records import LayerProfile, Plan, Profile
from fedmp.topology import Device, Link, Links

MEGABIT = 1e6 / 8
RESULTS = Path(__file__).parent / "results" / "planning.json"


@dataclass(frozen=True)
class Problem:
    """A random planning problem."""

    profile: Profile
    devices: tuple[Device, ...]
    links: Links


@dataclass(frozen=True)
class Speed:
    """Planning times of one partitioner on one kind of problem; gaps as shares of the step time.

    Wall-clock seconds, and the processor's, which another process on the machine does not lengthen.
    """

    problem: str
    partitioner: str
    schedule: str
    median_s: float
    worst_s: float
    worst_cpu_s: float
    median_gap: float
    worst_gap: float


@dataclass(frozen=True)
class Quality:
    """Simulated step times as ratios to that of `exact` on the same problems."""

    schedule: str
    partitioner: str
    median: float
    worst: float
    num_proved_optimal: int


@dataclass(frozen=True)
class Large:
    """Planning a model larger than this machine, importing torch not included in the seconds."""

    parameters: int
    seconds: float
    cpu_s: float
    peak_bytes: int
    num_stages: int
    gap: float


def random_problem(seed: int, *, num_layers: int, num_devices: int, num_types: int | None = None) -> Problem:
    """Unequal layers; speeds log-uniform over 1:10; each pair of types linked by 100 or 1000 Mbit/s."""
    rng = random.Random(seed)
    layers = []
    for index in range(num_layers):
        forward_s, boundary_bytes = rng.uniform(0.2, 2.0) * 1e-3, rng.uniform(1e4, 1e5)
        layers.append(
            LayerProfile(
                name=f"layer{index}",
                forward_s=forward_s,
                backward_s=forward_s * rng.uniform(1.7, 2.3),
                parameters=(f"layer{index}.weight",),
                activation_bytes=rng.uniform(1e5, 1e6),
                boundary_bytes=boundary_bytes,
                gradient_bytes=boundary_bytes,
            )
        )
    profile = Profile(
        layers=tuple(layers),
        parameter_bytes={f"layer{index}.weight": rng.randint(10**5, 10**7) for index in range(num_layers)},
        reference_flops_per_s=1e11,
        batch_size=64,
    )
    types = num_types or num_devices
    speeds = [1e11 * 10 ** rng.uniform(0, 1) for _ in range(types)]
    between = {
        pair: Link(rng.choice([100, 1000]) * MEGABIT, 2e-4)
        for pair in itertools.combinations_with_replacement(range(types), 2)
    }
    devices = tuple(Device(f"d{index}", speeds[index % types], 64 << 30) for index in range(num_devices))
    pairs = {
        f"d{a},d{b}": between[min(a % types, b % types), max(a % types, b % types)]
        for a, b in itertools.combinations(range(num_devices), 2)
    }
    return Problem(profile, devices, Links(pairs=pairs))


def timed_plan(
    partitioner: Partitioner, problem: Problem, num_microbatches: int = 8
) -> tuple[Plan, float, float]:
    """A plan, and the seconds and processor seconds it took."""
    start, start_cpu = time.perf_counter(), time.process_time()
    plan = partitioner.plan(
        problem.profile, problem.devices, problem.links, num_microbatches=num_microbatches
    )
    return plan, time.perf_counter() - start, time.process_time() - start_cpu


def measure_speed(num_seeds: int) -> list[Speed]:
    """Time the planners on the problems that issue 3 names."""
    cases: list[tuple[str, dict[str, int], Sequence[Callable[[str], Partitioner]]]] = [
        ("50 layers, 8 devices of 3 types", {"num_layers": 50, "num_devices": 8, "num_types": 3}, [_exact]),
        ("50 layers, 8 different devices", {"num_layers": 50, "num_devices": 8}, [_exact]),
        (
            "100 layers, 50 devices of 3 types",
            {"num_layers": 100, "num_devices": 50, "num_types": 3},
            [_balanced, _exact],
        ),
        ("100 layers, 50 different devices", {"num_layers": 100, "num_devices": 50}, [_balanced, _exact]),
    ]
    rows = []
    for name, sizes, makers in cases:
        problems = [random_problem(seed, **sizes) for seed in range(num_seeds)]
        for maker, schedule in itertools.product(makers, ("1f1b", "gpipe")):
            results = [timed_plan(maker(schedule), problem) for problem in problems]
            seconds, gaps = [took for _, took, _ in results], [plan.gap for plan, _, _ in results]
            rows.append(
                Speed(
                    problem=name,
                    partitioner=results[0][0].partitioner,
                    schedule=schedule,
                    median_s=statistics.median(seconds),
                    worst_s=max(seconds),
                    worst_cpu_s=max(cpu for _, _, cpu in results),
                    median_gap=statistics.median(gaps),
                    worst_gap=max(gaps),
                )
            )
    return rows


def measure_quality(num_instances: int) -> list[Quality]:
    """Compare the planners' simulated step times."""
    problems = [
        random_problem(seed, num_layers=20, num_devices=4 + seed % 5)
        for seed in range(1000, 1000 + num_instances)
    ]
    rows = []
    for schedule in ("1f1b", "gpipe"):
        exact = [timed_plan(_exact(schedule), problem)[0] for problem in problems]
        for maker in (_uniform, _balanced, _exact):
            plans = [timed_plan(maker(schedule), problem)[0] for problem in problems]
            ratios = [plan.step_s / best.step_s for plan, best in zip(plans, exact, strict=True)]
            rows.append(
                Quality(
                    schedule=schedule,
                    partitioner=plans[0].partitioner,
                    median=statistics.median(ratios),
                    worst=max(ratios),
                    num_proved_optimal=sum(plan.gap <= 1e-9 for plan in plans),
                )
            )
    return rows


def plan_7b() -> Large:
    """Trace, profile and plan a model that no machine here could hold."""
    import torch

    import fedmp
    from fedmp.models import GPT

    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with torch.device("meta"):
        model = GPT(32_000, 2048, width=4096, num_layers=34, num_heads=32, dropout=0.0)
        tokens = torch.zeros(4, 512, dtype=torch.long)
    devices = [
        fedmp.Device(
            f"d{index}", flops_per_s=1e12 * (1 + index % 3), memory_bytes=(24 + 8 * (index % 4)) << 30
        )
        for index in range(12)
    ]
    plan = fedmp.partition(model, (tokens,), devices=devices, partitioner="exact", num_microbatches=4)
    return Large(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=time.perf_counter() - start_s,
        cpu_s=time.process_time() - start_cpu_s,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        num_stages=plan.num_stages,
        gap=plan.gap,
    )


def show(speed: Sequence[Speed], quality: Sequence[Quality], num_instances: int) -> None:
    """Print both tables."""
    console = Console(width=132)
    table = Table(
        "problem",
        "partitioner",
        "schedule",
        "seconds, median",
        "worst",
        "worst, CPU",
        "gap, median",
        "worst",
        title="Speed",
    )
    for row in speed:
        table.add_row(
            row.problem,
            row.partitioner,
            row.schedule,
            f"{row.median_s:.2f}",
            f"{row.worst_s:.2f}",
            f"{row.worst_cpu_s:.2f}",
            f"{row.median_gap:.1%}",
            f"{row.worst_gap:.1%}",
        )
    console.print(table)
    table = Table(
        "schedule",
        "partitioner",
        "step time / exact, median",
        "worst",
        "proved optimal",
        title=f"Quality: {num_instances} problems, 20 layers, 4-8 devices, speeds 1:10, 100 and 1000 Mbit/s",
    )
    for row_ in quality:
        table.add_row(
            row_.schedule,
            row_.partitioner,
            f"{row_.median:.3f}",
            f"{row_.worst:.3f}",
            str(row_.num_proved_optimal),
        )
    console.print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the instances")
    num_instances, num_seeds = (10, 1) if parser.parse_args().quick else (100, 5)
    speed, quality = measure_speed(num_seeds), measure_quality(num_instances)
    show(speed, quality, num_instances)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        large = pool.submit(plan_7b).result()
    print(
        f"{large.parameters / 1e9:.1f} billion parameters over 12 devices: {large.seconds:.1f} s, "
        f"{large.cpu_s:.1f} s of CPU, {large.peak_bytes / 2**20:.0f} MiB at the peak; "
        f"{large.num_stages} stages, gap {large.gap:.1%}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    found = {
        "python": platform.python_version(),
        "num_instances": num_instances,
        "speed": [asdict(row) for row in speed],
        "quality": [asdict(row) for row in quality],
        "large": asdict(large),
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {RESULTS}")


def _uniform(schedule: str) -> Partitioner:
    return Uniform(schedule=schedule)


def _balanced(schedule: str) -> Partitioner:
    return Balanced(schedule=schedule)


def _exact(schedule: str) -> Partitioner:
    return Exact(schedule=schedule)


if __name__ == "__main__":
    main()
