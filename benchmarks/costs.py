"""Predicted against measured: memory of each stage's process and time of a step, for the four models.

    python benchmarks/costs.py [--only memory|time] [model ...]

Each model is cut into two stages by `balanced` from measured times. For GPipe and 1F1B, two processes with
one thread each train a few steps over loopback (gloo). Rows:

memory  the peak resident size of a stage's process beyond what it was before the weights were made, as processes
        run on a device whose memory is less than 2.5 times what the plan needs
heap    the same on a device with memory to spare, where malloc is left alone: glibc before 2.38 cannot use most
        freed tensors' places again, so processes grow to up to 2.3 times what they need
busy    a stage's processor time in one step, right also on a machine that is shared
step    a step from barrier to barrier
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "src")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from fedmp.graph import measure_flops_per_s, profile, trace  # noqa: E402
from fedmp.models import GPT, MLP, ResidualCNN, ViT  # noqa: E402
from fedmp.partition import Balanced  # noqa: E402
from fedmp.pipeline import MicroBatches, StageRunner, keep_near_plan  # noqa: E402
from fedmp.pipeline.transport import DistributedTransport, host_rendezvous, join_rendezvous  # noqa: E402
from fedmp.records import Plan  # noqa: E402
from fedmp.schedule import schedule_by_name  # noqa: E402
from fedmp.stages import Stage, StageBlueprint, draw_blueprints  # noqa: E402
from fedmp.tasks import CrossEntropy  # noqa: E402
from fedmp.topology import Device, Link, Links  # noqa: E402

_BATCH, _MICROBATCHES, _STEPS = 128, 8, 3
_SCHEDULES = ("gpipe", "1f1b")
_TOLERANCE = 0.15


def _models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    images = torch.randn(_BATCH, 1, 28, 28)
    return {
        "mlp": (MLP(hidden=(4096, 4096, 4096)), images),
        "cnn": (ResidualCNN(widths=(64, 128)), images),
        "gpt": (GPT(256, 128, width=256, num_layers=4, num_heads=4), torch.randint(0, 256, (_BATCH, 128))),
        "vit": (ViT(width=256, num_layers=6, num_heads=4), images),
    }


def main(names: list[str], *, with_memory: bool, with_time: bool) -> None:
    """Print a row for every stage and one for every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rows: list[dict[str, Any]] = []
    for name, (model, inputs) in _models().items():
        if names and name not in names:
            continue
        graph = trace(model, (inputs,))
        costs = profile(
            graph,
            optimizer_copies=1,
            method="measured" if with_time else "flops",
            model=model,
            microbatch_size=_BATCH // _MICROBATCHES,
        )
        speed = costs.reference_flops_per_s
        devices = [Device(f"d{i}", flops_per_s=speed, memory_bytes=1 << 40) for i in range(2)]
        links = Links(default=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4))
        for schedule in _SCHEDULES:
            plan = Balanced(schedule=schedule).plan(costs, devices, links, num_microbatches=_MICROBATCHES)
            runs = _run_stages(graph, plan, inputs, schedule, is_kept=True)
            rows += _memory_rows("memory", name, plan, runs) if with_memory else []
            rows += _time_rows(name, plan, runs) if with_time else []
            if with_memory:
                alone = _run_stages(graph, plan, inputs, schedule, is_kept=False)
                rows += _memory_rows("heap", name, plan, alone)
                _compare_busy(name, plan, runs, alone)
    for kind in ("memory", "step"):
        ratios = [row["predicted"] / row["measured"] for row in rows if row["kind"] == kind]
        if ratios:
            close = sum(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)
            print(
                f"{kind}: {close} of {len(ratios)} within {_TOLERANCE:.0%}; {min(ratios):.2f} to {max(ratios):.2f}"
            )
    results = _ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    found = {"flops_per_s": measure_flops_per_s(), "rows": rows}
    (results / "costs.json").write_text(json.dumps(found, indent=1) + "\n")


def _memory_rows(
    kind: str, name: str, plan: Plan, runs: list[tuple[int, float, float]]
) -> list[dict[str, Any]]:
    rows = []
    for index, (stage, (peak, _, _)) in enumerate(zip(plan.stages, runs, strict=True)):
        predicted, measured = stage.memory_bytes / 2**20, peak / 2**20
        rows.append(_row(kind, name, plan, f"stage {index}", predicted, measured, "MiB"))
    return rows


def _time_rows(name: str, plan: Plan, runs: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    rows = []
    for index, (stage, (_, busy_s, _)) in enumerate(zip(plan.stages, runs, strict=True)):
        work_s = _MICROBATCHES * (stage.forward_s + stage.backward_s)
        rows.append(_row("busy", name, plan, f"stage {index}", work_s * 1e3, busy_s * 1e3, "ms"))
    step_s = max(step_s for _, _, step_s in runs)
    return [*rows, _row("step", name, plan, "", plan.step_s * 1e3, step_s * 1e3, "ms")]


def _compare_busy(
    name: str, plan: Plan, kept: list[tuple[int, float, float]], alone: list[tuple[int, float, float]]
) -> None:
    """What keeping to the plan costs: processor time of a step against that with malloc left alone."""
    ratio = sum(busy_s for _, busy_s, _ in kept) / sum(busy_s for _, busy_s, _ in alone)
    print(f"cost    {name:5} {plan.schedule:6} processor time of a step: {ratio:.2f} of malloc left alone")


def _row(
    kind: str, name: str, plan: Plan, stage: str, predicted: float, measured: float, unit: str
) -> dict[str, Any]:
    print(
        f"{kind:7} {name:5} {plan.schedule:6} {stage:8} predicted {predicted:8.1f} {unit:3}  "
        f"measured {measured:8.1f} {unit:3}  ratio {predicted / measured:5.2f}",
        flush=True,
    )
    made = {"kind": kind, "model": name, "schedule": plan.schedule, "stage": stage, "unit": unit}
    return made | {"predicted": predicted, "measured": measured}


def _run_stages(
    graph: Any, plan: Plan, inputs: torch.Tensor, schedule: str, *, is_kept: bool
) -> list[tuple[int, float, float]]:
    """One run of all stages' processes."""
    rendezvous = host_rendezvous("127.0.0.1")
    with ProcessPoolExecutor(plan.num_stages, mp_context=multiprocessing.get_context("spawn")) as pool:
        blueprints = draw_blueprints(graph, plan.cuts)
        runs = [
            pool.submit(
                _run_stage,
                blueprint,
                rendezvous.port,
                tuple(inputs.shape),
                inputs.dtype,
                schedule,
                stage.memory_bytes if is_kept else 0,
            )
            for blueprint, stage in zip(blueprints, plan.stages, strict=True)
        ]
        return [run.result(timeout=300) for run in runs]


def _run_stage(
    blueprint: StageBlueprint,
    port: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    schedule: str,
    planned_bytes: int,
) -> tuple[int, float, float]:
    """Peak memory beyond the baseline, and the median processor and wall seconds of a step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transport = DistributedTransport(
        join_rendezvous("127.0.0.1", port),
        rank=blueprint.index,
        world_size=blueprint.num_stages,
        prefix="costs",
    )
    _warm_up()
    stage = Stage(blueprint)
    dist.barrier()
    baseline = _resident_bytes()
    keep_near_plan(planned_bytes, planned_bytes)
    stage.materialize("cpu")
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01, momentum=0.9)
    runner = StageRunner(stage, CrossEntropy(), transport)
    seconds, busy = [], []
    for step in range(_STEPS + 2):
        batch = _batch(blueprint, shape, dtype)
        dist.barrier()
        begin_s, begin_busy_s = time.perf_counter(), time.process_time()
        runner.train_batch(batch, schedule_by_name(schedule), round=0, step=step)
        optimizer.step()
        optimizer.zero_grad()
        busy.append(time.process_time() - begin_busy_s)
        dist.barrier()
        seconds.append(time.perf_counter() - begin_s)
    peak = _peak_bytes() - baseline
    dist.barrier()
    transport.close()
    return peak, statistics.median(busy[2:]), statistics.median(seconds[2:])


def _warm_up() -> None:
    """What libraries allocate once: convolution and product kernels, thread pools."""
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 8))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    block(torch.randn(4, 1, 8, 8)).log_softmax(-1).sum().backward()
    optimizer.step()


def _batch(blueprint: StageBlueprint, shape: tuple[int, ...], dtype: torch.dtype) -> MicroBatches:
    made = torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 256, shape)
    targets = torch.randint(0, 10, shape if dtype == torch.int64 else shape[:1])
    size = _BATCH // _MICROBATCHES
    return MicroBatches(
        sizes=[size] * _MICROBATCHES,
        inputs=[[part] for part in made.split(size)] if blueprint.is_first else None,
        targets=targets.split(size) if blueprint.is_last else None,
    )


def _resident_bytes() -> int:
    """Memory now; the peak starts again from here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(_models())}; all by default")
    parser.add_argument("--only", choices=("memory", "time"))
    chosen = parser.parse_args()
    main(chosen.models, with_memory=chosen.only != "time", with_time=chosen.only != "memory")
