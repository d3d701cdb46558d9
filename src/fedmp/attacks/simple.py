"""Attacks that need to see nothing: of the attacker's own update, or out of thin air."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pydantic import Field

from fedmp.attacks.attack import Attack, Update, within
from fedmp.data import Dataset
from fedmp.errors import ConfigError
from fedmp.seeds import derive_seed

__all__ = ["Gaussian", "LabelFlip", "Scaling", "SignFlip"]


class SignFlip(Attack):
    """The own update, the other way: `-scale * u` (Li et al., 2019, RSA, section 5).

    With a share p of attackers the mean becomes `(1 - p - p * scale) u`: at 20 % a scale of 4 stops it, and
    more leads it uphill.

    Args:
        scale: above 0.
    """

    scale: float = Field(default=5.0, gt=0)

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """The own updates, turned round."""
        return [_mapped(update, lambda tensor: -self.scale * tensor) for update in own]


class Scaling(Attack):
    """The own update, magnified: `scale * u`, as in model replacement (Bagdasaryan et al., 2020, equation 3).

    The paper scales what was trained on a backdoor; we scale the plain update, which overshoots.

    Args:
        scale: above 0.
    """

    scale: float = Field(default=50.0, gt=0)

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """The own updates, magnified."""
        return [_mapped(update, lambda tensor: self.scale * tensor) for update in own]


class Gaussian(Attack):
    """Noise instead of an update (Blanchard et al., 2017, section 5).

    The paper's noise has a standard deviation of 200; ours is measured by each tensor of the own update. Noise has
    no direction, so an average over many weights stands a good deal of it: with 20 % of attackers and a scale of 30
    it still learns.

    Args:
        scale: standard deviation, in units of the root mean square of the own update's tensor.
    """

    scale: float = Field(default=200.0, gt=0)

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """Noise of its own from each attacker."""
        forged: list[Update] = []
        for index, update in enumerate(own):
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise", index))

            def noise(tensor: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
                size = self.scale * tensor.square().mean().sqrt()
                return size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

            forged.append(_mapped(update, noise))
        return forged


class LabelFlip(Attack):
    """Honest training on wrong labels: class c becomes `C - 1 - c` (Fang et al., 2020, section 6.1)."""

    def poison(self, dataset: Dataset) -> Dataset:
        """The samples, each with the opposite class.

        Raises:
            ConfigError: targets are not classes.
        """
        targets = dataset.targets
        if targets is None or targets.is_floating_point():
            raise ConfigError(
                "LabelFlip needs classes as targets, which this data set has not; use another attack"
            )
        return replace(dataset, targets=dataset.num_classes - 1 - targets)


def _mapped(update: Update, change: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    """The update with its floating tensors changed, in float64; counters and flags stay honest."""
    return {
        name: within(change(tensor.double()), tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in update.items()
    }
