"""Where a plan may and must cut a model, and which device runs what, by the names of modules.

Rules act on the traced model. Layers that must stay together become one layer, which every partitioner
obeys without knowing; forced cuts and devices are noted on the layers, and from there in the profile.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from pydantic import Field

from fedmp.component import Component
from fedmp.errors import PlanError
from fedmp.graph.layer_graph import Layer, LayerGraph
from fedmp.graph.layers import module_path

__all__ = ["CutRules", "apply_cut_rules"]


class CutRules(Component):
    """Rules of cutting. Names are module paths, or patterns of them as in `fnmatch` (`*` matches dots).

    Attributes:
        force: every plan cuts right before each module that matches.
        only: the split points: no cut but right before a module that matches (or is in `force`); empty
            for anywhere.
        forbid: no cut inside a module that matches.
        together: groups of modules; everything from a group's first to its last layer is one layer.
        devices: names of devices by module; the device runs all layers of the modules that match.

    Example:
        >>> CutRules(force=("decoder",), forbid=("encoder.*",), devices={"head": "gateway"}).only
        ()
    """

    force: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    devices: Mapping[str, str] = Field(default_factory=dict)


def apply_cut_rules(graph: LayerGraph, rules: CutRules) -> LayerGraph:
    """Merge and mark layers so that a plan keeps the rules.

    Args:
        graph: the traced model.
        rules: where to cut, where not, and what runs where.

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
    forced = {
        cut: graph.layers[cut].name
        for cut in range(1, len(graph.layers))
        if graph.layers[cut - 1].must_cut_after
    }
    forced |= {cut: pattern for pattern in rules.force for cut in _starts(graph, pattern)}
    chosen = {cut: pattern for pattern in rules.only for cut in _starts(graph, pattern)}
    kept = {*chosen, *forced} if rules.only else set(range(1, len(graph.layers)))
    for pattern in rules.forbid:
        for path in _modules(graph, pattern):
            kept -= _inside(graph, (path,))
    for group in rules.together:
        kept -= _inside(graph, group)
    for cut, pattern in forced.items():
        if cut not in kept:
            raise PlanError(
                f"the rules contradict: a cut before {pattern!r} is forced, but 'forbid' or 'together' forbids it"
            )
    return _merged(graph, [0, *sorted(kept)], forced, _pinned(graph, rules.devices))


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
        more = ", ..." if len(graph.layers) > 8 else ""
        raise PlanError(
            f"no module of {graph.model_name} that runs matches {pattern!r}; its layers are {names}{more}"
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
    modules = [module for pattern in patterns for module in _modules(graph, pattern)]
    touched = {index for module in modules for index in _layers_of(graph, module)}
    return set(range(min(touched) + 1, max(touched) + 1))


def _layers_of(graph: LayerGraph, module: str) -> list[int]:
    """The layers that run a module, without one before it that only prepares its inputs."""
    layers = _layer_paths(graph)
    found = [index for index, paths in enumerate(layers) if any(_is_in(path, module) for path in paths)]
    begins = next((index for index in found if _is_in(layers[index][0], module)), found[0])
    return [index for index in found if index >= begins]


def _pinned(graph: LayerGraph, devices: Mapping[str, str]) -> dict[int, str]:
    """The device of each layer that has one."""
    pinned = {index: layer.device for index, layer in enumerate(graph.layers) if layer.device is not None}
    for pattern, device in devices.items():
        for module in _modules(graph, pattern):
            for index in _layers_of(graph, module):
                other = pinned.setdefault(index, device)
                if other != device:
                    raise PlanError(
                        f"the rules contradict: layer {graph.layers[index].name!r} is to run on "
                        f"device {other!r} and, by {pattern!r}, on {device!r}"
                    )
    return pinned


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _merged(
    graph: LayerGraph, starts: Sequence[int], forced: Mapping[int, str], pinned: Mapping[int, str]
) -> LayerGraph:
    ends = [*starts, len(graph.layers)]
    layers = []
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        devices = {pinned[index] for index in range(start, stop) if index in pinned}
        if len(devices) > 1:
            raise PlanError(
                f"the rules contradict: {graph.layers[start].name!r} to {graph.layers[stop - 1].name!r} stay "
                f"together, but are to run on the devices {', '.join(sorted(devices))}"
            )
        state = dict.fromkeys(name for layer in graph.layers[start:stop] for name in layer.state)
        layers.append(
            Layer(
                name=graph.layers[start].name,
                state=tuple(state),
                must_cut_after=stop in forced,
                device=next(iter(devices), None),
            )
        )
    return dataclasses.replace(
        graph,
        layers=tuple(layers),
        train=dataclasses.replace(graph.train, cuts=tuple(graph.train.cuts[index] for index in ends)),
        eval=dataclasses.replace(graph.eval, cuts=tuple(graph.eval.cuts[index] for index in ends)),
    )
