"""The traced model as data: its tensors, its two graphs (train and eval), and its layers.

`trace` makes a `LayerGraph`; `profile` reads costs off it; `split` cuts stages out of it. A cut is a
position in the list of layers, and so a position in each of the two graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec

__all__ = ["Layer", "LayerGraph", "LiveSet", "ModeGraph", "StateSpec", "node_value"]


@dataclass(frozen=True)
class StateSpec:
    """One tensor that the model owns.

    Attributes:
        name: its canonical name: the first under which the model registers it.
        aliases: every name in the model's state dict, the canonical one first; more than one if tied.
        shape, dtype: of the tensor.
        kind: "parameter", "buffer", or "constant" (a plain tensor attribute or a tensor literal).
        is_persistent: whether the model's state dict holds it.
        requires_grad: False for buffers, constants and frozen parameters.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["parameter", "buffer", "constant"]
    is_persistent: bool
    requires_grad: bool

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """A contiguous run of the graph that no plan cuts.

    Attributes:
        name: path of the module it comes from, made unique.
        state: canonical names of the tensors it uses.
        must_cut_after: whether every plan cuts right after it.
        device: name of the device that must run it; None for any.
    """

    name: str
    state: tuple[str, ...]
    must_cut_after: bool = False
    device: str | None = None


@dataclass(frozen=True)
class LiveSet:
    """What crosses a cut: tensors in order of their definition, then scalars that must be sent.

    Attributes:
        tensors: tensor-valued nodes that are defined before the cut and used after it.
        scalars: number-valued ones that no live tensor's shape can give back; sent as 0-dim tensors.
        derived: number-valued ones that are computed again after the cut, in order.
        sizes: for each symbol of a dynamic size, the live tensor and dim that give it.
    """

    tensors: tuple[fx.Node, ...]
    scalars: tuple[fx.Node, ...]
    derived: tuple[fx.Node, ...]
    sizes: Mapping[fx.Node, tuple[fx.Node, int]]


@dataclass(frozen=True, eq=False)
class ModeGraph:
    """The graph of one mode, train or eval.

    Attributes:
        graph: an fx graph of ATen calls without in-place updates of activations.
        nodes: its computing nodes in order; a cut is a position in this list.
        state: canonical state name by placeholder.
        inputs: placeholders of the tensor inputs, in flattened order; None where an input is not a tensor.
        constants: the values of non-tensor inputs, by flattened position.
        results: the flattened result: nodes, or constants.
        out_spec: how the result is flattened.
        submodules: what some nodes call: the body of a `torch.no_grad()` block, a leaf.
        sizes: the symbols of the graph's shapes as expressions of the batch size.
        rules: conditions on the batch size under which the graph is right.
        cuts: position in `nodes` before each layer, and the end: one more than there are layers.
    """

    graph: fx.Graph
    nodes: tuple[fx.Node, ...]
    state: Mapping[fx.Node, str]
    inputs: tuple[fx.Node | None, ...]
    constants: Mapping[int, Any]
    results: tuple[Any, ...]
    out_spec: TreeSpec
    submodules: Mapping[str, nn.Module]
    sizes: Mapping[Any, Any]
    rules: tuple[Any, ...]
    cuts: tuple[int, ...]

    @cached_property
    def position(self) -> Mapping[fx.Node, int]:
        """Position of each computing node."""
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def last_use(self) -> Mapping[fx.Node, int]:
        """Position of the last use of each input and computing node; past the end for results."""
        last: dict[fx.Node, int] = {}
        for index, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                last[used] = index
        for result in self.results:
            if isinstance(result, fx.Node):
                last[result] = len(self.nodes)
        return last

    def live_at(self, cut: int) -> LiveSet:
        """What crosses the cut before position `cut`.

        Args:
            cut: a position in `nodes`, from 0 (the model's inputs) to the end (nothing but the results).
        """
        if cut == 0:
            return LiveSet(tuple(node for node in self.inputs if node is not None), (), (), {})
        candidates = [node for node in self.inputs if node is not None] + list(self.nodes[:cut])
        live = [node for node in candidates if self.last_use.get(node, -1) >= cut]
        tensors = tuple(node for node in live if isinstance(node_value(node), torch.Tensor))
        numbers = [node for node in live if not isinstance(node_value(node), torch.Tensor)]
        sizes: dict[fx.Node, tuple[fx.Node, int]] = {}
        derived: list[fx.Node] = []
        scalars = [node for node in numbers if not _derive(node, tensors, sizes, derived)]
        return LiveSet(tensors, tuple(scalars), tuple(derived), sizes)


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """A traced model.

    Attributes:
        model_name: class name of the model, for messages.
        state: every tensor of the model, by canonical name, in registration order.
        constants: values of the state of kind "constant".
        layers: in graph order.
        train, eval: the two graphs; layer i spans nodes `cuts[i]:cuts[i + 1]` of each.
        in_spec, out_spec: how (args, kwargs) and the train mode's result are flattened.
        batch_size: of the example inputs.
        fingerprint: equal for two traces of the same architecture.
    """

    model_name: str
    state: Mapping[str, StateSpec]
    constants: Mapping[str, torch.Tensor]
    layers: tuple[Layer, ...]
    train: ModeGraph
    eval: ModeGraph
    in_spec: TreeSpec
    out_spec: TreeSpec
    batch_size: int
    fingerprint: str

    def mode(self, *, training: bool) -> ModeGraph:
        """The graph of one mode."""
        return self.train if training else self.eval


def node_value(node: fx.Node) -> Any:
    """The fake tensor, symbolic number or tuple of those that stands for the node's result."""
    return node.meta.get("val")


def _derive(
    node: fx.Node,
    tensors: tuple[fx.Node, ...],
    sizes: dict[fx.Node, tuple[fx.Node, int]],
    derived: list[fx.Node],
) -> bool:
    """Whether a number can be computed again from the shapes of `tensors`; notes down how."""
    if node in sizes or node in derived:
        return True
    value = node_value(node)
    if isinstance(value, torch.SymInt):
        for tensor in tensors:
            for dim, size in enumerate(node_value(tensor).shape):
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    sizes[node] = (tensor, dim)
                    return True
    inputs = node.all_input_nodes
    if (
        node.op != "call_function"
        or not inputs
        or any(isinstance(node_value(used), torch.Tensor) for used in inputs)
    ):
        return False
    if all(_derive(used, tensors, sizes, derived) for used in inputs):
        derived.append(node)
        return True
    return False
