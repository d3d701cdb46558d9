"""The seam of all attacks: who attacks, what becomes of their data, and what they send instead of their updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from fedmp.component import Component
from fedmp.data import Dataset
from fedmp.errors import ConfigError
from fedmp.seeds import derive_seed

__all__ = ["Attack", "Update", "moments", "within"]

Update = Mapping[str, torch.Tensor]


class Attack(Component):
    """Some clients are Byzantine, to see what an aggregator makes of it. Attacks are for simulations only.

    An attack overrides `poison`, `forge`, or both; as they are here, attackers behave.

    Args:
        share: of all clients that attack, rounded to whole clients, drawn by the job's seed.
        clients: names of those that attack, instead of a share.
    """

    share: float = Field(default=0.2, ge=0, lt=1)
    clients: tuple[str, ...] = ()

    def attackers(self, clients: Sequence[str], *, seed: int) -> tuple[str, ...]:
        """Who attacks, in client order; the same in all rounds.

        Raises:
            ConfigError: a client that shall attack does not exist.
        """
        unknown = sorted(set(self.clients) - set(clients))
        if unknown:
            raise ConfigError(f"attack.clients: there are no clients called {', '.join(unknown)}")
        if self.clients:
            return tuple(name for name in clients if name in self.clients)
        generator = torch.Generator().manual_seed(derive_seed(seed, "attackers"))
        chosen = torch.randperm(len(clients), generator=generator)[
            : round(self.share * len(clients))
        ].tolist()
        return tuple(name for index, name in enumerate(clients) if index in set(chosen))

    def poison(self, dataset: Dataset) -> Dataset:
        """An attacker's training samples as it uses them.

        Args:
            dataset: its samples.
        """
        return dataset

    def forge(self, own: Sequence[Update], honest: Sequence[Update], *, seed: int) -> list[Update]:
        """What attackers send.

        Args:
            own: what each would send if it behaved.
            honest: what the others send, which an omniscient attacker sees.
            seed: of this round.

        Returns:
            One update for each of `own`, with its names, shapes and dtypes.
        """
        return list(own)


def moments(updates: Sequence[Update], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (of the sample, 0 for a single one) of one tensor, in float64."""
    values = torch.stack([update[name].double() for update in updates])
    mean = values.mean(dim=0)
    # torch's std over the first dimension takes ten times as long
    variance = (values - mean).square_().sum(dim=0) / max(len(updates) - 1, 1)
    return mean, variance.sqrt_()


def within(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in a dtype, the largest that it has where they are too large: the border takes only finite ones."""
    limit = torch.finfo(dtype).max
    return values.nan_to_num(nan=0.0).clamp(-limit, limit).to(dtype)
