"""Who would finish a round when: the order in which simulated clients' updates arrive, and when the round closes.

The same rules as over real processes (`fedmp.coordinator.remote`), on predicted times instead of a clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmp.coordinator import Opening
from fedmp.errors import RoundError
from fedmp.strategy import Closing

__all__ = ["Arrivals", "predict_arrivals"]


@dataclass(frozen=True)
class Arrivals:
    """How a simulated round goes.

    Attributes:
        counted: clients whose updates it takes, in the order in which they arrive.
        left_s: seconds that each other client that takes part still needs as the round closes; infinite for
            one that never finishes.
        duration_s: of the round.
    """

    counted: tuple[str, ...]
    left_s: Mapping[str, float]
    duration_s: float


def predict_arrivals(
    opening: Opening,
    *,
    place: Callable[[str], int],
    left_s: Mapping[str, float],
    finish_s: Callable[[str], float],
) -> Arrivals:
    """Let the clients of a round finish one after another until it may close.

    Args:
        opening: of the round.
        place: of a client in client order; of two that finish at the same time the first in it arrives first.
        left_s: seconds that each late client still needs.
        finish_s: seconds that a client needs which begins now; infinite for one that never finishes.

    Raises:
        RoundError: fewer than the minimum ever finish.
    """
    closing = opening.closing
    queue = [(left_s[client], place(client), client) for client in opening.late]
    queue += [(finish_s(client), place(client), client) for client in opening.cohort]
    queue.sort()  # which is a heap, too
    spare = list(opening.spare) if closing.refills else []
    if not spare and (on_time := _on_time(queue, closing)) is not None:
        return on_time
    counted: list[str] = []
    now_s = 0.0
    while queue and len(counted) < closing.wanted:
        at_s, _, client = queue[0]
        is_enough = len(counted) >= closing.minimum
        if is_enough and closing.deadline_s is not None and at_s > closing.deadline_s:
            now_s = max(now_s, closing.deadline_s)
            break
        if math.isinf(at_s):
            if is_enough:
                break
            raise RoundError(
                f"{len(counted)} of {len(counted) + len(queue)} clients ever finish round {opening.round}, "
                f"{closing.minimum} are needed; the others: {', '.join(sorted(name for _, _, name in queue))}"
            )
        heapq.heappop(queue)
        now_s = at_s
        counted.append(client)
        if spare and len(counted) < closing.wanted:
            beginning = spare.pop(0)
            heapq.heappush(queue, (now_s + finish_s(beginning), place(beginning), beginning))
    return Arrivals(tuple(counted), {client: at_s - now_s for at_s, _, client in queue}, now_s)


def _on_time(queue: Sequence[tuple[float, int, str]], closing: Closing) -> Arrivals | None:
    """How a round goes in which all who are wanted finish in time; None if they do not."""
    wanted = min(closing.wanted, len(queue))
    now_s = queue[wanted - 1][0] if wanted else math.inf
    if math.isinf(now_s) or (closing.deadline_s is not None and now_s > closing.deadline_s):
        return None
    left_s = {client: at_s - now_s for at_s, _, client in queue[wanted:]}
    return Arrivals(tuple(client for _, _, client in queue[:wanted]), left_s, now_s)
