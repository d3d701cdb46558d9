"""Sizes as expressions of one symbol: the batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

__all__ = ["BATCH", "in_batch", "size_at"]

BATCH = sympy.Symbol("batch", integer=True, positive=True)


def in_batch(expression: Any, sizes: Mapping[sympy.Symbol, sympy.Expr]) -> Any:
    """Write an expression of a trace's symbols as one of the batch size.

    Args:
        expression: of torch's shape symbols.
        sizes: what each symbol stands for; one that is missing is left alone.
    """
    return expression.xreplace(
        {symbol: sizes[symbol] for symbol in expression.free_symbols if symbol in sizes}
    )


def size_at(size: Any, batch_size: int) -> int:
    """The value of a size for a number of samples."""
    return size if isinstance(size, int) else int(size.xreplace({BATCH: sympy.Integer(batch_size)}))
