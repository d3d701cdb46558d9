"""Sizes and rules as expressions of one symbol: the batch size.

Sympy, which writes them, is imported when the first model is traced: it takes as long as half of torch, and what
never traces a model does without.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sympy

__all__ = ["batch_symbol", "depends_on_batch", "in_batch", "rules_out", "size_at"]


@functools.cache
def batch_symbol() -> sympy.Symbol:
    """The symbol: a positive integer."""
    import sympy

    return sympy.Symbol("batch", integer=True, positive=True)


def in_batch(expression: Any, sizes: Mapping[sympy.Symbol, sympy.Expr]) -> Any:
    """Write an expression of a trace's symbols as one of the batch size.

    Args:
        expression: of torch's shape symbols.
        sizes: what each symbol stands for; one that is missing is left alone.
    """
    return expression.xreplace(
        {symbol: sizes[symbol] for symbol in expression.free_symbols if symbol in sizes}
    )


def depends_on_batch(size: Any) -> bool:
    """Whether a size is another one for another number of samples."""
    return not isinstance(size, int) and batch_symbol() in size.free_symbols


def size_at(size: Any, batch_size: int) -> int:
    """The value of a size for a number of samples."""
    return size if isinstance(size, int) else int(_at(size, batch_size))


def rules_out(rule: Any, batch_size: int) -> bool:
    """Whether a condition does not hold for a number of samples."""
    return bool(_at(rule, batch_size) == False)  # noqa: E712  # sympy's own false equals Python's, but is not it


def _at(expression: Any, batch_size: int) -> Any:
    import sympy

    return expression.xreplace({batch_symbol(): sympy.Integer(batch_size)})
