"""Make an exported graph safe to cut: no assertions, no in-place updates of activations where avoidable.

An in-place update of a value that crossed a cut would change a received buffer behind autograd's back.
`relu_`, `add_` and their like become their functional twins; what cannot be replaced (a write through
a view) is reported as a span of nodes that must stay in one stage. Updates of buffers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fedmp.graph.layer_graph import node_value
from fedmp.graph.leaf_call import LeafCall

__all__ = ["functionalize", "mutated_arguments"]

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
# composite operators that update their running statistics without saying so in their schema
_STATISTICS = {torch.ops.aten.batch_norm.default: (3, 4), torch.ops.aten.instance_norm.default: (3, 4)}


def functionalize(graph: fx.Graph, state: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Rewrite `graph` in place.

    Args:
        graph: of ATen calls, as torch.export gives it.
        state: placeholders of parameters, buffers and constants.

    Returns:
        Spans (first node, last node), in graph order, that must not be cut, because the last one writes
        into what the first one made.
    """
    _drop_assertions(graph)
    storage = _Storages(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    spans: list[tuple[fx.Node, fx.Node]] = []
    for node in list(graph.nodes):
        for target in mutated_arguments(node):
            if storage.root(target) in state:
                continue
            if not _is_alone(node, target, storage, order):
                spans.append((storage.root(target), node))
            elif _use_functional_twin(node, target, order):
                storage.release(node)
            elif copied := _write_to_copy(node, target, order):
                spans.append((copied, node))
                storage.release(node, copied)
            else:
                spans.append((storage.root(target), node))
    return spans


def mutated_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose tensors a call writes into."""
    body = _body_of(node)
    if body is not None:
        yield from _mutated_by_body(node, *body)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    for index in _STATISTICS.get(node.target, ()):
        statistics = node.args[index]
        if isinstance(statistics, fx.Node):
            yield statistics
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                yield value


def _drop_assertions(graph: fx.Graph) -> None:
    """Also in the graphs that nodes call: assertions name the devices that the model was traced on."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr" and graph.owning_module is not None:
            body = getattr(graph.owning_module, str(node.target), None)
            if isinstance(body, fx.GraphModule):
                _drop_assertions(body.graph)
                body.recompile()


def _body_of(node: fx.Node) -> tuple[Any, Sequence[Any]] | None:
    """The module that a node runs (a leaf, the body of a `torch.no_grad()` block), and its arguments."""
    root = node.graph.owning_module
    if root is None:
        return None
    if node.op == "call_module":
        return root.get_submodule(str(node.target)), node.args
    for index, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return root.get_submodule(str(argument.target)), node.args[index + 1 :]
    return None


def _mutated_by_body(node: fx.Node, body: Any, args: Sequence[Any]) -> Iterator[fx.Node]:
    if isinstance(body, LeafCall):  # its code is not known: it may update any of its buffers
        yield from body.buffers_among(args[0])
        return
    if not isinstance(body, fx.GraphModule):
        return
    placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    outer = dict(zip(placeholders, args, strict=False))
    storage = _Storages(body.graph)
    for inner in body.graph.nodes:
        for target in mutated_arguments(inner):
            written = outer.get(storage.root(target))
            if isinstance(written, fx.Node):
                yield written


class _Storages:
    """Which nodes share memory: every node's root is the first node that made its storage."""

    def __init__(self, graph: fx.Graph) -> None:
        self._root: dict[fx.Node, fx.Node] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._join(node, self.root(_aliased(node)) if _aliased(node) is not None else node)

    def root(self, node: fx.Node | None) -> fx.Node:
        assert node is not None
        return self._root.get(node, node)

    def release(self, node: fx.Node, made_by: fx.Node | None = None) -> None:
        """`node` is functional now: it and what aliases it have a storage of their own, made by `made_by`."""
        self.members[self._root[node]].remove(node)
        later = list(self.members[self._root[node]])
        if made_by is not None:
            self._join(made_by, made_by)
        self._join(node, made_by or node)
        for other in later:
            source = _aliased(other)
            if source is not None and self._root[source] is (made_by or node):
                self.members[self._root[other]].remove(other)
                self._join(other, made_by or node)

    def _join(self, node: fx.Node, root: fx.Node) -> None:
        self._root[node] = root
        self.members.setdefault(root, []).append(node)


def _aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the result may share, if any."""
    if node.op != "call_function":
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0] if node.target.__name__ == "getitem" and node.args else None  # type: ignore[union-attr]
        return source if isinstance(source, fx.Node) else None
    if not any(result.alias_info is not None for result in node.target._schema.returns):
        return None
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and index < len(node.args):
            source = node.args[index]
            if isinstance(source, fx.Node):
                return source
    return None


def _is_alone(node: fx.Node, target: fx.Node, storage: _Storages, order: dict[fx.Node, int]) -> bool:
    """Whether nothing but `target` itself shows the written memory to anyone after `node`."""
    here = order[node]
    for member in storage.members[storage.root(target)]:
        if member in (node, target) or order[member] > here:
            continue
        if any(order.get(user, len(order)) > here for user in member.users):
            return False
    # a write through a view must reach its base; only whole tensors have a functional twin
    return storage.root(target) is target or all(
        order.get(user, len(order)) <= here for user in storage.root(target).users
    )


def _use_functional_twin(node: fx.Node, target: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Replace `op_` by `op` and let later users of its target read the new value instead."""
    overload = node.target
    assert isinstance(overload, torch._ops.OpOverload)
    name = overload._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    if packet is None or overload._overloadname not in packet.overloads() or node.args[:1] != (target,):
        return False
    if node_value(node).dtype != node_value(target).dtype:
        return False
    twin = getattr(packet, overload._overloadname)
    if twin is torch.ops.aten.copy.default or torch.Tag.generated in twin.tags:
        return False  # autograd knows no derivative of these
    node.target = twin
    here = order[node]
    target.replace_all_uses_with(
        node, delete_user_cb=lambda user: user is not node and order.get(user, len(order)) > here
    )
    return True


def _write_to_copy(node: fx.Node, target: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Let a write go to a copy of its target, made just before, if the write returns what it wrote into."""
    overload = node.target
    if (
        node.op != "call_function"
        or not isinstance(overload, torch._ops.OpOverload)
        or node.args[:1] != (target,)
    ):
        return None
    results = overload._schema.returns
    if len(results) != 1 or results[0].alias_info is None or not results[0].alias_info.is_write:
        return None
    with node.graph.inserting_before(node):
        copied = node.graph.call_function(torch.ops.aten.clone.default, (target,))
    copied.meta = {key: value for key, value in target.meta.items() if key == "val"}
    copied.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    node.args = (copied, *node.args[1:])
    here = order[node]
    order[copied] = here
    target.replace_all_uses_with(
        node, delete_user_cb=lambda user: user not in (copied, node) and order.get(user, len(order)) > here
    )
    return copied
