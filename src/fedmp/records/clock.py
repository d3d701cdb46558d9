"""What happened when in simulated time: one line of `events.jsonl` each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["ClockEvent", "RoundTimed", "rounds_of"]


class ClockEvent(NamedTuple):
    """Something that a client or one of its devices did.

    Attributes:
        time_s: seconds since its round began.
        client: its name; empty for the coordinator.
        device: its name; empty where all of the client's devices are meant.
        what: "begins" (to pull), "pulled", "trained", "pushed", "lost" (dropped out), "left" (is not available any
            more), "away" (never comes), "arrived" (the client's update is complete), "late" (it arrived after the
            round had closed), "closed" (the round).
    """

    time_s: float
    client: str
    device: str
    what: str


@dataclass(frozen=True)
class RoundTimed:
    """What happened in a simulated round.

    Attributes:
        round: which.
        start_s: simulated seconds of the run before it.
        events: in the order of time.
    """

    round: int
    start_s: float
    events: tuple[ClockEvent, ...]

    def lines(self) -> str:
        """As lines of JSON, with the seconds since the run began."""
        head, start_s = f'{{"round": {self.round}, "time_s": ', self.start_s
        return "".join(
            [
                f"{head}{start_s + time_s:.9g}{_rest_of_line(client, device, what)}"
                for time_s, client, device, what in self.events
            ]
        )


@lru_cache(maxsize=4096)  # the same events come round after round
def _rest_of_line(client: str, device: str, what: str) -> str:
    names = (json.dumps(name, ensure_ascii=False) for name in (client, device))
    return ', "client": {}, "device": {}, "what": "{}"}}\n'.format(*names, what)


def rounds_of(lines: Iterable[str]) -> tuple[RoundTimed, ...]:
    """Read lines of JSON back, as rounds; a round began when the one before it closed.

    Args:
        lines: as `RoundTimed.lines` wrote them; what is torn or no event is left out.
    """
    rounds: dict[int, list[ClockEvent]] = {}
    starts: dict[int, float] = {}
    now_s = 0.0
    for line in lines:
        try:
            row = json.loads(line)
            round, event = (
                int(row["round"]),
                ClockEvent(row["time_s"], row["client"], row["device"], row["what"]),
            )
        except (ValueError, KeyError, TypeError):
            continue
        start_s = starts.setdefault(round, now_s)
        rounds.setdefault(round, []).append(event._replace(time_s=event.time_s - start_s))
        if event.what == "closed":
            now_s = event.time_s
    return tuple(RoundTimed(round, starts[round], tuple(events)) for round, events in rounds.items())
