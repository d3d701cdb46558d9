"""Run `torch.export` on one mode of a model, whatever the types of its arguments and results.

The model's forward is replaced, while it is exported, by one that takes and returns flat tensors; the
trees around them are kept here. The export treats no batch size as special (not even one), so its guards
say exactly which batch sizes the graph is right for.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as shape_config
from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import transformer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fedmp.errors import TraceError
from fedmp.graph.batch import BATCH, in_batch
from fedmp.graph.chance import DecideCertainBranches
from fedmp.graph.leaf import LeafTracer
from fedmp.graph.portable import to_plain

__all__ = ["Exported", "FlatInputs", "export_mode", "flatten_inputs"]


@dataclass(frozen=True)
class FlatInputs:
    """A model's arguments, flattened.

    Attributes:
        tensors: the tensor arguments, in order.
        constants: the other ones by flattened position.
        spec: how (args, kwargs) flatten.
        batch_size: first dim of the first tensor.
    """

    tensors: tuple[torch.Tensor, ...]
    constants: Mapping[int, Any]
    spec: TreeSpec
    batch_size: int

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """(args, kwargs) with other tensors."""
        return _fill(self.spec, self.constants, tensors)


@dataclass(frozen=True)
class Exported:
    """One mode of a model as an exported program.

    Attributes:
        program: takes and returns flat tensors.
        out_spec, out_constants: how the result flattens, and its leaves that are not tensors.
        sizes: for each symbol of the program's shapes, the size it stands for in terms of the batch size.
        rules: conditions on the batch size under which the program is right.
    """

    program: torch.export.ExportedProgram
    out_spec: TreeSpec
    out_constants: Mapping[int, Any]
    sizes: Mapping[sympy.Symbol, sympy.Expr]
    rules: tuple[Any, ...]


def flatten_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FlatInputs:
    """Take the example inputs apart.

    Raises:
        TraceError: no tensor among them has a batch dim.
    """
    leaves, spec = tree_flatten(to_plain((args, dict(kwargs))))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    first = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    if first is None or first.shape[0] == 0:
        raise TraceError(
            f"tracing {type(model).__name__} needs at least one example tensor with a batch dim and one "
            f"sample, not {[tuple(tensor.shape) for tensor in tensors]}"
        )
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    return FlatInputs(tensors, constants, spec, int(first.shape[0]))


def export_mode(model: nn.Module, inputs: FlatInputs, leaves: Mapping[str, nn.Module]) -> Exported:
    """Export a model in the mode that it is in.

    Args:
        model: the model.
        inputs: example inputs.
        leaves: modules that are not traced into, by path.

    Raises:
        TraceError: the forward cannot be traced; the message names the module and the reason.
    """
    dynamic = _dynamic_tensors(inputs, multiples=True)
    exported = _export(model, inputs, leaves, dynamic)
    exact = _dynamic_tensors(inputs, multiples=False)
    if dynamic != exact and not _depends_on_batch_alone(exported, dynamic - exact):
        # a dim that happened to be a multiple of the batch size is something else
        exported = _export(model, inputs, leaves, exact)
    return exported


def _dynamic_tensors(inputs: FlatInputs, *, multiples: bool) -> set[int]:
    """Indices of the tensors whose first dim is the batch, or a multiple of it."""
    size = inputs.batch_size
    return {
        index
        for index, tensor in enumerate(inputs.tensors)
        if tensor.dim() > 0
        and (tensor.shape[0] == size or (multiples and 1 < size < tensor.shape[0] and tensor.shape[0] % size == 0))
    }


def _depends_on_batch_alone(exported: Exported, multiples: set[int]) -> bool:
    names = set(exported.program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in exported.program.graph.nodes if node.name in names]
    exact: set[Any] = set()
    for index, value in enumerate(values):
        if index not in multiples:
            exact.update(symbol for size in value.shape for symbol in _symbols(size))
    return all(_symbols(values[index].shape[0]) <= exact for index in multiples)


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _export(
    model: nn.Module, inputs: FlatInputs, leaves: Mapping[str, nn.Module], dynamic: set[int]
) -> Exported:
    executing: list[tuple[str, nn.Module]] = []
    errors: list[Exception] = []
    device = next((tensor.device for tensor in model.state_dict(keep_vars=True).values()), None)
    examples = tuple(_example(tensor, inputs.batch_size, device) for tensor in inputs.tensors)
    dims = tuple({0: torch.export.Dim.AUTO} if index in dynamic else None for index in range(len(examples)))
    # The first try also watches for code that treats a batch of one as special; not every operator can.
    for is_oblivious in (True, False):
        executing.clear()
        result = _FlatForward(model, inputs)
        opaque = LeafTracer(leaves)
        try:
            with (
                _watch_calls(model, executing),
                opaque.installed(),
                result.installed(),
                DecideCertainBranches(),
                _unvalidated_distributions(),
                _idle_conversions(model),
                _explicit_masks(),
                warnings.catch_warnings(),
                shape_config.patch(backed_size_oblivious=is_oblivious),
            ):
                # recurrent modules keep their weights in a list, too, which export restores
                warnings.filterwarnings("ignore", message="The tensor attributes")
                program = torch.export.export(
                    model, examples, dynamic_shapes={"tensors": dims}, strict=False
                )
        except TraceError:
            raise
        except Exception as error:  # torch.export raises its own, the model's, and its dependencies' errors
            errors.append(error)
            continue
        hint = 2 if inputs.batch_size == 1 else inputs.batch_size
        sizes, rules = _batch_rules(program, hint, is_oblivious)
        opaque.resolve(program)
        assert result.out_spec is not None
        return Exported(program, result.out_spec, result.out_constants, sizes, rules)
    raise TraceError(_explain(model, executing, errors[-1])) from errors[-1]


class _FlatForward:
    """A forward from flat tensors to flat tensors, which remembers the trees."""

    def __init__(self, model: nn.Module, inputs: FlatInputs) -> None:
        self._model = model
        self._inputs = inputs
        self._forward: Callable[..., Any] = model.forward
        self.out_spec: TreeSpec | None = None
        self.out_constants: dict[int, Any] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Use it in place of the model's own forward."""
        own = self._model.__dict__.get("forward")

        def forward(*tensors: Any) -> Any:
            return self(*tensors)

        self._model.forward = forward
        try:
            yield
        finally:
            del self._model.forward
            if own is not None:
                self._model.forward = own

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        args, kwargs = self._inputs.rebuild(tensors)
        leaves, self.out_spec = tree_flatten(to_plain(self._forward(*args, **kwargs)))
        moving = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        self.out_constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, moving)}
        return tuple(leaf for leaf in leaves if isinstance(leaf, moving))


def _fill(spec: TreeSpec, constants: Mapping[int, Any], tensors: Sequence[Any]) -> Any:
    rest = iter(tensors)
    return tree_unflatten(
        [constants[index] if index in constants else next(rest) for index in range(spec.num_leaves)], spec
    )


def _example(tensor: torch.Tensor, batch_size: int, device: torch.device | None) -> torch.Tensor:
    # fresh tensors: two inputs that are one object would be traced as one input
    shape = list(tensor.shape)
    if batch_size == 1 and tensor.dim() > 0 and shape[0] == 1:
        shape[0] = 2  # a size of one would be taken for a constant
    return torch.empty(shape, dtype=tensor.dtype, device=device or tensor.device)


def _batch_rules(
    program: torch.export.ExportedProgram, hint: int, is_oblivious: bool
) -> tuple[dict[sympy.Symbol, sympy.Expr], tuple[Any, ...]]:
    """What the symbols stand for, and the guards that the trace relied on, in terms of the batch size."""
    sizes: dict[sympy.Symbol, sympy.Expr] = {}
    environment = None
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
    if environment is None:
        return {}, ()
    for symbol, value in environment.backed_var_to_val.items():
        sizes[symbol] = BATCH * sympy.Rational(int(value), hint)
    rules: dict[Any, None] = {}
    for guard in environment.guards:
        expression = environment.replace(guard.expr)
        if _is_operators_own(guard) and not isinstance(expression, sympy.Eq):
            continue  # the operator itself handles a size of one
        if expression.free_symbols <= set(sizes):
            rule = in_batch(expression, sizes)
            if rule is not sympy.true and rule is not True:
                rules[rule] = None
    if not is_oblivious:
        rules[BATCH >= 2] = None
    return sizes, tuple(rules)


def _is_operators_own(guard: Any) -> bool:
    """Whether a guard comes from inside an operator rather than from Python code that branches on a size."""
    place = getattr(guard.sloc, "framework_loc", None)
    return "/torch/_" in getattr(place, "filename", str(place))


@contextlib.contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Checks of a distribution's parameters branch on tensor values."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _explicit_masks() -> Iterator[None]:
    """`nn.Transformer` looks into a mask's values to see whether it is causal, to choose a faster kernel."""
    before = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    transformer._detect_is_causal_mask = detect
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextlib.contextmanager
def _idle_conversions(model: nn.Module) -> Iterator[None]:
    """Let `module.to(dtype)` inside a forward pass when it changes nothing; torch refuses fake weights."""

    def guarded(module: nn.Module) -> Any:
        convert = type(module)._apply

        def apply(fn: Any, recurse: bool = True) -> nn.Module:
            tensors = [*module.parameters(recurse), *module.buffers(recurse)]
            if all(fn(tensor) is tensor for tensor in tensors):
                return module
            return convert(module, fn, recurse)

        return apply

    modules = list(model.modules())
    for module in modules:
        module.__dict__["_apply"] = guarded(module)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["_apply"]


@contextlib.contextmanager
def _watch_calls(model: nn.Module, executing: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the stack of modules whose forward is running, so that an error can be placed."""
    handles = []
    for name, module in model.named_modules():
        entry = (name, module)
        handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: executing.append(entry)))
        handles.append(module.register_forward_hook(lambda *_: executing.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain(model: nn.Module, executing: list[tuple[str, nn.Module]], error: Exception) -> str:
    name, module = executing[-1] if executing else ("", model)
    where = f"module {name!r} ({type(module).__name__})" if name else f"{type(model).__name__}.forward"
    line = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "/fedmp/graph/" not in frame.filename and frame.line:
            line = f", at `{frame.line}` ({frame.filename}:{frame.lineno})"
            break
    reason = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
    leaf = name or next((path for path, _ in model.named_children()), "")
    return (
        f"cannot trace {type(model).__name__}: {where}{line}: {reason.strip()[:300]}. A traced forward is a "
        f"fixed sequence of tensor operations: no branches on tensor values, no .item(), no NumPy. Ways out: "
        f"run that module as one opaque layer, trace(..., leaves=({leaf!r},)), which names any module by "
        f"pattern; or pass a chain of modules, fedmp.graph.Chain([first, second, ...]), where each is opaque"
    )
