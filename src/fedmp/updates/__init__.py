"""Updates: what a device pushes for its stage, as differences to the round's global stage."""

from __future__ import annotations

from fedmp.updates.delta import apply_update, difference, trained_names

__all__ = ["apply_update", "difference", "trained_names"]
