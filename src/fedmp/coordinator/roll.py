"""The roll of a round: who trains, from which round's model, and who has handed in what.

Most clients train from the model of the open round. One that was late for an earlier round, and whose update
shall count all the same, goes on from that round's model: it is on the roll with that round. Part of the
board, whose lock guards it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fedmp.coordinator.members import Member

__all__ = ["Roll"]


class Roll:
    """Who trains and who has reported.

    Attributes:
        started: the round from whose model each client trains, by name.
        reported: generation of each update that is in, by client and rank.
        arrived: clients whose whole update is in, in the order in which they were complete.
    """

    def __init__(self) -> None:
        self.started: dict[str, int] = {}
        self.reported: dict[tuple[str, int], str] = {}
        self.arrived: list[str] = []
        self._round = 0
        self._at_a_time = 0
        self._spare: list[str] = []
        self._wanted: int | None = None

    def open(
        self,
        round: int,
        cohort: Sequence[str],
        reported: Mapping[tuple[str, int], str],
        *,
        late: Mapping[str, int],
        spare: Sequence[str],
        wanted: int | None,
    ) -> None:
        """A round begins.

        Args:
            round: its number.
            cohort: clients that begin with it.
            reported: updates that are in already, of clients that were not on the roll; of those who were complete
                before, in that order.
            late: clients that go on, by the round that they began with.
            spare: clients that begin one by one as others are done.
            wanted: whole clients that are enough; None for all.
        """
        self._wanted = wanted
        self._round = round
        known = {key: generation for key, generation in self.reported.items() if key[0] in late}
        self.started = {**late, **dict.fromkeys(cohort, round)}
        self.reported = {**known, **reported}
        self.arrived = []
        self._at_a_time = len(self.started)
        self._spare = list(spare)

    def close(self, counted: Collection[str], gone: Collection[str], oldest: int | None) -> dict[str, int]:
        """A round is over.

        Args:
            counted: clients whose updates it takes.
            gone: clients that gave up.
            oldest: round from which a client may have begun to stay on the roll; None keeps nobody.

        Returns:
            Those who stay, with the round that they began with.
        """
        self.started = {
            client: begun
            for client, begun in self.started.items()
            if oldest is not None and begun >= oldest and client not in counted and client not in gone
        }
        self.reported = {key: value for key, value in self.reported.items() if key[0] in self.started}
        self.arrived = [client for client in self.arrived if client in self.started]
        self._spare = []
        return dict(self.started)

    def note_arrivals(self, members: Iterable[Member], gone: Collection[str]) -> None:
        """Bring `arrived` up to date, and let spare clients begin in the place of those who are done."""
        every = list(members)
        while True:
            waiting = {member.client for member in self.missing(every)}
            self.arrived += [
                client
                for client in dict.fromkeys(client for client, _ in self.reported)
                if client in self.started and client not in waiting and client not in self.arrived
            ]
            done = {*self.arrived, *gone} & self.started.keys()
            room = self._at_a_time + len(done) - len(self.started)
            if room <= 0 or not self._spare or self.is_enough(gone):
                return  # who would begin now had better wait for the next model
            beginning, self._spare = self._spare[:room], self._spare[room:]
            self.started.update(dict.fromkeys(beginning, self._round))

    def finished(self, gone: Collection[str]) -> tuple[str, ...]:
        """Clients whose whole update is in, in the order in which they were complete."""
        return tuple(client for client in self.arrived if client not in gone)

    def is_enough(self, gone: Collection[str]) -> bool:
        """Whether as many have finished as are wanted."""
        return self._wanted is not None and len(self.finished(gone)) >= self._wanted

    def missing(self, members: Iterable[Member]) -> set[Member]:
        """Devices on the roll that have not reported."""
        return {
            member
            for member in members
            if member.client in self.started
            and member.stages
            and (member.client, member.rank) not in self.reported
        }
