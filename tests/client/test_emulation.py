"""Emulated links: messages take their time, in both directions at once, and arrive as they were sent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fedmp import Link, Topology
from fedmp.client.emulation import SlowTransport
from fedmp.engine.local import LocalEngine
from fedmp.errors import PipelineError
from tests.support.jobs import run, tiny_job


class Recorder:
    """A transport that notes when what is sent."""

    generation, device, is_ordered = 3, torch.device("cpu"), False

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[tuple[float, int, int, list[float]]] = []
        self._error = error

    def send(self, buffer: torch.Tensor, peer: int, tag: int) -> Recorder:
        if self._error:
            raise self._error
        self.sent.append((time.perf_counter(), peer, tag, buffer.tolist()))
        return self

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> Recorder:
        return self

    def wait(self) -> None:
        return


def test_messages_queue_for_their_link_and_latencies_overlap() -> None:
    inner = Recorder()
    slow = SlowTransport(inner, {1: Link(4000.0, 0.05), 2: Link(4e6, 0.0)})
    start_s = time.perf_counter()
    pending = [slow.send(torch.full((100,), float(number)), 1, number) for number in range(3)]  # 0.1 s each
    pending.append(slow.send(torch.zeros(100), 2, 9))
    for message in pending:
        message.wait()
    at = {(peer, tag): sent_s - start_s for sent_s, peer, tag, _ in inner.sent}
    assert [row[3][0] for row in inner.sent if row[1] == 1] == [0.0, 1.0, 2.0]
    assert [at[1, 0] >= 0.15, at[1, 1] >= 0.25, at[1, 2] >= 0.35] == [True] * 3
    assert at[2, 9] < at[1, 2]
    assert (slow.generation, slow.is_ordered) == (3, False)


def test_whoever_waits_hears_of_a_message_that_could_not_leave() -> None:
    slow = SlowTransport(Recorder(PipelineError("lost d1")), {1: Link(1e6, 0.0)})
    pending = slow.send(torch.zeros(4), 1, 0)
    with pytest.raises(PipelineError, match="lost d1"):
        pending.wait()


@pytest.mark.slow
def test_an_emulated_run_takes_as_long_as_predicted_and_learns_the_same(tmp_path: Path) -> None:
    devices = [{"name": f"d{rank}", "flops_per_s": speed} for rank, speed in enumerate((4e6, 8e6))]
    uplink = {"bandwidth_bytes_per_s": 5e4, "latency_s": 0.1}
    topology = Topology(clients=[{"name": "c0", "devices": devices, "uplink": uplink}])
    plain = run(tiny_job(topology=topology), tmp_path / "simulated")
    slow = run(tiny_job(topology=topology), tmp_path / "local", LocalEngine(emulate=True))
    for predicted, real in zip(plain.history, slow.history, strict=True):
        assert real.wall_s > 0.9 * predicted.simulated_s
        assert real.test_loss == pytest.approx(predicted.test_loss, rel=1e-5)
