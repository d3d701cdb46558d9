"""Where a plan may cut a model, by the names of its modules.

Rules act on the traced model: layers that must stay together become one layer, so every partitioner
obeys them without knowing them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from fedmp.component import Component
from fedmp.errors import PlanError
from fedmp.graph.layer_graph import Layer, LayerGraph
from fedmp.graph.layers import module_path

__all__ = ["CutRules", "apply_cut_rules"]


class CutRules(Component):
    """Rules of cutting. Names are module paths, or patterns of them as in `fnmatch` (`*` matches dots).

    Attributes:
        before: a cut must be possible where each module that matches first uses weights.
        only_before: cut nowhere else, so that `uniform` over as many devices makes exactly these stages.
        uncut: no cut inside a module that matches.
        together: groups of modules; everything from a group's first to its last layer is one layer.

    Example:
        >>> CutRules(before=("decoder",), uncut=("encoder.*",)).only_before
        False
    """

    before: tuple[str, ...] = ()
    only_before: bool = False
    uncut: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()


def apply_cut_rules(graph: LayerGraph, rules: CutRules) -> LayerGraph:
    """Merge layers so that a plan keeps the rules.

    Args:
        graph: the traced model.
        rules: what to keep together and where to cut.

    Returns:
        The same graph with fewer, larger layers; its stages are those of the original model.

    Raises:
        PlanError: a pattern matches nothing, a cut is impossible where it is wanted, or rules contradict.

    Example:
        >>> import torch
        >>> from fedmp.graph import trace
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> merged = apply_cut_rules(trace(model, (torch.zeros(3, 4),)), CutRules(together=(("1", "2"),)))
        >>> [layer.name for layer in merged.layers]
        ['0', '1', '3']
    """
    wanted = {cut: pattern for pattern in rules.before for cut in _starts(graph, pattern)}
    kept = set(wanted) if rules.only_before else set(range(1, len(graph.layers)))
    for pattern in rules.uncut:
        for path in _modules(graph, pattern):
            kept -= _inside(graph, (path,))
    for group in rules.together:
        for pattern in group:
            _modules(graph, pattern)
        kept -= _inside(graph, group)
    for cut, pattern in wanted.items():
        if cut not in kept:
            raise PlanError(
                f"the rules contradict: a cut before {pattern!r} is wanted, but 'uncut' or 'together' forbids it"
            )
    return _merged(graph, [0, *sorted(kept)])


def _layer_paths(graph: LayerGraph) -> list[list[str]]:
    """For each layer, the module paths of its nodes, in order."""
    cuts = graph.train.cuts
    return [
        [module_path(node) for node in graph.train.nodes[start:stop]]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def _modules(graph: LayerGraph, pattern: str) -> list[str]:
    """Paths of the modules that match, outermost first, in the order in which they run."""
    found: dict[str, None] = {}
    for paths in _layer_paths(graph):
        for path in dict.fromkeys(paths):
            parts = path.split(".")
            prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
            match = next(
                (prefix for prefix in prefixes if prefix and fnmatch.fnmatchcase(prefix, pattern)), None
            )
            if match is not None:
                found[match] = None
    if not found:
        names = ", ".join(repr(layer.name) for layer in graph.layers[:8])
        raise PlanError(
            f"no module of {graph.model_name} that runs matches {pattern!r}; its layers are {names}, ..."
        )
    return list(found)


def _starts(graph: LayerGraph, pattern: str) -> list[int]:
    """The first layer that begins inside each module that matches.

    What a module computes before it first uses weights (a mask, a reshape) may stay in the layer before.
    """
    layers = _layer_paths(graph)
    starts = []
    for module in _modules(graph, pattern):
        index = next((i for i, paths in enumerate(layers) if _is_in(paths[0], module)), None)
        if index is None:
            where = next(i for i, paths in enumerate(layers) if any(_is_in(path, module) for path in paths))
            raise PlanError(
                f"no cut is possible right before {module!r}: it runs inside layer {graph.layers[where].name!r}, "
                f"because it has no weights of its own or a cut there would not be exact"
            )
        if index > 0:
            starts.append(index)
    return starts


def _inside(graph: LayerGraph, patterns: Sequence[str]) -> set[int]:
    """Cuts between the first and the last layer of the modules that match any of the patterns."""
    layers = _layer_paths(graph)
    touched: set[int] = set()
    for module in (module for pattern in patterns for module in _modules(graph, pattern)):
        found = [index for index, paths in enumerate(layers) if any(_is_in(path, module) for path in paths)]
        begins = next((index for index in found if _is_in(layers[index][0], module)), found[0])
        touched.update(index for index in found if index >= begins)
    return set(range(min(touched) + 1, max(touched) + 1))


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _merged(graph: LayerGraph, starts: Sequence[int]) -> LayerGraph:
    layers = []
    for start, stop in zip(starts, [*starts[1:], len(graph.layers)], strict=True):
        state = dict.fromkeys(name for layer in graph.layers[start:stop] for name in layer.state)
        layers.append(Layer(graph.layers[start].name, tuple(state)))
    ends = [*starts, len(graph.layers)]
    return dataclasses.replace(
        graph,
        layers=tuple(layers),
        train=dataclasses.replace(graph.train, cuts=tuple(graph.train.cuts[index] for index in ends)),
        eval=dataclasses.replace(graph.eval, cuts=tuple(graph.eval.cuts[index] for index in ends)),
    )
