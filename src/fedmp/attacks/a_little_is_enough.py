"""A little is enough (Baruch et al., 2019, A Little Is Enough: Circumventing Defenses For Distributed Learning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from fedmp.attacks.attack import Attack, Update, moments, within

__all__ = ["ALittleIsEnough"]


class ALittleIsEnough(Attack):
    """All attackers send the honest mean, moved by a few standard deviations in every element.

        u = mean - z * std,   over the honest updates, element by element

    Small enough to lie within the honest spread, always to the same side: it biases rules that trust what
    is in the middle. The paper's attackers estimate mean and deviation from their own updates; ours see the honest
    ones.

    Args:
        z: None for the paper's largest that makes a majority look farther out than the attackers,
            `Phi^-1((n - m - s) / (n - m))` with `s = floor(n / 2 + 1) - m`. It is 0 for few clients with few
            attackers, so the paper's experiments' 1.5 is the default.
    """

    z: float | None = Field(default=1.5, ge=0)

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """The same for every attacker."""
        seen = honest or own
        z = self._largest_z(len(own), len(honest)) if self.z is None else self.z
        forged: dict[str, torch.Tensor] = {}
        for name, tensor in own[0].items() if own else ():
            forged[name] = tensor
            if tensor.is_floating_point():
                mean, std = moments(seen, name)
                forged[name] = within(mean - z * std, tensor.dtype)
        return [forged] * len(own)

    def _largest_z(self, num_attackers: int, num_honest: int) -> float:
        supporters = (num_attackers + num_honest) // 2 + 1 - num_attackers
        share = (num_honest - supporters) / max(num_honest, 1)
        normal = torch.distributions.Normal(0.0, 1.0)
        return max(0.0, float(normal.icdf(torch.tensor(min(max(share, 0.5), 1 - 1e-6)))))
