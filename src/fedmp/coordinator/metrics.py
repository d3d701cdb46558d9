"""What a coordinator has done and how it stands, for Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedmp.coordinator.board import Board
from fedmp.errors import RefusedError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["CountedApp", "Metrics"]


class Metrics:
    """Counts of a service, and the state of its board, read when asked for.

    Args:
        board: of the job.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._refusals: Counter[str] = Counter()

    def answered(self, route: str, status: int) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[route, status] += 1

    def refused(self, reason: str) -> None:
        """A request was refused."""
        with self._lock:
            self._refusals[reason] += 1

    @property
    def refusals(self) -> dict[str, int]:
        """Refused requests by reason."""
        with self._lock:
            return dict(self._refusals)

    def render(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and its content type.

        Raises:
            RefusedError: the `prometheus_client` package is not installed.
        """
        try:
            from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        except ModuleNotFoundError:
            raise RefusedError(
                "metrics need the prometheus-client package: pip install 'fedmp[deploy]'",
                status=404,
                reason="no-metrics",
            ) from None
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        """What a Prometheus registry asks of its collectors."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            requests, refusals = dict(self._requests), dict(self._refusals)
        status = self._board.status()
        counter = CounterMetricFamily("fedmp_requests", "Answered requests.", labels=["route", "status"])
        for (route, code), count in requests.items():
            counter.add_metric([route, str(code)], count)
        yield counter
        counter = CounterMetricFamily("fedmp_refusals", "Refused requests by reason.", labels=["reason"])
        for reason, count in refusals.items():
            counter.add_metric([reason], count)
        yield counter
        yield CounterMetricFamily("fedmp_update_bytes", "Bytes of accepted updates.", value=status.bytes_up)
        yield CounterMetricFamily("fedmp_stage_bytes", "Bytes of stages handed out.", value=status.bytes_down)
        yield CounterMetricFamily("fedmp_devices_lost", "Devices that were lost.", value=self._board.faults)
        yield CounterMetricFamily(
            "fedmp_rounds_begun_anew", "Attempts of clients after their first.", value=self._board.recoveries
        )
        yield GaugeMetricFamily("fedmp_round", "The newest round that was opened.", value=status.round)
        yield GaugeMetricFamily(
            "fedmp_round_open", "Whether it takes updates.", value=float(status.kind == "train")
        )
        yield GaugeMetricFamily("fedmp_cohort_clients", "Clients in its cohort.", value=len(status.cohort))
        yield GaugeMetricFamily(
            "fedmp_reported_clients", "Those of which every device has reported.", value=status.num_reported
        )
        yield GaugeMetricFamily(
            "fedmp_late_clients", "Clients that go on with an earlier round.", value=status.num_late
        )
        silence = GaugeMetricFamily(
            "fedmp_device_silent_seconds",
            "Since a device was last heard; absent before it ever was.",
            labels=["client", "device"],
        )
        for (client, device), seconds in status.silent_s.items():
            silence.add_metric([client, device], seconds)
        yield silence


class CountedApp:
    """An ASGI app that counts the answers of another.

    Args:
        app: the other one.
        metrics: where they are counted.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.answered(route, message["status"])
            await send(message)

        await self._app(scope, receive, counted)
