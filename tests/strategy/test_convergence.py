"""Strategies help where their papers say that they do; figures in docs/algorithms.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedmp.data.files import data_folder

pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convergence_strategies.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("convergence_strategies", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs(*names: str) -> None:
    for name in names:
        if not any(data_folder().glob(f"{name}*")):
            pytest.skip(f"{name} is not in {data_folder()}; set FEDMP_DATA_DIR")


def test_control_variates_are_ahead_at_many_local_epochs_on_strongly_skewed_data(script: Any) -> None:
    needs("fashion_mnist")
    curves = script.drift()
    accuracy = {name: script.late_accuracy(records) for name, records in curves.items()}
    assert accuracy["SCAFFOLD"] > accuracy["FedAvg"] + 0.01, accuracy


def test_an_adaptive_server_is_ahead_on_shakespeare_by_role(script: Any) -> None:
    needs("shakespeare_by_role")
    curves = script.adaptive()
    loss = {name: script.late_loss(records) for name, records in curves.items()}
    assert max(loss["FedAdagrad"], loss["FedAdam"], loss["FedYogi"]) < loss["FedAvg"] - 0.02, loss


@pytest.mark.parametrize(("unlike", "fraction"), [(0.0, 0.9), (0.5, 0.9), (1.0, 0.5), (1.0, 0.9)])
def test_partial_work_is_better_than_none_where_clients_differ(
    script: Any, unlike: float, fraction: float
) -> None:
    curves = script.stragglers(fraction, unlike=unlike)
    loss = {name: script.late_loss(records) for name, records in curves.items()}
    assert max(loss["FedProx 0"], loss["FedProx 1"]) < loss["FedAvg, drops them"], loss
