"""Peak memory of each device's process, against the whole model in one process and against the plan.

A model of about 400 MB is traced and planned on the meta device; each process materializes its own stage
alone, as a device does with what the coordinator sends. No process, this one included, ever holds the
whole model, but for the one that is measured for comparison.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, LAYERS, STAGES = 3584, 8, 4
BATCH, MICROBATCHES = 64, 8
RESULTS = Path(__file__).parent / "results"


def build() -> nn.Sequential:
    """About 400 MB of float32 parameters, on the current default device."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)


def memory_bytes(field: str) -> int:
    """This process's memory: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def settled_bytes() -> int:
    """What torch itself takes once its kernels, its autograd and an optimizer have run."""
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    return memory_bytes("VmRSS")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Small next to the model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(
        0, WIDTH, (BATCH,), generator=generator
    )


def run_stage(rank: int, pipe: Connection, blueprint: Any, checkpoint: bool) -> None:
    """One device: two optimizer steps, then its peak above what torch itself takes."""
    from fedmp.pipeline import (
        DistributedTransport,
        MicroBatches,
        RunnerOptions,
        StageRunner,
        host_rendezvous,
        join_rendezvous,
        microbatch_sizes,
    )
    from fedmp.schedule import OneFOneB
    from fedmp.stages import Stage
    from fedmp.tasks import CrossEntropy

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1", timeout_s=300)
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv(), timeout_s=300)
    transport = DistributedTransport(rendezvous, rank=rank, world_size=STAGES, prefix="memory", timeout_s=300)
    inputs, targets = batch()
    sizes = microbatch_sizes(BATCH, MICROBATCHES)
    parts = MicroBatches(sizes, [(part,) for part in inputs.split(sizes)], targets.split(sizes))
    before = settled_bytes()
    stage = Stage(blueprint).materialize("cpu")
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.01)
    runner = StageRunner(stage, CrossEntropy(), transport, options=RunnerOptions(checkpoint=checkpoint))
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-3, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        runner.train_batch(parts, OneFOneB(), round=1, step=step)
        runner.finish_gradients(round=1, step=step)
        optimizer.step()
    transport.close()
    pipe.send((before, memory_bytes("VmHWM"), runner.buffer_bytes))


def run_whole(pipe: Connection) -> None:
    """The whole model in one process, on the same micro-batches."""
    torch.set_num_threads(1)
    inputs, targets = batch()
    before = settled_bytes()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        for x, y in zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
            (nn.functional.cross_entropy(model(x), y) / MICROBATCHES).backward()
        optimizer.step()
    pipe.send((before, memory_bytes("VmHWM"), 0))


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", action="store_true", help="keep only each stage's inputs")
    options = parser.parse_args()
    from fedmp import partition
    from fedmp.stages import split_graph
    from fedmp.topology import Device

    with torch.device("meta"):
        model, example = build(), torch.empty(BATCH, WIDTH)
    plan = partition(
        model,
        (example,),
        devices=[Device(f"d{i}") for i in range(STAGES)],
        partitioner="uniform",
        schedule="1f1b",
        num_microbatches=MICROBATCHES,
    )
    assert plan.graph is not None
    blueprints = [s.blueprint for s in split_graph(plan.graph, plan, device="cpu")]

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_whole, args=(there,))
    process.start()
    before, peak, _ = here.recv()
    process.join()
    whole = peak - before
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    print(f"{parameters / 1e6:.0f} MB of parameters, SGD with momentum, {BATCH} samples in {MICROBATCHES}")
    print(f"whole model, one process   {whole / 1e6:8.0f} MB over {before / 1e6:.0f} MB of torch itself")

    pipes = [context.Pipe() for _ in range(STAGES)]
    processes = [
        context.Process(target=run_stage, args=(rank, pipes[rank][1], blueprints[rank], options.checkpoint))
        for rank in range(STAGES)
    ]
    for process in processes:
        process.start()
    port = pipes[0][0].recv()
    for mine, _ in pipes[1:]:
        mine.send(port)
    rows = []
    for rank, (mine, _) in enumerate(pipes):
        before, peak, buffers = mine.recv()
        planned = plan.stages[rank].memory_bytes
        rows.append({"stage": rank, "peak_bytes": peak - before, "plan_bytes": planned, "buffers": buffers})
        print(
            f"stage {rank}                    {(peak - before) / 1e6:8.0f} MB, plan {planned / 1e6:.0f} MB "
            f"({(peak - before) / planned:.2f} of it), {(peak - before) / whole:.2f} of the whole model's"
        )
    for process in processes:
        process.join()
    print(f"this process               {memory_bytes('VmHWM') / 1e6:8.0f} MB at its peak, torch included")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pipeline_memory.json").write_text(
        json.dumps({"whole_bytes": whole, "stages": rows}, indent=2)
    )


if __name__ == "__main__":
    main()
