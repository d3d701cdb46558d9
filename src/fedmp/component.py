"""The base of everything that a config can choose: a frozen value that checks its own fields.

A hyper-parameter is declared once, with its default and its range, in the component that uses it. A
config file names the component by its dotted path (`_target_`); Python code just calls the class.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Component"]


class Component(BaseModel):
    """A frozen, validated value. Unknown fields are errors.

    Example:
        >>> class Scale(Component):
        ...     factor: float = 1.0
        >>> Scale(factor=2.0).factor
        2.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
