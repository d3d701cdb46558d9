"""Two real processes over gloo that run one scenario after another, each in a new generation."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedmp.errors import DeadlineError
from fedmp.pipeline import (
    DistributedTransport,
    MicroBatches,
    Rendezvous,
    StageRunner,
    host_rendezvous,
    join_rendezvous,
)
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage, StageBlueprint
from fedmp.tasks import CrossEntropy

ANSWER_S = 60.0


@dataclass(frozen=True)
class Part:
    """A stage to run: what a process is sent."""

    blueprint: StageBlueprint
    state: dict[str, torch.Tensor]


class Place:
    """One process's place in the group: its rank, and transports as they are needed."""

    def __init__(self, rank: int, rendezvous: Rendezvous) -> None:
        self.rank = rank
        self._rendezvous = rendezvous
        self._transport: DistributedTransport | None = None
        self._generation = 0

    def miss(self) -> None:
        """Let a generation pass without being there."""
        self._generation += 1

    def transport(self, timeout_s: float = 20.0) -> DistributedTransport:
        """Leave the present group, if any, and come up in the next generation."""
        self.leave()
        self._generation += 1
        self._transport = DistributedTransport(
            self._rendezvous,
            rank=self.rank,
            world_size=2,
            prefix="test",
            generation=self._generation,
            timeout_s=timeout_s,
        )
        return self._transport

    def leave(self) -> None:
        """Leave the present group."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def stage(self, parts: list[Part]) -> Stage:
        """This process's stage, with weights."""
        part = parts[self.rank]
        stage = Stage(part.blueprint).materialize("cpu")
        stage.load_state(part.state)
        return stage


class Pair:
    """Two processes that wait for scenarios."""

    def __init__(self) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(2)]
        self._pipes = [end[0] for end in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, ends[rank][1]), daemon=True) for rank in range(2)
        ]
        for process in self._processes:
            process.start()
        self._pipes[1].send(self._answer(0))

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        """`scenario(place, *args)` on both; an answer or the exception of each."""
        for pipe in self._pipes:
            pipe.send((scenario, args))
        return [self._answer(rank) for rank in range(2)]

    def close(self) -> None:
        """End both processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(ANSWER_S):
            raise TimeoutError(f"process {rank} did not answer within {ANSWER_S:g} s")
        return self._pipes[rank].recv()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        rendezvous = host_rendezvous("127.0.0.1")
        pipe.send(rendezvous.port)
    else:
        rendezvous = join_rendezvous("127.0.0.1", pipe.recv())
    place = Place(rank, rendezvous)
    while (message := pipe.recv()) is not None:
        scenario, args = message
        try:
            pipe.send(scenario(place, *args))
        except Exception as error:
            pipe.send(error)
    place.leave()


# scenarios


def train(place: Place, parts: list[Part], batches: list[MicroBatches]) -> dict[str, Any]:
    """Some batches one after another, gradients accumulated; what the stage has then."""
    stage = place.stage(parts)
    runner = StageRunner(stage, CrossEntropy(), place.transport())
    sizes = []
    for step, batch in enumerate(batches):
        stage.zero_grad()
        runner.train_batch(batch, OneFOneB(), round=1, step=step)
        runner.finish_gradients(round=1, step=step)
        sizes.append(runner.buffer_bytes)
    place.leave()
    return {
        "gradients": {key: p.grad for key, p in stage.named_parameters()},
        "buffers": dict(stage.named_buffers()),
        "buffer_bytes": sizes,
    }


def recover(place: Place, parts: list[Part], bad: MicroBatches, good: MicroBatches) -> dict[str, Any]:
    """A loss that raises on the last stage; then down, up again, and the step once more."""
    stage = place.stage(parts)
    runner = StageRunner(stage, CrossEntropy(), place.transport())
    errors = []
    seconds = []
    for _ in range(3):
        try:
            runner.train_batch(bad, OneFOneB(), round=1, step=0)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        place.leave()  # the neighbour notices
        start_s = time.perf_counter()
        runner.reconnect(place.transport())
        seconds.append(time.perf_counter() - start_s)
    stage.zero_grad()
    runner.train_batch(good, OneFOneB(), round=1, step=1)
    runner.finish_gradients(round=1, step=1)
    place.leave()
    return {
        "errors": errors,
        "seconds": seconds,
        "gradients": {key: p.grad for key, p in stage.named_parameters()},
    }


def disagree(place: Place, parts: list[Part], batches: list[MicroBatches], steps: list[int]) -> str:
    """Each process has a batch and a step of its own; the error that it gets."""
    runner = StageRunner(place.stage(parts), CrossEntropy(), place.transport(timeout_s=1.0))
    try:
        runner.train_batch(batches[place.rank], OneFOneB(), round=1, step=steps[place.rank])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        place.leave()
    return "no error"


def stumble(place: Place) -> str:
    """The first process waits for the other one in vain, once; then both come up. The error in between."""
    error = ""
    if place.rank == 0:
        try:
            place.transport(timeout_s=0.3)
        except DeadlineError as raised:
            error = str(raised)
    else:
        place.miss()
    transport, token, other = place.transport(timeout_s=10.0), torch.zeros(1), 1 - place.rank
    if place.rank == 0:
        transport.receive(token, other, 0).wait()
        transport.send(token, other, 1).wait()
    else:  # neither leaves before both are there
        transport.send(token, other, 0).wait()
        transport.receive(token, other, 1).wait()
    place.leave()
    return error


def be_silent(place: Place, parts: list[Part], batch: MicroBatches) -> tuple[str, float]:
    """The first stage joins but never sends; the error and how long the other one waited."""
    runner = StageRunner(place.stage(parts), CrossEntropy(), place.transport(timeout_s=0.5))
    if place.rank == 0:
        return "", 0.0
    start_s = time.perf_counter()
    try:
        runner.train_batch(batch, OneFOneB(), round=1, step=0)
    except Exception as error:
        return type(error).__name__, time.perf_counter() - start_s
    return "no error", 0.0


def predict(place: Place, parts: list[Part], batch: MicroBatches) -> list[torch.Tensor]:
    """Inference whose outputs the first stage's process wants."""
    runner = StageRunner(place.stage(parts), CrossEntropy(), place.transport())
    kept: list[torch.Tensor] = []
    runner.evaluate_batch(batch, round=1, step=0, keep_outputs=kept.append, outputs_on=0)
    place.leave()
    return kept
