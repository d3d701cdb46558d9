"""Arguments and results of any class as trees of tensors.

`torch.utils._pytree` looks into tuples, lists, dicts and the classes registered with it. What else holds
tensors (a dataclass, a key-value cache) is turned into an `_Object`, which flattens to the tensors in
its attributes and unflattens to an object of the original class. Nothing is registered for users' classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

__all__ = ["to_plain"]

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LITERALS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MAX_DEPTH = 12


def to_plain(tree: Any) -> Any:
    """Make every tensor in `tree` reachable for `tree_flatten`.

    Args:
        tree: arguments or a result of a model.

    Returns:
        The same tree with objects that hold tensors replaced; `tree_unflatten` with its spec gives
        objects of the original classes again.
    """
    return tree_map(lambda leaf: _plain_leaf(leaf, 0), tree)


@dataclass(frozen=True)
class _Fixed:
    """Attributes without tensors: copied into each new object; only plain values are compared."""

    values: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fixed) and self._comparable() == other._comparable()

    def __hash__(self) -> int:
        return hash(tuple(self.values))

    def _comparable(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if isinstance(value, _LITERALS)}


@dataclass(frozen=True)
class _Object:
    """An object taken apart."""

    type: type
    moving: dict[str, Any]
    fixed: _Fixed


def _plain_leaf(leaf: Any, depth: int) -> Any:
    if isinstance(leaf, (torch.Tensor, *_NUMBERS, *_LITERALS)) or depth > _MAX_DEPTH:
        return leaf
    if isinstance(leaf, Mapping) and hasattr(leaf, "keys"):  # a dict subclass that pytree does not know
        attributes = {"data": dict(leaf)} if _is_user_dict(leaf) else None
    else:
        attributes = _attributes(leaf)
    if attributes is None:
        return leaf
    moving: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for name, value in attributes.items():
        plain = tree_map(lambda inner: _plain_leaf(inner, depth + 1), value)
        is_moving = any(isinstance(inner, (torch.Tensor, *_NUMBERS)) for inner in tree_leaves(plain))
        if is_moving:
            moving[name] = plain
        else:
            fixed[name] = value
    return _Object(type(leaf), moving, _Fixed(fixed)) if moving else leaf


def _is_user_dict(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "data", None), dict)


def _attributes(leaf: Any) -> dict[str, Any] | None:
    if isinstance(leaf, type | torch.nn.Module) or callable(leaf):
        return None
    if hasattr(leaf, "__dict__"):
        return dict(vars(leaf))
    slots = getattr(type(leaf), "__slots__", ())
    return {name: getattr(leaf, name) for name in slots if hasattr(leaf, name)} or None


def _flatten(value: _Object) -> tuple[list[Any], Any]:
    return list(value.moving.values()), (value.type, tuple(value.moving), value.fixed)


def _unflatten(children: Any, context: Any) -> Any:
    """An object of the original class, made without its constructor."""
    cls, names, fixed = context
    made = cls.__new__(cls)
    attributes = {**copy.deepcopy(dict(fixed.values)), **dict(zip(names, children, strict=True))}
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


register_pytree_node(_Object, _flatten, _unflatten, serialized_type_name="fedmp.graph.portable.Object")
