"""Predicted against measured: memory of each stage's process and time of a step, for the four models.

    python benchmarks/costs.py [model ...]

Each model is cut into two stages by `balanced` from measured times. For GPipe and 1F1B, two processes with
one thread each train a few steps over loopback (gloo). A stage's memory is the peak resident size of its
process beyond what it was before the weights were made; a step is timed from barrier to barrier, and a
stage's busy time is its processor time (right also on a machine that is shared). Ratios are predicted /
measured; "with workspace" adds what a backward needs for a moment, which plans do not count yet.
"""

from __future__ import annotations

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
from fedmp.graph.estimate import estimate_calls  # noqa: E402
from fedmp.models import GPT, MLP, ResidualCNN, ViT  # noqa: E402
from fedmp.partition import Balanced  # noqa: E402
from fedmp.pipeline import MicroBatches, StageRunner  # noqa: E402
from fedmp.pipeline.transport import DistributedTransport, host_rendezvous, join_rendezvous  # noqa: E402
from fedmp.schedule import schedule_by_name  # noqa: E402
from fedmp.stages import Stage, StageBlueprint, draw_blueprints  # noqa: E402
from fedmp.tasks import CrossEntropy  # noqa: E402
from fedmp.topology import Device, Link, Links  # noqa: E402

_BATCH, _MICROBATCHES, _STEPS = 128, 8, 3


def _models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    images = torch.randn(_BATCH, 1, 28, 28)
    return {
        "mlp": (MLP(hidden=(4096, 4096, 4096)), images),
        "cnn": (ResidualCNN(widths=(64, 128)), images),
        "gpt": (GPT(256, 128, width=256, num_layers=4, num_heads=4), torch.randint(0, 256, (_BATCH, 128))),
        "vit": (ViT(width=256, num_layers=6, num_heads=4), images),
    }


def main(names: list[str]) -> None:
    """Print a row for every stage."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'model':6} {'schedule':8} {'stage':>5} {'predicted MiB':>13} {'measured MiB':>12} {'ratio':>6} with workspace  busy time"  # noqa: E501
    )
    rows = []
    for name, (model, inputs) in _models().items():
        if names and name not in names:
            continue
        graph = trace(model, (inputs,))
        costs = profile(
            graph, optimizer_copies=1, method="measured", model=model, microbatch_size=_BATCH // _MICROBATCHES
        )
        speed = costs.reference_flops_per_s
        devices = [Device(f"d{i}", flops_per_s=speed, memory_bytes=1 << 40) for i in range(2)]
        links = Links(default=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4))
        for schedule in ("gpipe", "1f1b"):
            plan = Balanced(schedule=schedule).plan(costs, devices, links, num_microbatches=_MICROBATCHES)
            plan = plan.model_copy(update={"fingerprint": graph.fingerprint})
            found = _measure(graph, plan, inputs, schedule)
            for stage, (planned, peak, busy_s) in enumerate(
                zip(plan.stages, found["peaks"], found["busy_s"], strict=True)
            ):
                busy = _MICROBATCHES * (planned.forward_s + planned.backward_s) / busy_s
                ratio = planned.memory_bytes / peak
                extended = planned.memory_bytes + _workspace_bytes(graph, planned, plan.microbatch_size)
                print(
                    f"{name:6} {schedule:8} {stage:5} {planned.memory_bytes / 2**20:13.1f} "
                    f"{peak / 2**20:12.1f} {ratio:6.2f} {extended / peak:14.2f} {busy:10.2f}"
                )
                rows.append(
                    {
                        "model": name,
                        "schedule": schedule,
                        "stage": stage,
                        "memory_ratio": ratio,
                        "with_workspace": extended / peak,
                        "busy": busy,
                    }
                )
            ratio = plan.step_s / found["step_s"]
            print(
                f"{name:6} {schedule:8}  step {plan.step_s * 1e3:11.1f}ms {found['step_s'] * 1e3:10.1f}ms {ratio:6.2f}",
                flush=True,
            )
            rows.append({"model": name, "schedule": schedule, "step_ratio": ratio})
    results = _ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "costs.json").write_text(
        json.dumps({"flops_per_s": measure_flops_per_s(), "rows": rows}, indent=1) + "\n"
    )


def _workspace_bytes(graph: Any, planned: Any, microbatch_size: int) -> float:
    """What a backward needs for a moment: the gradients of one call's inputs and results."""
    calls = estimate_calls(graph.train, graph.state, microbatch_size)
    calls = calls[graph.train.cuts[planned.start] : graph.train.cuts[planned.stop]]
    return max(call.transient_bytes for call in calls)


def _measure(graph: Any, plan: Any, inputs: torch.Tensor, schedule: str) -> dict[str, Any]:
    """Train a few steps in one process a stage."""
    os.environ["OMP_NUM_THREADS"] = "1"
    times = _run_stages(graph, plan, inputs, schedule)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # freed tensors go back to the system at once, which is slow
    )
    memory = _run_stages(graph, plan, inputs, schedule)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return {
        "peaks": [peak for peak, _, _ in memory],
        "busy_s": [busy_s for _, busy_s, _ in times],
        "step_s": max(step_s for _, _, step_s in times),
    }


def _run_stages(graph: Any, plan: Any, inputs: torch.Tensor, schedule: str) -> list[tuple[int, float, float]]:
    """One run of all stages' processes."""
    rendezvous = host_rendezvous("127.0.0.1")
    with ProcessPoolExecutor(plan.num_stages, mp_context=multiprocessing.get_context("spawn")) as pool:
        blueprints = draw_blueprints(graph, plan.cuts)
        runs = [
            pool.submit(_run_stage, blueprint, rendezvous.port, tuple(inputs.shape), inputs.dtype, schedule)
            for blueprint in blueprints
        ]
        return [run.result(timeout=300) for run in runs]


def _run_stage(
    blueprint: StageBlueprint, port: int, shape: tuple[int, ...], dtype: torch.dtype, schedule: str
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
    main(sys.argv[1:])
