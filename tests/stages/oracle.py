"""The oracle of splitting: stages, run as a pipeline would run them, against the model that was cut.

Between two stages every live tensor is detached and copied into fresh contiguous memory, as a frame on
a wire would do, and gradients come back only where a stage's blueprint says so. What the copies lose
(strides, aliases, gradients nobody announced) therefore shows up as a difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fedmp.graph import LayerGraph, trace
from fedmp.graph.portable import to_plain
from fedmp.stages import Stage, merge, run_stages, split_graph
from tests.support.models import even_cuts, plan_at

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
MakeInputs = Callable[[int], Inputs]


@dataclass(frozen=True)
class Observed:
    """What one forward and backward of a model leaves behind."""

    result: Any
    gradients: Mapping[str, torch.Tensor | None]
    input_gradients: Sequence[torch.Tensor | None]
    state: Mapping[str, torch.Tensor]


@dataclass
class Report:
    """How far stages and model were apart, over everything that was compared.

    Attributes:
        num_layers: of the traced model.
        stages: numbers of stages that were tried.
        output_error, gradient_error: largest difference relative to the largest magnitude; 0 if bitwise equal.
    """

    num_layers: int
    num_nodes: int
    stages: list[int] = field(default_factory=list)
    output_error: float = 0.0
    gradient_error: float = 0.0


def check_split(
    model: nn.Module,
    make_inputs: MakeInputs,
    *,
    traced_batch: int = 3,
    batches: Sequence[int] = (3, 5),
    num_stages: Sequence[int] = (2, 3, 4),
    modes: Sequence[bool] = (True, False),
    tolerance: float = 0.0,
    graph: LayerGraph | None = None,
    backward: bool = True,
) -> Report:
    """Cut a model in several ways and compare each with the whole.

    Args:
        model: the original; it is not changed.
        make_inputs: from a batch size to (args, kwargs), always the same for the same size.
        traced_batch: batch size of the example inputs.
        batches: batch sizes to run, without tracing again.
        num_stages: into how many stages to cut; numbers above the number of layers are skipped.
        modes: train (True) and eval (False).
        tolerance: largest relative difference allowed; 0 demands bitwise equality.
        graph: the traced model, if it is traced already.
        backward: whether to compare gradients.
    """
    if graph is None:
        graph = trace(model, *make_inputs(traced_batch))
    report = Report(len(graph.layers), len(graph.train.nodes))
    expected = {
        (batch, training): observe(copy.deepcopy(model), make_inputs(batch), training, backward=backward)
        for batch in batches
        for training in modes
    }
    names = tuple(layer.name for layer in graph.layers)
    for count in dict.fromkeys(min(number, len(names)) for number in num_stages):
        report.stages.append(count)
        for (batch, training), wanted in expected.items():
            stages = split_graph(graph, plan_at(names, even_cuts(len(names), count)), copy.deepcopy(model))
            check_state(model, stages)
            found = observe_stages(stages, make_inputs(batch), training, backward=backward)
            where = f"{count} stages, batch {batch}, {'train' if training else 'eval'}"
            error = compare(wanted.result, found.result, tolerance, f"result, {where}")
            report.output_error = max(report.output_error, error)
            for name in wanted.gradients:
                error = compare_gradients(
                    wanted.gradients[name], found.gradients[name], tolerance, f"gradient of {name}, {where}"
                )
                report.gradient_error = max(report.gradient_error, error)
            for first, second in zip(wanted.input_gradients, found.input_gradients, strict=True):
                compare_gradients(first, second, tolerance, f"gradient of an input, {where}")
            for name in wanted.state:
                compare(wanted.state[name], found.state[name], tolerance, f"{name}, {where}")
    return report


def check_state(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Names, shapes and values of all stages together are those of the model."""
    whole, merged = model.state_dict(), merge(stage.state_dict() for stage in stages)
    assert set(merged) == set(whole), sorted(set(merged) ^ set(whole))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in whole.items()}
    parameters = {name for stage in stages for name, _ in stage.named_parameters(remove_duplicate=False)}
    assert parameters == {name for name, _ in model.named_parameters(remove_duplicate=False)}


def observe(model: nn.Module, inputs: Inputs, training: bool, *, backward: bool = True) -> Observed:
    """Run the whole model forward and backward once."""
    model.train(training)
    (args, kwargs), leaves = _fresh(inputs)
    torch.manual_seed(1)
    result = model(*args, **kwargs)
    if backward:
        roots, weights = _roots(result)
        if roots:
            torch.autograd.backward(roots, weights)
    return Observed(
        _detached(result),
        {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)},
        [leaf.grad for leaf in leaves],
        dict(model.state_dict()),
    )


def observe_stages(
    stages: Sequence[Stage], inputs: Inputs, training: bool, *, backward: bool = True
) -> Observed:
    """Run the stages as a pipeline would; without `backward`, by `run_stages`."""
    for stage in stages:
        stage.train(training)
    (args, kwargs), leaves = _fresh(inputs)
    torch.manual_seed(1)
    result = _run(stages, args, kwargs, training) if backward else run_stages(stages, *args, **kwargs)
    gradients: dict[str, torch.Tensor | None] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            gradients.setdefault(name, parameter.grad)
    return Observed(
        _detached(result), gradients, [leaf.grad for leaf in leaves], merge(s.state_dict() for s in stages)
    )


def _run(stages: Sequence[Stage], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
    batch = next(
        leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()
    )
    tensors: Sequence[Any] = stages[0].flatten(args, kwargs)
    kept: list[tuple[Sequence[Any], Sequence[Any]]] = []
    for stage in stages:
        outputs = stage.run(tensors)
        kept.append((tensors, outputs))
        if stage.blueprint.is_last:
            break
        specs = stage.blueprint.program(training=training).outputs
        assert len(specs) == len(outputs)
        tensors = []
        for spec, value in zip(specs, outputs, strict=True):
            assert isinstance(value, torch.Tensor), f"{value!r} cannot be sent"
            assert value.dtype == spec.dtype, (value.dtype, spec.dtype)
            assert tuple(value.shape) == spec.shape(batch), (tuple(value.shape), spec.dims)
            received = value.detach().clone(memory_format=torch.contiguous_format)
            tensors.append(received.requires_grad_() if spec.has_gradient else received)
    result = tree_unflatten(list(kept[-1][1]), stages[-1].blueprint.program(training=training).out_spec)
    roots, gradients = _roots(result)
    for stage, (received, _), sent in zip(
        reversed(stages), reversed(kept), [None, *reversed([pair[1] for pair in kept[:-1]])], strict=True
    ):
        del sent
        pairs = [(root, grad) for root, grad in zip(roots, gradients, strict=True) if root.requires_grad]
        if pairs:
            torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        if stage.blueprint.is_first:
            break
        before = kept[stage.blueprint.index - 1][1]
        specs = stage.blueprint.program(training=training).inputs
        returned = [
            (root, tensor.grad if tensor.grad is not None else torch.zeros_like(tensor))
            for root, tensor, spec in zip(before, received, specs, strict=True)
            if spec.has_gradient
        ]
        roots, gradients = [pair[0] for pair in returned], [pair[1] for pair in returned]
    return result


def _fresh(inputs: Inputs) -> tuple[Inputs, list[torch.Tensor]]:
    leaves: list[torch.Tensor] = []

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.clone()
        leaves.append(leaf)
        return leaf

    return tree_map(fresh, inputs), leaves


def _roots(result: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Differentiable outputs, each with an own fixed gradient."""
    leaves = tree_leaves(to_plain(result))
    roots = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(2)
    real = [torch.randn(root.shape, generator=generator, dtype=torch.float64) for root in roots]
    return roots, [weight.to(root.dtype) for weight, root in zip(real, roots, strict=True)]


def _detached(result: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, to_plain(result)
    )


def compare(first: Any, second: Any, tolerance: float, what: str) -> float:
    """Relative difference of two trees of tensors; an AssertionError above the tolerance."""
    (left, left_spec), (right, right_spec) = tree_flatten(to_plain(first)), tree_flatten(to_plain(second))
    assert left_spec == right_spec, f"{what}: {left_spec} and {right_spec}"
    worst = 0.0
    for one, two in zip(left, right, strict=True):
        if not isinstance(one, torch.Tensor):
            assert type(one) is type(two), f"{what}: {one!r} and {two!r}"
            assert one == two, f"{what}: {one!r} and {two!r}"
            continue
        assert one.dtype == two.dtype, f"{what}: {one.dtype} and {two.dtype}"
        assert one.shape == two.shape, f"{what}: {one.shape} and {two.shape}"
        worst = max(worst, _relative(one, two))
    assert worst <= tolerance, f"{what}: relative difference {worst:.3g}"
    return worst


def compare_gradients(
    first: torch.Tensor | None, second: torch.Tensor | None, tolerance: float, what: str
) -> float:
    """Like `compare`; no gradient counts as a gradient of zeros."""
    if first is None and second is None:
        return 0.0
    some = first if first is not None else second
    assert some is not None
    zeros = torch.zeros_like(some)
    return compare(
        first if first is not None else zeros, second if second is not None else zeros, tolerance, what
    )


def _relative(first: torch.Tensor, second: torch.Tensor) -> float:
    if torch.equal(first, second) or first.numel() == 0:
        return 0.0
    if not (first.is_floating_point() or first.is_complex()):
        return float("inf")
    same = (first == second) | (first.isnan() & second.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0, (first - second).abs().double())
    if not bool(difference.isfinite().all()):
        return float("inf")
    scale = first[first.isfinite()].abs().double().max()
    return float(difference.max() / scale.clamp_min(1e-30))
