"""Cuts that are wanted, forbidden or pinned by the names of modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmp.errors import PlanError
from fedmp.graph import CutRules, LayerGraph, apply_cut_rules, trace
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
    assert names(apply_cut_rules(graph, CutRules(uncut=("[12]",)))) == ["0", "1.0", "2.0", "4"]


def test_pinned_layers_are_one(graph: LayerGraph) -> None:
    assert names(apply_cut_rules(graph, CutRules(together=(("0", "1.2"), ("2.2", "4"))))) == [
        "0",
        "2.0",
        "2.2",
    ]


def test_only_the_wanted_cuts(graph: LayerGraph) -> None:
    merged = apply_cut_rules(graph, CutRules(before=("1", "2.2"), only_before=True))
    assert names(merged) == ["0", "1.0", "2.2"]


def test_rules_keep_the_model_and_its_fingerprint(graph: LayerGraph) -> None:
    model = build()
    merged = trace(model, *inputs(3), cut_rules=CutRules(uncut=("1",), before=("2",)))
    assert merged.fingerprint == graph.fingerprint
    assert check_split(model, inputs, graph=merged, tolerance=0).stages == [2, 3, 4]


def test_contradicting_rules_are_refused(graph: LayerGraph) -> None:
    with pytest.raises(PlanError, match=r"contradict: a cut before '1\.2' is wanted"):
        apply_cut_rules(graph, CutRules(before=("1.2",), uncut=("1",)))


def test_a_cut_inside_a_layer_is_refused(graph: LayerGraph) -> None:
    with pytest.raises(PlanError, match=r"no cut is possible right before '1\.1'"):
        apply_cut_rules(graph, CutRules(before=("1.1",)))


def test_a_pattern_without_a_module_is_refused(graph: LayerGraph) -> None:
    with pytest.raises(PlanError, match="no module of Sequential that runs matches 'decoder'"):
        apply_cut_rules(graph, CutRules(uncut=("decoder",)))
