"""Modules that are not traced into: each stays one opaque node that runs the original code in its stage.

While a model is exported, a leaf's forward is replaced by one call of the placeholder operator
`fedmp::leaf`, which takes the leaf's tensors and inputs. What it returns is found out by running a copy
of the leaf on made-up inputs of two batch sizes. Afterwards the placeholder becomes a `LeafCall`.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from fedmp.errors import TraceError
from fedmp.graph.leaf_call import CallArguments, FunctionBody, LeafCall, ModuleBody
from fedmp.graph.probe import TENSOR, probe_call

__all__ = ["Chain", "LeafTracer", "find_leaves"]


class Chain(nn.Sequential):
    """Modules that run one after another, none of which is traced into: each is one layer.

    A tuple that one returns becomes the positional arguments of the next.

    Example:
        >>> Chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chain; the first module takes all arguments."""
        modules = list(self)
        result = modules[0](*args, **kwargs)
        for module in modules[1:]:
            result = module(*result) if isinstance(result, tuple) else module(result)
        return result


def find_leaves(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules whose path matches a pattern.

    Args:
        patterns: as in `fnmatch`; `*` also matches dots.

    Raises:
        TraceError: a pattern matches no module.
    """
    found: dict[str, nn.Module] = {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise TraceError(
                f"no module of {type(model).__name__} matches the leaf {pattern!r}; there are, for example, "
                f"{', '.join(map(repr, names[:8])) or 'none'}"
            )
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found[name] = module
    return found


@dataclass
class LeafTracer:
    """Stands in for the leaves of one model while it is exported in one mode.

    Attributes:
        leaves: modules by path.
        calls: what each placeholder call stands for, by its key; filled while exporting.
    """

    leaves: Mapping[str, nn.Module]
    calls: dict[str, LeafCall] = field(default_factory=dict)
    _results: dict[str, list[Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the leaves' forwards."""
        self.calls.clear()
        token = _ACTIVE.set(self)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_watched_functions())
                for name, module in self.leaves.items():
                    stack.enter_context(_replaced_forward(module, self._forward(name, module)))
                yield
        finally:
            _ACTIVE.reset(token)

    def resolve(self, program: torch.export.ExportedProgram) -> None:
        """Put the leaves themselves where the placeholders are."""
        root, graph = program.graph_module, program.graph_module.graph
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not torch.ops.fedmp.leaf.default:
                continue
            target = f"leaf_{len([n for n in graph.nodes if n.op == 'call_module'])}"
            root.add_submodule(target, self.calls[str(node.args[3])])
            with graph.inserting_before(node):
                call = graph.call_module(target, tuple(node.args[:3]))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)

    def fake_results(self, key: str) -> list[torch.Tensor]:
        """New tensors like those that a call returns."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._results[key]]

    def _forward(self, name: str, module: nn.Module) -> Any:
        original = ModuleBody(copy.deepcopy(module))
        skeleton = ModuleBody(_without_memory(module))
        parameters, buffers = list(dict(module.named_parameters())), list(dict(module.named_buffers()))
        names = tuple(f"inner.{own}" for own in (*parameters, *buffers))

        def forward(*args: Any, **kwargs: Any) -> Any:
            own: dict[str, torch.Tensor] = dict(module.named_parameters())
            own.update(module.named_buffers())
            arguments = CallArguments.of(args, kwargs)
            call = LeafCall(skeleton, names, len(parameters), arguments)
            return self._place(f"leaf {name!r} ({type(module).__name__})", call, original, arguments, own)

        return forward

    def apply_function(self, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """One call of a custom autograd function, whose own backward a trace would lose.

        Raises:
            TraceError: it takes a function or a module, so its backward cannot be cut out.
        """
        arguments = CallArguments.of(args, kwargs)
        name = f"autograd function {function.__name__}"
        if any(callable(leaf) for leaf in arguments.constants.values()):
            raise TraceError(
                f"{name} takes a function or a module, so its backward cannot be cut out; make the module "
                f"that calls it a leaf: leaves=('its.name',)"
            )
        body = FunctionBody(function)
        return self._place(name, LeafCall(body, (), 0, arguments), body, arguments, {})

    def _place(
        self,
        name: str,
        call: LeafCall,
        original: nn.Module,
        arguments: CallArguments,
        own: Mapping[str, torch.Tensor],
    ) -> Any:
        """Put a placeholder for `call` into the trace, and return what it would return."""
        key = f"call {len(self.calls)}"
        probe = probe_call(name, original, call, arguments)
        self.calls[key], self._results[key] = call, probe.results
        made = iter(torch.ops.fedmp.leaf(list(own.values()), arguments.tensors, arguments.numbers, key))
        return tree_unflatten([next(made) if leaf is TENSOR else leaf for leaf in probe.leaves], probe.spec)


_ACTIVE: ContextVar[LeafTracer] = ContextVar("fedmp_leaf_tracer")


@torch.library.custom_op("fedmp::leaf", mutates_args=())
def _leaf(
    state: list[torch.Tensor], tensors: list[torch.Tensor], numbers: list[int], key: str
) -> list[torch.Tensor]:
    raise RuntimeError("fedmp::leaf exists only while a model is traced")


@_leaf.register_fake
def _leaf_shapes(
    state: list[torch.Tensor], tensors: list[torch.Tensor], numbers: list[int], key: str
) -> list[torch.Tensor]:
    return _ACTIVE.get().fake_results(key)


@contextlib.contextmanager
def _watched_functions() -> Iterator[None]:
    """Let the active tracer see every call of a custom autograd function."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        tracer = _ACTIVE.get(None)
        if tracer is None or cls.__module__.startswith("torch."):
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.apply_function(cls, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)
