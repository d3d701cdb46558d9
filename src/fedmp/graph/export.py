"""Run `torch.export` on one mode of a model, whatever the types of its arguments and results.

The model's forward is replaced, while it is exported, by one that takes and returns flat tensors; the
trees around them are kept here. The export treats no batch size as special (not even one), so its guards
say exactly which batch sizes the graph is right for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as shape_config
from torch import nn
from torch.utils._pytree import TreeSpec

from fedmp.errors import TraceError
from fedmp.graph.batch import batch_symbol, in_batch
from fedmp.graph.calls import Running, watch_calls, where_it_failed
from fedmp.graph.chance import DecideCertainBranches
from fedmp.graph.flat import FlatForward, FlatInputs
from fedmp.graph.leaf import LeafTracer
from fedmp.graph.traceable import traceable

if TYPE_CHECKING:
    import sympy

__all__ = ["Exported", "export_mode"]


@dataclass(frozen=True)
class Exported:
    """One mode of a model as an exported program.

    Attributes:
        program: takes and returns flat tensors.
        out_spec, out_constants: how the result flattens, and its leaves that are not tensors.
        sizes: for each symbol of the program's shapes, the size it stands for in terms of the batch size.
        rules: conditions on the batch size under which the program is right.
        has_leaves: whether parts of it were not traced into.
    """

    program: torch.export.ExportedProgram
    out_spec: TreeSpec
    out_constants: Mapping[int, Any]
    sizes: Mapping[sympy.Symbol, sympy.Expr]
    rules: tuple[Any, ...]
    has_leaves: bool


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
        and (
            tensor.shape[0] == size
            or (multiples and 1 < size < tensor.shape[0] and tensor.shape[0] % size == 0)
        )
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
    executing: Running = []
    errors: list[Exception] = []
    device = next((tensor.device for tensor in model.state_dict(keep_vars=True).values()), None)
    examples = tuple(_example(tensor, inputs.batch_size, device) for tensor in inputs.tensors)
    dims = tuple({0: torch.export.Dim.AUTO} if index in dynamic else None for index in range(len(examples)))
    # The first try also watches for code that treats a batch of one as special; not every operator can.
    for is_oblivious in (True, False):
        executing.clear()
        result = FlatForward(model, inputs)
        opaque = LeafTracer(leaves)
        try:
            with (
                opaque.installed(),  # first: it copies the leaves, which must not carry the hooks below
                watch_calls(model, executing),
                result.installed(),
                DecideCertainBranches(),
                traceable(model),
                warnings.catch_warnings(),
                shape_config.patch(backed_size_oblivious=is_oblivious),  # type: ignore[attr-defined]
            ):
                # recurrent modules keep their weights in a list, too, which export restores
                warnings.filterwarnings("ignore", message="The tensor attributes")
                program = torch.export.export(model, examples, dynamic_shapes={"tensors": dims}, strict=False)
        except TraceError:
            raise
        except Exception as error:  # torch.export raises its own, the model's, and its dependencies' errors
            errors.append(error)
            continue
        hint = 2 if inputs.batch_size == 1 else inputs.batch_size
        sizes, rules = _batch_rules(program, hint, is_oblivious)
        opaque.resolve(program)
        assert result.out_spec is not None
        return Exported(program, result.out_spec, result.out_constants, sizes, rules, bool(opaque.calls))
    raise TraceError(_explain(model, executing, errors[-1])) from errors[-1]


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
    import sympy  # torch has imported it by now, to trace the model

    batch = batch_symbol()
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
        sizes[symbol] = batch * sympy.Rational(int(value), hint)
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
        rules[batch >= 2] = None
    return sizes, tuple(rules)


def _is_operators_own(guard: Any) -> bool:
    """Whether a guard comes from inside an operator rather than from Python code that branches on a size."""
    place = getattr(guard.sloc, "framework_loc", None)
    return "/torch/_" in getattr(place, "filename", str(place))


def _explain(model: nn.Module, executing: Running, error: Exception) -> str:
    name = executing[-1][0] if executing else ""
    leaf = name or next((path for path, _ in model.named_children()), "")
    return (
        f"cannot trace {type(model).__name__}: {where_it_failed(model, executing, error)}. A traced forward is a "
        f"fixed sequence of tensor operations: no branches on tensor values, no .item(), no NumPy. Ways out: "
        f"run that module as one opaque layer, leaves=({leaf!r},) of fedmp.partition and fedmp.Job, leaves=[{leaf}] "
        f"on the command line; or pass a chain of modules, fedmp.Chain(first, second, ...), where each is opaque"
    )
