"""What a view of a run knows so far: events come in, in any order and more than once; a renderer reads it.

The board is not thread-safe and does not read the clock: its view holds a lock and passes the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fedmp.records import (
    Event,
    Note,
    Progress,
    RoundFinished,
    RoundRecord,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from fedmp.report.units import printable

__all__ = ["Board", "ClientProgress"]


@dataclass(frozen=True)
class ClientProgress:
    """How far a client is in the current round.

    Attributes:
        samples_done, samples_total: of its round; the total is 0 until the client first reports.
        loss: mean so far; NaN until it first reports.
    """

    samples_done: int = 0
    samples_total: int = 0
    loss: float = float("nan")


@dataclass
class Board:
    """The state of a run as its events tell it.

    Attributes:
        title, engine: of the run; empty until it started.
        first_round, num_rounds: counted from 1; `num_rounds` is 0 until it is known.
        round: the round in progress, or the last one.
        cohort: how far each client of that round is, by name.
        cohort_samples: what the cohort will process in all.
        records: committed rounds by number.
        notes: the latest notes, oldest first; those of getting ready go when the run starts.
        is_finished: whether the run is over.
        began_s: when the first round began, None before.
    """

    title: str = ""
    engine: str = ""
    first_round: int = 1
    num_rounds: int = 0
    round: int = 0
    cohort: dict[str, ClientProgress] = field(default_factory=dict)
    cohort_samples: int = 0
    records: dict[int, RoundRecord] = field(default_factory=dict)
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    is_finished: bool = False
    began_s: float | None = None

    def take(self, event: Event, now_s: float) -> None:
        """Take one event in; what is stale or known already changes nothing.

        Args:
            event: any event of the run.
            now_s: the present on any steady clock.
        """
        if isinstance(event, RunStarted):
            self.title, self.engine = event.title, event.engine
            self.first_round, self.num_rounds = event.first_round, event.num_rounds
            self.notes.clear()  # the phases of getting ready are over
        elif isinstance(event, Note):
            self.notes.append(printable(event.message))
        elif isinstance(event, RoundStarted):
            self._start_round(event, now_s)
        elif isinstance(event, Progress):
            self._advance(event, now_s)
        elif isinstance(event, RoundFinished):
            self.records[event.record.round] = event.record
        elif isinstance(event, RunFinished):
            self.is_finished = True
            self.records.update({record.round: record for record in event.records})

    @property
    def is_round_open(self) -> bool:
        """Whether the current round began and is not committed yet."""
        return self.round > 0 and self.round not in self.records and not self.is_finished

    @property
    def samples_done(self) -> int:
        """Samples of the current round that its cohort has processed so far."""
        return sum(client.samples_done for client in self.cohort.values())

    @property
    def round_share(self) -> float:
        """Done part of the current round, from 0 to 1; 0 between rounds."""
        if not self.is_round_open or self.cohort_samples <= 0:
            return 0.0
        return min(self.samples_done / self.cohort_samples, 1.0)

    @property
    def rounds_done(self) -> int:
        """Committed rounds, those of an earlier run that this one resumes included."""
        return max(self.first_round - 1, max(self.records, default=0))

    @property
    def run_share(self) -> float:
        """Done part of all rounds, from 0 to 1; 0 while their number is not known."""
        if self.num_rounds <= 0:
            return 0.0
        return min((self.rounds_done + self.round_share) / self.num_rounds, 1.0)

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the current round over the samples processed so far, or of the last round."""
        weighted = [(c.samples_done, c.loss) for c in self.cohort.values() if c.samples_done > 0]
        if self.is_round_open and weighted:
            return sum(count * loss for count, loss in weighted) / sum(count for count, _ in weighted)
        last = self.latest_records(1)
        return last[0].train_loss if last else None

    def latest_records(self, count: int) -> list[RoundRecord]:
        """The last committed rounds.

        Args:
            count: how many at most.

        Returns:
            The records, oldest first.
        """
        return [self.records[number] for number in sorted(self.records)[-count:]]

    def time_left_s(self, now_s: float) -> float | None:
        """Estimate the seconds until the last round ends, at the pace of this run so far.

        Args:
            now_s: the present, on the clock of `take`.

        Returns:
            The estimate; None while there is nothing to base it on.
        """
        done = self.rounds_done + self.round_share - (self.first_round - 1)
        left = self.num_rounds - self.rounds_done - self.round_share
        if self.began_s is None or self.num_rounds <= 0 or done < 0.05:
            return None
        return max(left, 0.0) * (now_s - self.began_s) / done

    def _start_round(self, event: RoundStarted, now_s: float) -> None:
        self.began_s = now_s if self.began_s is None else self.began_s
        if event.round < self.round or event.round in self.records:
            return
        known = self.cohort if event.round == self.round else {}
        self.round = event.round
        self.cohort = {name: known.get(name, ClientProgress()) for name in event.clients}
        self.cohort_samples = event.num_samples

    def _advance(self, event: Progress, now_s: float) -> None:
        if event.round < self.round or event.round in self.records:
            return
        if event.round > self.round:
            # Its RoundStarted is late or lost; that event will fill in the whole cohort.
            self._start_round(RoundStarted(event.round, (event.client,), event.samples_total), now_s)
        known = self.cohort.get(event.client, ClientProgress())
        if event.samples_done >= known.samples_done:
            self.cohort[event.client] = ClientProgress(event.samples_done, event.samples_total, event.loss)
