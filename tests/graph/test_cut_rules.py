"""Cuts that are forced, chosen or forbidden, and layers pinned to devices, by the names of modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmp.errors import PlanError
from fedmp.graph import CutRules, LayerGraph, apply_cut_rules, profile, trace
from tests.stages.oracle import check_split


def build() -> nn.Module:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # noqa: E731
    return nn.Sequential(nn.Linear(4, 4), block(), block(), nn.Flatten(), nn.Linear(4, 2)).double()


def inputs(batch: int) -> tuple[tuple[torch.Tensor], dict[str, torch.Tensor]]:
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),), {}


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return trace(build(), *inputs(3))


def names(graph: LayerGraph) -> list[str]:
    return [layer.name for layer in graph.layers]


def test_without_rules_every_layer_stays(graph: LayerGraph) -> None:
    assert names(apply_cut_rules(graph, CutRules())) == ["0", "1.0", "1.2", "2.0", "2.2", "4"]


def test_no_cut_inside_a_module(graph: LayerGraph) -> None:
    assert names(apply_cut_rules(graph, CutRules(forbid=("[12]",)))) == ["0", "1.0", "2.0", "4"]


def test_layers_that_stay_together_are_one(graph: LayerGraph) -> None:
    assert names(apply_cut_rules(graph, CutRules(together=(("0", "1.2"), ("2.2", "4"))))) == [
        "0",
        "2.0",
        "2.2",
    ]


def test_only_the_split_points(graph: LayerGraph) -> None:
    assert names(apply_cut_rules(graph, CutRules(only=("1", "2.2")))) == ["0", "1.0", "2.2"]


def test_a_forced_cut_is_marked_and_may_be_cut_beside_the_split_points(graph: LayerGraph) -> None:
    merged = apply_cut_rules(graph, CutRules(force=("2",), only=("1",)))
    assert names(merged) == ["0", "1.0", "2.0"]
    assert [layer.must_cut_after for layer in merged.layers] == [False, True, False]
    assert [layer.must_cut_after for layer in profile(merged).layers] == [False, True, False]


def test_a_layer_is_pinned_with_all_that_its_module_runs(graph: LayerGraph) -> None:
    merged = apply_cut_rules(graph, CutRules(devices={"1": "gateway", "4": "server"}))
    assert [layer.device for layer in profile(merged).layers] == [
        None,
        *["gateway"] * 2,
        None,
        None,
        "server",
    ]


def test_rules_add_up(graph: LayerGraph) -> None:
    once = apply_cut_rules(graph, CutRules(force=("2",), devices={"0": "a"}))
    twice = apply_cut_rules(once, CutRules(forbid=("1",)))
    assert names(twice) == ["0", "1.0", "2.0", "2.2", "4"]
    assert [layer.must_cut_after for layer in twice.layers] == [False, True, False, False, False]
    assert twice.layers[0].device == "a"
    with pytest.raises(PlanError, match="contradict"):
        apply_cut_rules(once, CutRules(together=(("1", "2"),)))


def test_rules_keep_the_model_and_its_fingerprint(graph: LayerGraph) -> None:
    model = build()
    merged = trace(model, *inputs(3), cut_rules=CutRules(forbid=("1",), force=("2",)))
    assert merged.fingerprint == graph.fingerprint
    assert check_split(model, inputs, graph=merged, tolerance=0).stages == [2, 3, 4]


def test_contradicting_rules_are_refused(graph: LayerGraph) -> None:
    with pytest.raises(PlanError, match=r"contradict: a cut before '1\.2' is forced"):
        apply_cut_rules(graph, CutRules(force=("1.2",), forbid=("1",)))
    with pytest.raises(PlanError, match=r"layer '1\.0' is to run on device 'a' and, by '1\.\*', on 'b'"):
        apply_cut_rules(graph, CutRules(devices={"1": "a", "1.*": "b"}))
    with pytest.raises(
        PlanError, match=r"'1\.0' to '1\.2' stay together, but are to run on the devices a, b"
    ):
        apply_cut_rules(graph, CutRules(devices={"1.0": "a", "1.2": "b"}, forbid=("1",)))


def test_a_cut_inside_a_layer_is_refused(graph: LayerGraph) -> None:
    with pytest.raises(PlanError, match=r"no cut is possible right before '1\.1'"):
        apply_cut_rules(graph, CutRules(force=("1.1",)))


@pytest.mark.parametrize("field", ["force", "only", "forbid", "together", "devices"])
def test_a_pattern_without_a_module_is_refused(graph: LayerGraph, field: str) -> None:
    value = {"together": (("decoder",),), "devices": {"decoder": "a"}}.get(field, ("decoder",))
    with pytest.raises(PlanError, match="no module of Sequential that runs matches 'decoder'"):
        apply_cut_rules(graph, CutRules.model_validate({field: value}))
