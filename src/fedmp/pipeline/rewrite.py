"""Change a stage's program without changing what it computes: seeded randomness, deferred weight gradients.

A program is a graph of ATen calls. Some calls are replaced by modules that do the same with something
added; the program that the stage came with is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fedmp.graph.deferred import WeightGradients, deferred_module
from fedmp.graph.program_module import program_module
from fedmp.seeds import derive_seed
from fedmp.stages import Program

__all__ = ["RandomKey", "defer_weight_gradients", "mutated_inputs", "seed_randomness"]


class RandomKey:
    """Where the random numbers of a micro-batch come from.

    Attributes:
        seed: None leaves them to torch's global generator.
        round, step, microbatch: that run now.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.round = self.step = self.microbatch = 0

    def seed_of(self, name: str) -> int:
        """The seed of one random call in this micro-batch.

        Args:
            name: of the call in the whole model's graph, the same however it is cut.
        """
        return derive_seed(self.seed or 0, "random", self.round, self.step, self.microbatch, name)


class _SeededDropout(nn.Module):
    """`aten.dropout` with a generator of its own."""

    def __init__(self, name: str, key: RandomKey) -> None:
        super().__init__()
        self._name = name
        self._key = key

    def forward(self, tensor: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
        """Zero elements with `probability` and scale the others up."""
        if not training or probability == 0:
            return tensor
        if probability == 1:
            return tensor * 0.0
        generator = torch.Generator(tensor.device).manual_seed(self._key.seed_of(self._name))
        kept = torch.empty_like(tensor).bernoulli_(1 - probability, generator=generator)
        return tensor * kept.div_(1 - probability)


class _SeededCall(nn.Module):
    """Any other random call, with the device's generator seeded for it and put back after it."""

    def __init__(self, name: str, key: RandomKey, target: Callable[..., Any]) -> None:
        super().__init__()
        self._name = name
        self._key = key
        self._target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        devices = {arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cuda"}
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            torch.manual_seed(self._key.seed_of(self._name))
            return self._target(*args, **kwargs)


def seed_randomness(program: Program, key: RandomKey) -> Program:
    """Make every random call of a program depend on a seed, and on nothing else.

    Args:
        program: of one stage; unchanged if nothing in it is random.
        key: holds the seed of the micro-batch that runs.

    Returns:
        A program whose random numbers do not depend on the cut, the schedule or the process.
    """

    def module_for(node: fx.Node) -> nn.Module | None:
        if not _is_random(node):
            return None
        if node.target is torch.ops.aten.dropout.default:
            return _SeededDropout(node.name, key)
        return _SeededCall(node.name, key, node.target)  # type: ignore[arg-type]

    return _with_modules(program, "seeded", module_for)


def defer_weight_gradients(
    program: Program, store: WeightGradients, parameters: Mapping[str, int], *, smallest: int = 0
) -> Program:
    """Take weight gradients out of a program's backward: its linear and convolution layers leave them to
    `store`, which may compute them later (Qi et al., 2023, Zero Bubble Pipeline Parallelism, section 2).

    Args:
        program: of one stage.
        store: where the work that remains is kept.
        parameters: elements of each parameter, by name.
        smallest: weights of fewer elements stay with autograd.

    Returns:
        A program whose backward computes gradients of inputs, and of the weights of all other layers.
    """
    placeholders = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    sizes: dict[object, int] = {
        node: parameters[name]
        for node, name in zip(placeholders, program.state, strict=False)
        if name in parameters
    }

    def module_for(node: fx.Node) -> nn.Module | None:
        return deferred_module(node, store, sizes, smallest=smallest)

    return _with_modules(program, "deferred", module_for)


def mutated_inputs(program: Program) -> tuple[int, ...]:
    """The boundary tensors that a program writes to, by position, directly or through a view.

    Received tensors are autograd leaves, which must not be written to, so the runner copies these.
    """
    placeholders = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    roots: dict[fx.Node, fx.Node] = {node: node for node in placeholders[len(program.state) :]}
    written: set[fx.Node] = set()
    for node in program.module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, fx.Node) or value not in roots:
                continue
            if argument.alias_info.is_write:
                written.add(roots[value])
            roots[node] = roots[value]
    return tuple(index for index, node in enumerate(placeholders[len(program.state) :]) if node in written)


def _is_random(node: fx.Node) -> bool:
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(
        node.target, "tags", ()
    ):
        return False
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(probability != 0.0)
    return True


def _with_modules(
    program: Program, prefix: str, module_for: Callable[[fx.Node], nn.Module | None]
) -> Program:
    """The program with some of its calls replaced by modules; itself if there are none."""
    wanted = {
        node.name: module
        for node in program.module.graph.nodes
        if node.op == "call_function" and (module := module_for(node)) is not None
    }
    if not wanted:
        return program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        if node.name in wanted:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node("call_module", f"{prefix}_{node.name}", args, kwargs, node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    root: dict[str, Any] = {f"{prefix}_{name}": module for name, module in wanted.items()}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in root:
            root[str(node.target)] = operator.attrgetter(str(node.target))(program.module)
    return replace(program, module=program_module(root, graph))
