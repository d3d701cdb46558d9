"""Streaming DiLoCo (Douillard et al., 2025, Streaming DiLoCo with overlapping communication, algorithm 2).

DiLoCo that synchronises a fragment of the model at a time, in turn: with P fragments each round moves one P-th of the
bytes, and every fragment is synchronised once in P rounds, after P rounds of local steps. Between, a client goes on
from its own weights. When a fragment's new global values x_p come in, the client sets

    y_p = alpha y_p + (1 - alpha) x_p.

*Overlap.* With `delay_steps`, the paper's tau (section 2.3), a client sends a fragment at the end of round t and goes
on at once: it makes the first tau steps of round t+1 from its own weights, and only then sets y_p as above, with y_p
what these steps have made of it. In the meantime the fragment travels, is aggregated and comes back: devices hand in,
wait and pull on another thread (fedmp/client/exchange.py), from the state that they have saved, so that nothing is
lost if the round is closed otherwise.

With `overlap`, a round's update is the fragment as it was when the round began,

    update_p(t) = y_p(start of round t) - x_p,

so nothing of it depends on the round's steps, and the result is mixed in when the next round begins: tau is all the
steps of a round then. fedmp does this arithmetic, which decides what is learnt; it sends that update after the
round's steps.

A fragment is a share of the trained parameters, module by module: in contiguous pieces, as stages are, or strided,
which the paper found to be slightly better. It is a matter of names, so clients with different plans have the same.

Where we differ: quantisation of updates is the job's `transforms`. A client that missed a round begins anew from the
global model, since it lacks what was synchronised without it. All clients take part in all rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator

from fedmp.errors import ConfigError
from fedmp.graph import StateSpec
from fedmp.strategy.diloco import DiLoCo
from fedmp.strategy.scope import Scope, cut_fragments

__all__ = ["StreamingDiLoCo"]


class StreamingDiLoCo(DiLoCo):
    """DiLoCo by fragments.

    Args:
        local_steps: of a round, in which one fragment is synchronised.
        fragments: into how many the model is cut.
        strided: fragments of every so-manieth module instead of contiguous ones.
        overlap: synchronise what a fragment was when the round began.
        delay_steps: synchronise what a fragment was when the round ended, and mix the result in after so many steps of
            the next round; the paper uses 1 to 5. Below `local_steps`, and with overlap=false.
        mixing: alpha, the share of a client's own values when a fragment comes in; the paper uses 0.5 with overlap.
    """

    needs_present_model: ClassVar[str] = "an earlier round's update is of another fragment"

    local_steps: int | None = Field(default=50, ge=1)
    fragments: int = Field(default=3, ge=1)
    strided: bool = True
    overlap: bool = True
    delay_steps: int = Field(default=0, ge=0)
    mixing: float = Field(default=0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _is_late_in_one_way(self) -> StreamingDiLoCo:
        if self.delay_steps and self.overlap:
            raise ValueError(
                f"overlap=true is a delay of all {self.local_steps} steps of a round; say overlap=false with "
                f"delay_steps={self.delay_steps}"
            )
        if self.delay_steps and self.delay_steps >= (self.local_steps or 0):
            raise ValueError(
                f"delay_steps={self.delay_steps} must be below local_steps={self.local_steps}: a fragment comes in "
                f"before the next one is sent"
            )
        return self

    def scope(self, specs: Mapping[str, StateSpec]) -> Scope:
        """One fragment a round.

        Raises:
            ConfigError: the model has fewer modules than there are fragments, or tensors are to be kept local.
        """
        if self.keep_local or self.keep_statistics_local or self.fraction < 1:
            raise ConfigError(
                "streaming DiLoCo synchronises all tensors of all clients in turn; leave out strategy.keep_local, "
                "keep_statistics_local and fraction"
            )
        try:
            fragments = cut_fragments(specs, self.fragments, strided=self.strided)
        except ValueError as error:
            raise ConfigError(f"strategy.fragments: {error}") from error
        return Scope(
            fragments=fragments, mixing=self.mixing, is_overlapped=self.overlap, delay_steps=self.delay_steps
        )
