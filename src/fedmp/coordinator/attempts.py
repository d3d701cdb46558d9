"""The clients' attempts at the open round, each in a generation of their pipelines of its own.

Part of the board, whose lock guards it.
"""

from __future__ import annotations

from collections.abc import Collection

from fedmp.coordinator.members import Member

__all__ = ["Attempts"]


class Attempts:
    """Who is in which generation and attempt, and who has none left.

    Args:
        most: attempts of a client at one round.

    Attributes:
        given_up: clients that will not finish the open round, and why.
        incidents: what happened, for people, since it was last told.
        recoveries: attempts after the first, of all rounds.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.given_up: dict[str, str] = {}
        self.incidents: list[str] = []
        self.recoveries = 0
        self._generations: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._begun: set[str] = set()
        self._coming_up: set[str] = set()
        self._told: dict[Member, int] = {}
        self._processes: dict[Member, str] = {}

    def open_round(self, late: Collection[str]) -> None:
        """Everybody has all attempts again, but for those who go on with an earlier round."""
        self.given_up = {}
        self._attempts = {client: number for client, number in self._attempts.items() if client in late}
        self._begun &= set(late)

    def generation(self, client: str) -> int:
        """The newest generation of a client's pipeline."""
        return self._generations.get(client, 0)

    def tell(self, member: Member) -> tuple[int, int]:
        """A device is told to train: in this generation, at this attempt."""
        client = member.client
        self._begun.add(client)
        generation = self._told[member] = self.generation(client)
        return generation, self._attempts.get(client, 1)

    def has_forgotten(self, member: Member, process: str) -> bool:
        """Whether a device that asks was started anew since it was told of the present generation."""
        known = self._processes.get(member)
        if not process or process == known:
            return False
        self._processes[member] = process
        return known is not None and self.forget(member)

    def forget(self, member: Member) -> bool:
        """A device is gone; returns whether it was told of the present generation, which is over then."""
        return self._told.pop(member, None) == self.generation(member.client)

    def came_up(self, client: str, generation: int) -> bool:
        """A client's first device says where a generation meets; returns whether it is not over already."""
        if generation < self.generation(client):
            return False
        self._generations[client] = generation
        self._coming_up.discard(client)
        return True

    def is_coming_up(self, client: str) -> bool:
        """Whether a client's pipeline is over, and the next one has not been heard of."""
        return client in self._coming_up

    def begin_generation(self, client: str, after: int) -> None:
        """A client's pipeline is over."""
        self._generations[client] = max(after, self.generation(client)) + 1
        self._coming_up.add(client)

    def begin_attempt(self, client: str, round: int, incident: str) -> None:
        """A client begins a round anew, if it has begun it at all and has an attempt left."""
        if client not in self._begun:
            return
        attempt = self._attempts[client] = self._attempts.get(client, 1) + 1
        self.recoveries += 1
        self.incidents.append(f"{client} begins round {round} anew: {incident}")
        if attempt > self.most:
            self.given_up[client] = f"{self.most} attempts failed, the last one: {incident}"
