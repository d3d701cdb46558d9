"""Step time of fedmp's pipeline against torch.distributed.pipelining and one process, in one run.

    python benchmarks/pipeline.py                 two processes, three sizes, against the rival
    python benchmarks/pipeline.py --dilated       four slowed processes, against the event simulator

Two processes with one thread each, gloo over loopback, 8 micro-batches, 1F1B for both. The three ways
take turns within the same processes, so that a busy machine slows all of them alike. The rival runs plain
`nn.Sequential` stages, its best case; fedmp runs the traced stages that its users get. "Ideal" is the
one-process time / 2 x (M + 1) / M, the pipeline's bubble and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

MICROBATCHES = 8
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """A multi-layer perceptron of 9 linear layers and a batch."""

    name: str
    width: int
    batch_size: int
    steps: int


SIZES = (
    Size("tiny", 64, 64, 20),
    Size("medium", 256, 128, 15),
    Size("compute-bound", 1024, 256, 4),
    Size("large micro-batches", 1024, 1024, 2),
)


def build(size: Size) -> nn.Sequential:
    """Eight hidden layers and a head of 10 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(size.width, size.width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(size.width, 10))


class Way:
    """One way to do a training step: gradients of one batch, on this process's part of the model."""

    def __init__(self, step: Callable[[], object], parameters: list[nn.Parameter]) -> None:
        self._step = step
        self.parameters = parameters

    def run(self) -> None:
        """One step."""
        for parameter in self.parameters:
            parameter.grad = None
        self._step()


def make_ours(size: Size, rank: int, transport: object, schedule: object) -> Way:
    """fedmp's runner on a traced stage."""
    from fedmp.graph import trace
    from fedmp.pipeline import MicroBatches, StageRunner, microbatch_sizes
    from fedmp.stages import split_graph
    from fedmp.tasks import CrossEntropy

    model = build(size)
    inputs, targets = batch(size)
    graph = trace(model, (inputs,))
    stage = split_graph(graph, _plan([layer.name for layer in graph.layers]), model)[rank]
    runner = StageRunner(stage, CrossEntropy(), transport)  # type: ignore[arg-type]
    sizes = microbatch_sizes(size.batch_size, MICROBATCHES)
    parts = MicroBatches(sizes, [(part,) for part in inputs.split(sizes)], targets.split(sizes))
    return Way(
        lambda: runner.train_batch(parts, schedule, round=1, step=0),  # type: ignore[arg-type]
        list(stage.parameters()),
    )


def make_rival(size: Size, rank: int) -> Way:
    """torch.distributed.pipelining on a plain stage."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model = build(size)
    inputs, targets = batch(size)
    part = model[:8] if rank == 0 else model[8:]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=nn.functional.cross_entropy)
    call = (lambda: schedule.step(inputs)) if rank == 0 else (lambda: schedule.step(target=targets))
    return Way(call, list(part.parameters()))


def make_single(size: Size) -> Way:
    """The whole model in one process, micro-batch by micro-batch."""
    model = build(size)
    inputs, targets = batch(size)
    parts = list(zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True))

    def step() -> None:
        for x, y in parts:
            (nn.functional.cross_entropy(model(x), y) / MICROBATCHES).backward()

    return Way(step, list(model.parameters()))


def batch(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The same samples on every process."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size.batch_size, size.width, generator=generator)
    return inputs, torch.randint(0, 10, (size.batch_size,), generator=generator)


def _plan(names: list[str]) -> object:
    """Four of the nine linear layers on the first stage."""
    from fedmp.records import Plan, StagePlan

    linear = [index for index, name in enumerate(names) if int(name.split(".")[-1]) % 2 == 0]
    cut = linear[4]
    stages = tuple(
        StagePlan(device=f"d{i}", start=a, stop=b, forward_s=0, backward_s=0)
        for i, (a, b) in enumerate(((0, cut), (cut, len(names))))
    )
    return Plan(
        layer_names=tuple(names),
        stages=stages,
        partitioner="given",
        schedule="1f1b-short",
        num_microbatches=MICROBATCHES,
        microbatch_size=1,
        step_s=0.0,
    )


def worker(rank: int, pipe: Connection, repeats: int, names: list[str]) -> None:
    """One of the two processes: every way in turn, for every size."""
    import torch.distributed as dist

    from fedmp.pipeline import DistributedTransport, host_rendezvous, join_rendezvous
    from fedmp.schedule import OneFOneB

    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1")
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv())
    transport = DistributedTransport(rendezvous, rank=rank, world_size=2, prefix="bench")
    for size in (size for size in SIZES if size.name in names):
        ways = {
            "ours": make_ours(size, rank, transport, OneFOneB(warmup="short")),
            "ours, long warm-up": make_ours(size, rank, transport, OneFOneB()),
            "rival": make_rival(size, rank),
        }
        if rank == 0:
            ways["one process"] = make_single(size)
        times = measure(ways, size, repeats, dist.barrier, rank)
        if rank == 0:
            pipe.send(times)
    dist.barrier()
    transport.close()


def measure(
    ways: dict[str, Way], size: Size, repeats: int, barrier: Callable[[], object], rank: int
) -> dict[str, list[float]]:
    """Median step seconds of each way in each repeat."""
    times: dict[str, list[float]] = {
        name: [] for name in ("ours", "ours, long warm-up", "rival", "one process")
    }
    for repeat in range(repeats + 1):
        for name, recorded in times.items():
            seconds = []
            for _ in range(size.steps):
                barrier()
                start = time.perf_counter()
                if name in ways:
                    ways[name].run()
                seconds.append(time.perf_counter() - start)
            if repeat:
                recorded.append(statistics.median(seconds))
    if rank == 0:
        _check_same_gradients(ways)
    return times


def _check_same_gradients(ways: dict[str, Way]) -> None:
    """A faster step that is wrong would be no result."""
    for name, way in ways.items():
        for mine, other in zip(way.parameters, ways["one process"].parameters, strict=False):
            torch.testing.assert_close(mine.grad, other.grad, rtol=2e-4, atol=1e-6, msg=name)


def compare(repeats: int, names: list[str]) -> list[dict[str, object]]:
    """Run both processes; print and return one row a size."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=worker, args=(rank, pipes[rank][1], repeats, names)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    pipes[1][0].send(pipes[0][0].recv())
    print(f"{'median step, ms':22}{'ours':>8}{'long':>8}{'rival':>8}{'single':>8}{'ideal':>8}"
          f"{'ours/rival':>12}{'long/rival':>12}{'share of ideal':>16}")  # fmt: skip
    rows = []
    for size in (size for size in SIZES if size.name in names):
        row = summarise(size, pipes[0][0].recv())
        rows.append(row)
        print(
            f"{size.name:22}" + "".join(f"{1e3 * row[k]:8.2f}" for k in ("ours", "long", "rival", "single", "ideal"))
            + f"{row['ratio']:12.2f}{row['long_ratio']:12.2f}{row['share']:16.2f}",
            flush=True,
        )  # fmt: skip
    for process in processes:
        process.join()
    return rows


def summarise(size: Size, times: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and medians of the ratios within each repeat."""
    middle = statistics.median
    ours, long = times["ours"], times["ours, long warm-up"]
    rival, single = times["rival"], times["one process"]
    ideal = [value / 2 * (MICROBATCHES + 1) / MICROBATCHES for value in single]
    best = [min(a, b) for a, b in zip(ours, long, strict=True)]
    return {
        "ours": middle(ours),
        "long": middle(long),
        "rival": middle(rival),
        "single": middle(single),
        "ideal": middle(ideal),
        "ratio": middle([a / b for a, b in zip(ours, rival, strict=True)]),
        "long_ratio": middle([a / b for a, b in zip(long, rival, strict=True)]),
        "share": middle([a / b for a, b in zip(ideal, best, strict=True)]),
    }


def main() -> None:
    """Run what was asked for and keep it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", nargs="*", default=[size.name for size in SIZES])
    options = parser.parse_args()
    rows = compare(options.repeats, options.sizes)
    RESULTS.mkdir(exist_ok=True)
    report = {"torch": torch.__version__, "sizes": [asdict(size) for size in SIZES], "rows": rows}
    (RESULTS / "pipeline.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
