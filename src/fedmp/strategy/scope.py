"""What of a model travels: which tensors are the client's own, and which of the others go in which round."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmp.graph import StateSpec

__all__ = ["Scope", "batch_norm_names", "cut_fragments", "names_like"]

_STATISTICS = ".running_mean"


@dataclass(frozen=True)
class Scope:
    """The federation's part of a model's tensors.

    Attributes:
        own: names that stay at the client: it takes them over once, and goes on with its own.
        fragments: if given, all other names dealt out over so many fragments; in each round one of them is
            pushed, in turn, and pulled by the next one. A client goes on with its own values of the others.
        mixing: share of the client's own values when a fragment comes in; 0 takes the global ones.
        is_overlapped: push a fragment as it is when the round begins, so that it can travel while the round's
            steps are made.
        delay_steps: steps that a client makes in a round before it takes in what comes in for it, so that this can
            travel meanwhile.
    """

    own: frozenset[str] = frozenset()
    fragments: tuple[frozenset[str], ...] = ()
    mixing: float = 0.0
    is_overlapped: bool = False
    delay_steps: int = 0

    @property
    def keeps_values(self) -> bool:
        """Whether clients go on with values of their own at all."""
        return bool(self.own or self.fragments)

    def kept(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of a stage's tensors whose values a client keeps."""
        return tuple(name for name in names if self.fragments or name in self.own)

    def pushed(self, names: Iterable[str], round: int) -> tuple[str, ...]:
        """Those of the trained tensors that an update of this round holds."""
        return tuple(name for name in names if self._travels(name, round))

    def pulled(self, names: Iterable[str], round: int, *, whole: bool) -> tuple[str, ...]:
        """Those of a stage's tensors that a client pulls for a round.

        Args:
            names: of the stage.
            round: about to begin; what the one before has pushed is new.
            whole: the client has no values of its own, or old ones.
        """
        if whole or not self.keeps_values:
            return tuple(names)
        return tuple(name for name in names if self._travels(name, round - 1))

    def _travels(self, name: str, round: int) -> bool:
        if name in self.own:
            return False
        if name.startswith("@"):  # a slot of the server's
            return True
        return not self.fragments or name in self.fragments[(round - 1) % len(self.fragments)]


def batch_norm_names(specs: Mapping[str, StateSpec]) -> frozenset[str]:
    """The parameters and statistics of every normalisation that keeps statistics, told by their names."""
    layers = {name.removesuffix(_STATISTICS) for name in specs if name.endswith(_STATISTICS)}
    return frozenset(name for name in specs if name.rpartition(".")[0] in layers)


def names_like(specs: Collection[str], patterns: Sequence[str]) -> frozenset[str]:
    """The names that fit a pattern such as `head.*`.

    Raises:
        ValueError: nothing fits one of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(specs, pattern)
        if not fitting:
            raise ValueError(
                f"no tensor of the model is called {pattern!r}; there are {', '.join(list(specs)[:8])}, ..."
            )
        found.update(fitting)
    return frozenset(found)


def cut_fragments(
    specs: Mapping[str, StateSpec], num_fragments: int, *, strided: bool
) -> tuple[frozenset[str], ...]:
    """Deal a model's trained tensors out over fragments of about equal size, module by module.

    Args:
        specs: of the model's tensors, in the model's order.
        num_fragments: at most the number of modules that hold trained tensors.
        strided: fragment i gets every num_fragments-th module, instead of a contiguous run.

    Raises:
        ValueError: there are fewer modules than fragments.
    """
    modules: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if spec.requires_grad or spec.kind == "buffer":
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    if len(modules) < num_fragments:
        raise ValueError(
            f"{len(modules)} modules hold trained tensors; {num_fragments} fragments are too many"
        )
    groups: list[list[str]] = [[] for _ in range(num_fragments)]
    sizes = {m: sum(torch.Size(specs[n].shape).numel() for n in names) for m, names in modules.items()}
    total, before = max(sum(sizes.values()), 1), 0
    for index, (module, names) in enumerate(modules.items()):
        left = len(modules) - index
        first_empty = next((i for i, group in enumerate(groups) if not group), num_fragments)
        wanted = (before + sizes[module] / 2) * num_fragments // total
        if left <= num_fragments - first_empty:  # every fragment gets one
            wanted = first_empty
        groups[index % num_fragments if strided else int(min(wanted, first_empty))].extend(names)
        before += sizes[module]
    return tuple(frozenset(group) for group in groups)
