"""Step time of fedmp's pipeline against torch.distributed.pipelining and one process, in one run.

    python benchmarks/pipeline.py                 two processes, three sizes, against the rival
    python benchmarks/pipeline.py --dilated       four slowed processes, against the event simulator
    python benchmarks/pipeline.py --compression   bytes between two devices, and accuracy
    python benchmarks/pipeline.py --recovery      tear a group down and bring the next one up

Two processes with one thread each, gloo over loopback, 8 micro-batches, 1F1B for both. The three ways
take turns within the same processes, so that a busy machine slows all of them alike. The rival runs plain
`nn.Sequential` stages, its best case; fedmp runs the traced stages that its users get. "Ideal" is the
one-process time / 2 x (M + 1) / M, the pipeline's bubble and nothing else; "with both cores busy" takes
that time while the other process does the same, since two processes share caches, memory and the host.
Where both differ, the machine has not two cores to give. No way includes the optimizer's step.
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
from typing import Any

import torch
from torch import nn

MICROBATCHES = 8
OURS = ("ours", "ours, long warm-up", "ours, zero bubble")
WAYS = (*OURS, "rival", "one process", "one process, twice")
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
    Size("medium", 256, 128, 12),
    Size("compute-bound", 1024, 256, 3),
    Size("large micro-batches", 1024, 1024, 1),
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


def _plan(names: list[str], cuts: list[int] | None = None) -> Any:
    """Four of the nine linear layers on the first of two stages, unless told otherwise."""
    from fedmp.records import Plan, StagePlan

    if cuts is None:
        cuts = [[at for at, name in enumerate(names) if int(name.split(".")[-1]) % 2 == 0][4]]
    bounds = [0, *cuts, len(names)]
    stages = tuple(
        StagePlan(device=f"d{i}", start=a, stop=b, forward_s=0, backward_s=0)
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
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
    from fedmp.schedule import OneFOneB, ZeroBubble

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
            "ours, zero bubble": make_ours(size, rank, transport, ZeroBubble()),
            # on both at once: what the machine gives when both cores are at work
            "one process, twice": make_single(size),
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
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every step of each way; the ways take turns step by step."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for step in range(repeats * size.steps + 2):
        for name, recorded in times.items():
            barrier()
            start, cpu = time.perf_counter(), time.process_time()
            if name in ways:
                ways[name].run()
            if step > 1:
                recorded.append((time.perf_counter() - start, time.process_time() - cpu))
    if rank == 0:
        _check_same_gradients(ways)
    return times


def _check_same_gradients(ways: dict[str, Way]) -> None:
    """A faster step that is wrong would be no result."""
    for name, way in ways.items():
        for mine, other in zip(way.parameters, ways["one process"].parameters, strict=False):
            torch.testing.assert_close(mine.grad, other.grad, rtol=2e-4, atol=1e-6, msg=name)


def compare(repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """Run both processes; print and return one row a size."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=worker, args=(rank, pipes[rank][1], repeats, names)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    pipes[1][0].send(pipes[0][0].recv())
    print(f"{'step, ms: median (minimum)':27}" + "".join(f"{name:>19}" for name in (*WAYS, "ideal")))
    rows = []
    for size in (size for size in SIZES if size.name in names):
        row = summarise(size, pipes[0][0].recv())
        rows.append(row)
        print_row(row)
    for process in processes:
        process.join()
    return rows


def summarise(size: Size, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians and minima; ratios are medians of the ratios of steps taken in turn."""
    wall = {name: [seconds for seconds, _ in listed] for name, listed in times.items()}
    bubble = (MICROBATCHES + 1) / MICROBATCHES
    wall["ideal"] = [value / 2 * bubble for value in wall["one process"]]
    wall["ideal, both busy"] = [value / 2 * bubble for value in wall["one process, twice"]]

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(wall[above], wall[below], strict=True))

    return {
        "size": size.name,
        "median_s": {name: statistics.median(values) for name, values in wall.items()},
        "minimum_s": {name: min(values) for name, values in wall.items()},
        "cpu_s": {name: statistics.median(cpu for _, cpu in listed) for name, listed in times.items()},
        "ratio": {name: ratio(name, "rival") for name in OURS},
        "minimum_ratio": {name: min(wall[name]) / min(wall["rival"]) for name in OURS},
        "share": {name: ratio("ideal", name) for name in OURS},
        "minimum_share": {name: min(wall["ideal"]) / min(wall[name]) for name in OURS},
        "share_both_busy": {name: ratio("ideal, both busy", name) for name in OURS},
        "minimum_share_both_busy": {name: min(wall["ideal, both busy"]) / min(wall[name]) for name in OURS},
    }


def print_row(row: dict[str, Any]) -> None:
    """One size's times and, for each of ours, how it compares."""
    cells = [f"{1e3 * row['median_s'][n]:9.2f} ({1e3 * row['minimum_s'][n]:7.2f})" for n in (*WAYS, "ideal")]
    print(f"{row['size']:27}" + " ".join(cells))
    for name in OURS:
        print(
            f"    {name:23} / rival {row['ratio'][name]:.2f} (of minima {row['minimum_ratio'][name]:.2f}), "
            f"share of ideal {row['share'][name]:.2f} ({row['minimum_share'][name]:.2f}), "
            f"with both cores busy {row['share_both_busy'][name]:.2f} "
            f"({row['minimum_share_both_busy'][name]:.2f}), "
            f"CPU ms {1e3 * row['cpu_s'][name]:.2f} against {1e3 * row['cpu_s']['rival']:.2f}",
            flush=True,
        )


FORWARD_S = (0.020, 0.032, 0.024, 0.016)
PLACED = ("interleaved", "v-shape", "v-shape-whole")


def dilated_worker(rank: int, pipe: Connection, repeats: int) -> None:
    """One of four devices that take as long as they are told to."""
    import torch.distributed as dist

    from fedmp.graph import trace
    from fedmp.pipeline import (
        DeviceRunner,
        DistributedTransport,
        MicroBatches,
        Pace,
        RunnerOptions,
        StageRunner,
        host_rendezvous,
        join_rendezvous,
        microbatch_sizes,
    )
    from fedmp.schedule import placed_schedule_by_name, schedule_by_name
    from fedmp.stages import split_graph
    from fedmp.tasks import CrossEntropy

    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1")
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv())
    transport = DistributedTransport(rendezvous, rank=rank, world_size=4, prefix="dilated")
    size = SIZES[0]
    inputs, targets = batch(size)
    model = build(size)
    graph = trace(model, (inputs,))
    names = [layer.name for layer in graph.layers]
    cuts = [round(len(names) * index / 4) for index in (1, 2, 3)]
    stage = split_graph(graph, _plan(names, cuts), model)[rank]
    pace = Pace(FORWARD_S[rank], 2 * FORWARD_S[rank])
    runner = StageRunner(stage, CrossEntropy(), transport, options=RunnerOptions(pace=pace))
    sizes = microbatch_sizes(size.batch_size, MICROBATCHES)
    parts = MicroBatches(sizes, [(part,) for part in inputs.split(sizes)], targets.split(sizes))
    ways: dict[str, tuple[DeviceRunner, Any]] = {
        name: (runner, schedule_by_name(name)) for name in ("gpipe", "1f1b", "1f1b-short", "zero-bubble")
    }
    for name in PLACED:
        schedule = placed_schedule_by_name(name)
        assert schedule is not None
        placement = schedule.placement(4)
        eight = split_graph(graph, _plan(names, [round(len(names) * i / 8) for i in range(1, 8)]), model)
        half = RunnerOptions(pace=Pace(FORWARD_S[rank] / 2, FORWARD_S[rank]))
        several = DeviceRunner(
            [eight[index] for index in placement[rank]],
            CrossEntropy(),
            transport,
            device=rank,
            placement=placement,
            options=half,
        )
        ways[name] = several, schedule
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, recorded in times.items():
            way, schedule = ways[name]
            dist.barrier()
            start = time.perf_counter()
            way.train_batch(parts, schedule, round=1, step=0)
            dist.barrier()
            if repeat:
                recorded.append(time.perf_counter() - start)
    if rank == 0:
        pipe.send(times)
    transport.close()


def dilate(repeats: int) -> list[dict[str, Any]]:
    """Four slowed processes against the event simulator."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(4)]
    processes = [
        context.Process(target=dilated_worker, args=(rank, pipes[rank][1], repeats)) for rank in range(4)
    ]
    for process in processes:
        process.start()
    port = pipes[0][0].recv()
    for mine, _ in pipes[1:]:
        mine.send(port)
    rows = []
    for name, seconds in pipes[0][0].recv().items():
        expected, found = predict_s(name), statistics.median(seconds)
        rows.append({"schedule": name, "predicted_s": expected, "measured_s": found})
        print(
            f"{name:12} measured {1e3 * found:7.1f} ms, predicted {1e3 * expected:7.1f} ms, {found / expected:.3f}"
        )
    for process in processes:
        process.join()
    return rows


def predict_s(name: str) -> float:
    """What the event simulator says of the four slowed devices, with links that take no time."""
    from fedmp.partition.events import StageTimes
    from fedmp.partition.placed_events import place, simulate_placed
    from fedmp.schedule import PlacedAction, schedule_by_name

    if name in PLACED:
        placed = place(name, 4, MICROBATCHES)
        actions, placement, share = placed.actions, placed.placement, 0.5
        forward = [share * FORWARD_S[device] for device in placed.device_of]
    else:
        plain = schedule_by_name(name).actions(4, MICROBATCHES)
        actions = [[PlacedAction(*action, s) for action in listed] for s, listed in enumerate(plain)]
        placement, forward = [(stage,) for stage in range(4)], list(FORWARD_S)
    backward = [2 * seconds for seconds in forward]
    free = [0.0] * (len(forward) - 1)
    return simulate_placed(StageTimes(forward, backward, free, free), actions, placement)


def recovering_worker(rank: int, pipe: Connection, repeats: int) -> None:
    """One of two processes that leave a group in the middle of a step and meet in the next generation."""
    from fedmp.graph import trace
    from fedmp.pipeline import (
        DistributedTransport,
        MicroBatches,
        StageRunner,
        host_rendezvous,
        join_rendezvous,
        microbatch_sizes,
    )
    from fedmp.schedule import OneFOneB
    from fedmp.stages import split_graph
    from fedmp.tasks import CrossEntropy

    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1")
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv())

    def join(generation: int) -> DistributedTransport:
        return DistributedTransport(rendezvous, rank=rank, world_size=2, prefix="down", generation=generation)

    size = SIZES[0]
    inputs, targets = batch(size)
    graph = trace(build(size), (inputs,))
    stage = split_graph(graph, _plan([layer.name for layer in graph.layers]), build(size))[rank]
    transport = join(0)
    runner = StageRunner(stage, CrossEntropy(), transport)
    sizes = microbatch_sizes(size.batch_size, MICROBATCHES)
    good = MicroBatches(sizes, [(part,) for part in inputs.split(sizes)], targets.split(sizes))
    bad = MicroBatches(sizes, good.inputs, [part + 1000 for part in targets.split(sizes)])
    seconds = []
    for generation in range(1, repeats + 1):
        try:
            runner.train_batch(bad, OneFOneB(), round=1, step=generation)  # the last stage's loss raises
        except Exception:
            start = time.perf_counter()
            transport.close()
            transport = join(generation)
            runner.reconnect(transport)
            seconds.append(time.perf_counter() - start)
        runner.train_batch(good, OneFOneB(), round=2, step=generation)
    transport.close()
    pipe.send(seconds)


def recover(repeats: int) -> list[dict[str, Any]]:
    """How long each process is without a pipeline after an error, from the error to the next step."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=recovering_worker, args=(rank, pipes[rank][1], repeats)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    pipes[1][0].send(pipes[0][0].recv())
    rows = []
    for rank, (mine, _) in enumerate(pipes):
        seconds = mine.recv()
        rows.append({"rank": rank, "median_s": statistics.median(seconds), "maximum_s": max(seconds)})
        print(
            f"rank {rank}: down and up again in {1e3 * statistics.median(seconds):.1f} ms, at most "
            f"{1e3 * max(seconds):.1f} ms, {len(seconds)} times"
        )
    for process in processes:
        process.join()
    return rows


def compressed_worker(rank: int, pipe: Connection, epochs: int) -> None:
    """Train a small MLP on the shipped Fashion-MNIST excerpt with each kind of compression."""
    from fedmp.data import FashionMNISTExcerpt
    from fedmp.graph import trace
    from fedmp.models import MLP
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
    from fedmp.stages import split_graph
    from fedmp.tasks import CrossEntropy

    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1")
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv())
    transport = DistributedTransport(rendezvous, rank=rank, world_size=2, prefix="compressed")
    data = FashionMNISTExcerpt().load()

    def parts(inputs: torch.Tensor, targets: torch.Tensor) -> MicroBatches:
        sizes = microbatch_sizes(len(inputs), MICROBATCHES)
        return MicroBatches(sizes, [(part,) for part in inputs.split(sizes)], targets.split(sizes))

    for kind in ("none", "bf16", "int8"):
        torch.manual_seed(0)
        model = MLP(hidden=(256, 128, 64))
        graph = trace(model, (data.train.batch(torch.arange(64))[0],))
        names = [layer.name for layer in graph.layers]
        stage = split_graph(graph, _plan(names, [len(names) // 2]), model)[rank]
        options = RunnerOptions(compress_activations=kind, compress_gradients=kind)  # type: ignore[arg-type]
        runner = StageRunner(stage, CrossEntropy(), transport, options=options)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            for step, index in enumerate(torch.randperm(len(data.train), generator=generator).split(64)):
                optimizer.zero_grad()
                runner.train_batch(parts(*data.train.batch(index)), OneFOneB(), round=epoch, step=step)
                runner.finish_gradients(round=epoch, step=step)
                optimizer.step()
        sent = runner.bytes_sent
        everything = data.test.batch(torch.arange(len(data.test)))
        result = runner.evaluate_batch(parts(*everything), round=epochs, step=0)
        accuracy = result.num_correct / max(result.weight, 1)
        pipe.send((kind, sent, accuracy, result.loss_sum / max(result.weight, 1)))
    transport.close()


def compress(epochs: int) -> list[dict[str, Any]]:
    """Bytes saved, and what it does to accuracy."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=compressed_worker, args=(rank, pipes[rank][1], epochs)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    pipes[1][0].send(pipes[0][0].recv())
    rows = []
    for _ in range(3):
        (kind, first, _, _), (_, second, accuracy, loss) = pipes[0][0].recv(), pipes[1][0].recv()
        rows.append({"compression": kind, "bytes": first + second, "accuracy": accuracy, "loss": loss})
        saved = 1 - (first + second) / rows[0]["bytes"]
        print(
            f"{kind:5} {(first + second) / 1e6:8.1f} MB sent ({saved:.0%} saved), "
            f"accuracy {accuracy:.4f}, loss {loss:.4f}"
        )
    for process in processes:
        process.join()
    return rows


def main() -> None:
    """Run what was asked for and keep it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", nargs="*", default=[size.name for size in SIZES])
    parser.add_argument("--dilated", action="store_true", help="four slowed processes instead")
    parser.add_argument("--recovery", action="store_true", help="tear down and bring up instead")
    parser.add_argument("--compression", action="store_true", help="bytes and accuracy instead")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if options.dilated:
        (RESULTS / "pipeline_dilated.json").write_text(json.dumps(dilate(options.repeats), indent=2))
        return
    if options.recovery:
        (RESULTS / "pipeline_recovery.json").write_text(json.dumps(recover(options.repeats), indent=2))
        return
    if options.compression:
        (RESULTS / "pipeline_compression.json").write_text(json.dumps(compress(epochs=5), indent=2))
        return
    rows = compare(options.repeats, options.sizes)
    report = {"torch": torch.__version__, "sizes": [asdict(size) for size in SIZES], "rows": rows}
    (RESULTS / "pipeline.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
