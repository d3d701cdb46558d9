"""A job under attack: the attackers' samples are poisoned before the first round, their updates forged in each.

What an engine's clients hand in passes through `AttackedClients` on its way to the round loop, so every engine
that runs all clients on this machine can be attacked, and an aggregator cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmp.attacks import Attack
from fedmp.coordinator import Clients, Opening, Trained
from fedmp.data import Dataset
from fedmp.errors import ConfigError
from fedmp.seeds import derive_seed

__all__ = ["AttackedClients", "poisoned"]


class AttackedClients:
    """Clients of which some send what an attack makes of their updates.

    Args:
        clients: as they are.
        attack: whose attackers turn.
        names: of all clients, in client order.
        seed: the job's.
    """

    def __init__(self, clients: Clients, attack: Attack, names: Sequence[str], seed: int) -> None:
        self._clients = clients
        self._attack = attack
        self._attackers = frozenset(attack.attackers(names, seed=seed))
        self._seed = seed

    def train(self, opening: Opening) -> Trained:
        """Train the cohort, then replace the attackers' updates.

        Raises:
            FedmpError: as the clients themselves do.
        """
        trained = self._clients.train(opening)
        own = [update for update in trained.updates if update.client in self._attackers]
        honest = [update for update in trained.updates if update.client not in self._attackers]
        seed = derive_seed(self._seed, "attack", opening.round)
        forged = dict(zip([u.client for u in own], self._attack.forge(own, honest, seed=seed), strict=True))
        updates = [
            replace(update, tensors=forged[update.client]) if update.client in forged else update
            for update in trained.updates
        ]
        return replace(trained, updates=updates)

    def unreachable(self) -> frozenset[str]:
        """As the clients themselves say."""
        return self._clients.unreachable()

    def committed(self, round: int) -> None:
        """Passed on."""
        self._clients.committed(round)


def poisoned(
    attack: Attack | None, train: Dataset, rows: Sequence[torch.Tensor], names: Sequence[str], *, seed: int
) -> Dataset:
    """The training set with the attackers' samples as the attack has them.

    Args:
        attack: None leaves all as it is.
        train: of all clients.
        rows: each client's.
        names: of all clients, in the same order.
        seed: the job's.

    Raises:
        ConfigError: clients share samples, so that some cannot be poisoned alone.
    """
    if attack is None:
        return train
    inputs, targets = train.inputs, train.targets
    attackers = set(attack.attackers(names, seed=seed))
    for name, indices in zip(names, rows, strict=True):
        own = train.select(indices)
        changed = attack.poison(own) if name in attackers else own
        if changed is own:
            continue
        if sum(map(len, rows)) > len(train):
            raise ConfigError(
                "clients share samples, so an attack on the data reaches all; use another split"
            )
        inputs, targets = _with(inputs, indices, changed.inputs), _with(targets, indices, changed.targets)
    return replace(train, inputs=inputs, targets=targets)


def _with(
    values: torch.Tensor | None, indices: torch.Tensor, changed: torch.Tensor | None
) -> torch.Tensor | None:
    if values is None or changed is None:
        return values
    return values.index_copy(0, indices, changed.to(values.dtype))
