"""Modules that are not traced into: each stays one opaque node that runs the original code in its stage.

While a model is exported, a leaf's forward is replaced by one call of the placeholder operator
`fedmp::leaf`, which takes the leaf's tensors and inputs. What it returns is found out by running a copy
of the leaf on made-up inputs of two batch sizes. Afterwards the placeholder becomes a `LeafCall`.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from fedmp.errors import TraceError
from fedmp.graph.portable import to_plain

__all__ = ["Chain", "LeafCall", "LeafTracer", "find_leaves"]


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


class LeafCall(nn.Module):
    """One call of a leaf: `call(state, tensors, numbers)` returns a list of tensors.

    Attributes:
        num_parameters: how many of the tensors in `state`, counted from the first, are parameters; the
            rest are buffers.
        flops, saved_bytes: measured on a copy, for one sample.
    """

    def __init__(
        self, body: nn.Module, names: tuple[str, ...], num_parameters: int, arguments: _Arguments
    ) -> None:
        super().__init__()
        self.body = body
        self.training = body.training
        self.num_parameters = num_parameters
        self.flops = 0.0
        self.saved_bytes = 0.0
        self._names = names
        self._spec = arguments.spec
        self._constants = arguments.constants
        self._number_places = arguments.number_places

    def forward(
        self, state: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> list[torch.Tensor]:
        """Run the original code on other tensors."""
        result = self.run(self.body, dict(zip(self._names, state, strict=True)), tensors, numbers)
        # later views were traced for contiguous results
        return [leaf.contiguous() for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]

    def buffers_among(self, state: Any) -> list[Any]:
        """Of the nodes of its state, those of buffers."""
        return list(state)[self.num_parameters :]

    def run(
        self,
        body: nn.Module,
        state: Mapping[str, torch.Tensor],
        tensors: Sequence[torch.Tensor],
        numbers: Sequence[int],
    ) -> Any:
        """The result of `body` as a plain tree."""
        known = {**self._constants, **dict(zip(self._number_places, numbers, strict=True))}
        rest = iter(tensors)
        leaves = [known[i] if i in known else next(rest) for i in range(self._spec.num_leaves)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return to_plain(torch.func.functional_call(body, dict(state), args, kwargs))


class _Body(nn.Module):
    """Calls the forward alone: hooks run where the leaf is called, and are traced there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


class _FunctionBody(nn.Module):
    """Calls a custom autograd function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


def find_leaves(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules whose path matches a pattern.

    Args:
        patterns: as in `fnmatch`; `*` also matches dots.

    Raises:
        ValueError: a pattern matches no module.
    """
    found: dict[str, nn.Module] = {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
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
        original = _Body(copy.deepcopy(module))
        skeleton = _Body(_without_memory(module))
        parameters, buffers = list(dict(module.named_parameters())), list(dict(module.named_buffers()))
        names = tuple(f"inner.{own}" for own in (*parameters, *buffers))

        def forward(*args: Any, **kwargs: Any) -> Any:
            own: dict[str, torch.Tensor] = dict(module.named_parameters())
            own.update(module.named_buffers())
            arguments = _Arguments.of(args, kwargs)
            call = LeafCall(skeleton, names, len(parameters), arguments)
            return self._place(f"leaf {name!r} ({type(module).__name__})", call, original, arguments, own)

        return forward

    def apply_function(self, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """One call of a custom autograd function, whose own backward a trace would lose."""
        arguments = _Arguments.of(args, kwargs)
        name = f"autograd function {function.__name__}"
        if any(callable(leaf) for leaf in arguments.constants.values()):
            raise TraceError(
                f"{name} takes a function or a module, so its backward cannot be cut out; make the module "
                f"that calls it a leaf: trace(..., leaves=('its.name',))"
            )
        body = _FunctionBody(function)
        return self._place(name, LeafCall(body, (), 0, arguments), body, arguments, {})

    def _place(
        self, name: str, call: LeafCall, original: nn.Module, arguments: _Arguments, own: Mapping[str, torch.Tensor]
    ) -> Any:
        """Put a placeholder for `call` into the trace, and return what it would return."""
        key = f"call {len(self.calls)}"
        probe = _probe(name, original, call, arguments)
        self.calls[key], self._results[key] = call, probe.results
        made = iter(torch.ops.fedmp.leaf(list(own.values()), arguments.tensors, arguments.numbers, key))
        return tree_unflatten([next(made) if leaf is _TENSOR else leaf for leaf in probe.leaves], probe.spec)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a call, flattened: tensors, sizes that depend on the batch, and the rest."""

    spec: TreeSpec
    tensors: list[torch.Tensor]
    numbers: list[Any]
    number_places: tuple[int, ...]
    constants: dict[int, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Arguments:
        leaves, spec = tree_flatten(to_plain((args, dict(kwargs))))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt))
        rest = {
            i: leaf for i, leaf in enumerate(leaves) if i not in places and not isinstance(leaf, torch.Tensor)
        }
        return cls(spec, tensors, [leaves[i] for i in places], places, rest)


_TENSOR = object()
_ACTIVE: ContextVar[LeafTracer] = ContextVar("fedmp_leaf_tracer")


@torch.library.custom_op("fedmp::leaf", mutates_args=())
def _leaf(state: list[torch.Tensor], tensors: list[torch.Tensor], numbers: list[int], key: str) -> list[torch.Tensor]:
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
        torch.autograd.Function.apply = original


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


@dataclass(frozen=True)
class _Run:
    """What a call of a leaf returned for made-up inputs, and what it cost."""

    spec: TreeSpec
    leaves: list[Any]
    flops: float
    saved_bytes: float


@dataclass(frozen=True)
class _Probe:
    """What a leaf returns: its tree, its leaves with `_TENSOR` for tensors, and those tensors' shapes."""

    spec: TreeSpec
    leaves: list[Any]
    results: list[Any]


def _probe(name: str, original: nn.Module, call: LeafCall, arguments: _Arguments) -> _Probe:
    """Run a copy of the leaf at two batch sizes."""
    tensors = arguments.tensors
    sizes = [size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)]
    base = min(sizes, key=lambda size: _scaled([size], 1)[0], default=None)
    hint = 1 if base is None else _scaled([base], 1)[0]
    once, twice = (_run_aside(name, original, call, arguments, scale) for scale in (1, 2))
    if once.spec != twice.spec:
        raise TraceError(f"{name} returns another structure for another batch size: {once.spec}, {twice.spec}")
    call.flops = (twice.flops - once.flops) / hint
    call.saved_bytes = (twice.saved_bytes - once.saved_bytes) / hint

    def size_of(first: int, second: int) -> Any:
        if first == second or base is None:
            return first
        slope, rest = divmod(second - first, hint)
        return (base * (second - first) // hint if rest else base * slope) + (2 * first - second)

    leaves: list[Any] = []
    results: list[Any] = []
    for first, second in zip(once.leaves, twice.leaves, strict=True):
        if isinstance(first, torch.Tensor):
            shape = [size_of(*pair) for pair in zip(first.shape, second.shape, strict=True)]
            results.append((shape, first.dtype, tensors[0].device if tensors else first.device))
            leaves.append(_TENSOR)
        else:
            leaves.append(size_of(first, second) if type(first) is int else first)
    return _Probe(once.spec, leaves, results)


def _run_aside(name: str, original: nn.Module, call: LeafCall, arguments: _Arguments, scale: int) -> _Run:
    """Run in a thread of its own, where none of the export's modes is active."""
    outcome: list[_Run | Exception] = []
    module = copy.deepcopy(original)
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    inputs = [(_scaled(tensor.shape, scale), tensor.dtype, device or tensor.device) for tensor in arguments.tensors]
    numbers = _scaled(arguments.numbers, scale)

    def run() -> None:
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                made = [_made_up(*each) for each in inputs]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    leaves, spec = tree_flatten(call.run(module, {}, made, numbers))
                outcome.append(_Run(spec, leaves, counter.get_total_flops(), sum(saved.values())))
        except Exception as error:  # whatever the user's module raises
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        shapes = [tuple(shape) for shape, _, _ in inputs]
        raise TraceError(
            f"{name} fails on example inputs of shapes {shapes}: {type(outcome[0]).__name__}: {outcome[0]}"
        ) from outcome[0]
    return outcome[0]


def _made_up(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.randn(shape, device=device)
        return real.to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


def _scaled(sizes: Sequence[Any], scale: int) -> list[int]:
    """Sizes when every symbol is `scale` times its example value."""
    return [_evaluate(size, scale) if isinstance(size, torch.SymInt) else int(size) for size in sizes]


def _evaluate(size: torch.SymInt, scale: int) -> int:
    values = size.node.shape_env.backed_var_to_val
    expression = size.node.expr
    return int(expression.xreplace({symbol: values[symbol] * scale for symbol in expression.free_symbols}))
