"""Find a traced model's layers: the units that a plan assigns to stages.

A layer starts where a module with state of its own starts running, and carries along what follows
without state (activations, additions, reshapes). A place is no layer boundary if a cut there would not
be exact: a write through a view spans it, a tuple or a tensor of unknown size is alive across it, or a
buffer that is updated is used on both sides. The same boundaries are then found in the eval graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fedmp.graph.functionalize import mutated_arguments
from fedmp.graph.layer_graph import Layer, ModeGraph, node_value

__all__ = ["Layout", "Span", "find_layers", "module_path"]

Span = tuple[fx.Node, fx.Node]

_LARGE = 0.25


@dataclass(frozen=True)
class Layout:
    """The layers, and where each starts (and the last ends) in the two graphs."""

    layers: tuple[Layer, ...]
    train_cuts: tuple[int, ...]
    eval_cuts: tuple[int, ...]


def find_layers(
    train: ModeGraph, train_spans: Sequence[Span], evaluation: ModeGraph, eval_spans: Sequence[Span]
) -> Layout:
    """Lay out the layers of both graphs.

    Args:
        train, evaluation: the two graphs, without cuts.
        train_spans, eval_spans: nodes (first, last) of each graph that no cut may separate.
    """
    owners = [_state_of(train, node) for node in train.nodes]
    paths = [module_path(node) for node in train.nodes]
    starts = _starts(paths, owners, train)
    to_eval = _align(train, evaluation)
    cuts = [(start, to_eval[start]) for start in starts]
    forbidden_train = _forbidden(train, [*train_spans, *_value_spans(train), *_update_spans(train)])
    forbidden_eval = _forbidden(
        evaluation, [*eval_spans, *_value_spans(evaluation), *_update_spans(evaluation)]
    )
    cuts = [
        cut
        for index, cut in enumerate(cuts)
        if index == 0 or (cut[0] not in forbidden_train and cut[1] not in forbidden_eval)
    ]
    cuts = _without_strays(cuts, train, evaluation)
    train_cuts = (*(cut[0] for cut in cuts), len(train.nodes))
    eval_cuts = (*(cut[1] for cut in cuts), len(evaluation.nodes))
    return Layout(_name_layers(train_cuts, paths, owners), train_cuts, eval_cuts)


def _state_of(mode: ModeGraph, node: fx.Node) -> tuple[str, ...]:
    return tuple(dict.fromkeys(mode.state[used] for used in node.all_input_nodes if used in mode.state))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node comes from; empty for the model itself."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack and not stack[-1].startswith("_empty_nn_module_stack") else ""


def _starts(paths: Sequence[str], owners: Sequence[tuple[str, ...]], mode: ModeGraph) -> list[int]:
    """Positions where a run of one module's nodes starts, if some node of the run has state."""
    runs: list[tuple[int, list[int]]] = []
    for index, path in enumerate(paths):
        if index == 0 or path != paths[index - 1]:
            runs.append((index, []))
        if owners[index]:
            runs[-1][1].append(index)
    num_bytes = {mode.state[node]: _num_bytes(node) for node in mode.state}
    whole = sum(num_bytes.values())
    starts: list[int] = []
    for start, stateful in runs:
        own = {name for index in stateful for name in owners[index]}
        if stateful:
            starts.append(start)
        # a module that holds much of the model by itself is cut inside, before each use of its tensors
        if len(stateful) > 1 and sum(num_bytes[name] for name in own) > _LARGE * whole:
            starts.extend(stateful[1:])
    return [0, *(start for start in starts[1:] if start > 0)]


def _num_bytes(node: fx.Node) -> int:
    value = node_value(node)
    return int(value.numel()) * int(value.dtype.itemsize) if isinstance(value, torch.Tensor) else 0


def _align(train: ModeGraph, evaluation: ModeGraph) -> list[int]:
    """For each position of the train graph, and its end, the matching one of the eval graph."""
    first = [(module_path(node), str(node.target)) for node in train.nodes]
    second = [(module_path(node), str(node.target)) for node in evaluation.nodes]
    matched: list[int | None] = [None] * len(first)
    if first == second:
        matched = list(range(len(first)))
    else:
        for block in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
            for offset in range(block.size):
                matched[block.a + offset] = block.b + offset
    aligned = [len(second)] * (len(first) + 1)
    for index in range(len(first) - 1, -1, -1):
        found = matched[index]
        aligned[index] = aligned[index + 1] if found is None else found
    return aligned


def _value_spans(mode: ModeGraph) -> Iterable[Span]:
    """From each node whose result cannot be sent to its last use."""
    for node in mode.nodes:
        if not _can_be_sent(node_value(node), mode):
            users = [user for user in node.users if user in mode.position]
            if users:
                yield node, max(users, key=mode.position.__getitem__)


def _can_be_sent(value: Any, mode: ModeGraph) -> bool:
    """Whether it is a number, or a strided tensor whose shape follows from the batch size."""
    if not isinstance(value, torch.Tensor):
        return not isinstance(value, tuple | list)
    if value.layout is not torch.strided:
        return False
    return all(
        isinstance(size, int) or size.node.expr.free_symbols <= set(mode.sizes) for size in value.shape
    )


def _update_spans(mode: ModeGraph) -> Iterable[Span]:
    """From the first to the last use of each buffer that is updated."""
    updated = {target for node in mode.nodes for target in mutated_arguments(node) if target in mode.state}
    for buffer in updated:
        users = sorted(
            (user for user in buffer.users if user in mode.position), key=mode.position.__getitem__
        )
        if len(users) > 1:
            yield users[0], users[-1]


def _forbidden(mode: ModeGraph, spans: Iterable[Span]) -> set[int]:
    return {
        position
        for first, last in spans
        for position in range(mode.position.get(first, -1) + 1, mode.position[last] + 1)
    }


def _without_strays(
    cuts: list[tuple[int, int]], train: ModeGraph, evaluation: ModeGraph
) -> list[tuple[int, int]]:
    """Drop cuts that would leave a tensor's uses in eval mode in other layers than in train mode."""
    while True:
        homes: dict[str, set[int]] = {}
        for index, nodes in enumerate(_slices([cut[0] for cut in cuts], train)):
            for node in nodes:
                for name in _state_of(train, node):
                    homes.setdefault(name, set()).add(index)
        dropped: set[int] = set()
        for index, nodes in enumerate(_slices([cut[1] for cut in cuts], evaluation)):
            for node in nodes:
                for name in _state_of(evaluation, node):
                    home = homes.setdefault(name, {index})
                    if index not in home:
                        nearest = min(home, key=lambda other: abs(other - index))
                        dropped.update(range(min(index, nearest) + 1, max(index, nearest) + 1))
        if not dropped:
            return cuts
        cuts = [cut for index, cut in enumerate(cuts) if index not in dropped]


def _slices(starts: Sequence[int], mode: ModeGraph) -> list[Sequence[fx.Node]]:
    stops = [*starts[1:], len(mode.nodes)]
    return [mode.nodes[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _name_layers(
    cuts: Sequence[int], paths: Sequence[str], owners: Sequence[tuple[str, ...]]
) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    seen: dict[str, int] = {}
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        state = tuple(dict.fromkeys(name for owned in owners[start:stop] for name in owned))
        named = next((index for index in range(start, stop) if owners[index]), start)
        name = (paths[named] if named < len(paths) else "") or "forward"
        seen[name] = seen.get(name, 0) + 1
        layers.append(Layer(name if seen[name] == 1 else f"{name}#{seen[name]}", state))
    return tuple(layers)
