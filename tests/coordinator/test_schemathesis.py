"""Requests that schemathesis makes up from the service's OpenAPI description, valid ones and others.

Needs `pip install schemathesis`; `test_fuzz.py` does much of the same with nothing but the standard library.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, seed, settings

from fedmp.coordinator import Limits
from tests.support.service import body, coordinator, update

schemathesis = pytest.importorskip(
    "schemathesis", reason="needs schemathesis: pip install schemathesis", exc_type=ImportError
)

EXAMPLES = 100  # of each operation
SOON_S = 5.0
GROWTH_BYTES = 24 << 20


@pytest.mark.slow
@pytest.mark.parametrize("token", ["ann0", "nobody"])
def test_whatever_schemathesis_asks_is_answered_soon_and_leaves_nothing(token: str, tmp_path: Path) -> None:
    """No status from 500 on, no hang, nothing in the journal, no growth in memory; the service works on."""
    logging.getLogger("fedmp").setLevel(logging.ERROR)  # a refusal each
    limits = Limits(head_timeout_s=1, stall_timeout_s=1, long_poll_s=0.05)
    with coordinator(tmp_path / "journal", limits) as server:
        described = schemathesis.openapi.from_url(f"{server.service.url}/openapi.json")
        operations = [found.ok() for found in described.get_all_operations()]
        assert {operation.path for operation in operations} > {"/v1/instruction", "/v1/rounds/{round}/update"}
        memory = []
        for again in range(2):  # what the first pass has not warmed up, the second one must not grow
            for operation in operations:
                _ask(operation, token, number=again)
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
        assert memory[1] - memory[0] < GROWTH_BYTES, memory
        assert not [name for name in server.files() if not name.startswith("global-")]
        assert server.push("ann0", body(update(0)))[0] == 200


def _ask(operation: schemathesis.APIOperation, token: str, *, number: int) -> None:
    """Some hundred requests to one operation."""

    @seed(number)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: schemathesis.Case) -> None:
        answer = case.call(headers={"authorization": f"Bearer {token}"}, timeout=SOON_S)
        assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.status_code} {answer.text}"
        if token == "nobody" and operation.path.startswith("/v1/"):
            assert answer.status_code in (401, 404, 405, 422), case.as_curl_command()

    ask()
