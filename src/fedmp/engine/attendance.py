"""Which devices of a deployed federation are there, and how each client is cut over those that are.

The coordinator cannot start a device; whoever runs it may, and until then the round goes on as well as it can.
The ladder, cheapest first: a device that is back soon meets the others in the next generation of the pipeline,
which needs nothing of this; after `absence_s` of silence the client's model is cut anew over the devices that
are there; where no plan fits them, the client sits the round out. A device that comes back, or comes late,
makes the plan better again when the next round begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmp.coordinator import Board, Journal
from fedmp.engine.client_plan import plan_anew
from fedmp.engine.members import members_of_client
from fedmp.engine.plan_book import PlanBook
from fedmp.engine.prepare import Prepared
from fedmp.engine.setup import ClientSetup
from fedmp.errors import PlanError
from fedmp.records import Note, Observer

__all__ = ["Attendance", "Patience"]

_LOOK_S = 0.2


@dataclass(frozen=True)
class Patience:
    """How long devices are waited for.

    Attributes:
        first_s: that were never heard since the coordinator was started.
        absence_s: that were heard, but are silent now.
        stranded_s: of a client that no plan fits, where the round cannot do without it.
    """

    first_s: float
    absence_s: float
    stranded_s: float


@dataclass
class _Attendant:
    """One client.

    Attributes:
        whole: with all of its devices.
        setup: as it is cut now.
        better: as it will be cut when the next round begins; None if it stays as it is.
        tried: devices for which a plan was sought last, whatever came of it.
        refusal: why no plan fits these; empty if one did.
        stranded_since_s: since when no plan fits; 0 while one does.
        counted: whether its samples were counted under its present plan.
    """

    whole: ClientSetup
    setup: ClientSetup
    better: ClientSetup | None = None
    tried: frozenset[str] = frozenset()
    refusal: str = ""
    stranded_since_s: float = 0.0
    counted: bool = False

    @property
    def name(self) -> str:
        return self.whole.name


@dataclass(frozen=True)
class _Look:
    """What can be seen at a moment.

    Attributes:
        now_s: when.
        silent_s: seconds since each device was heard, by client and device; none that never was.
        unable: devices that cannot take their place, and why.
    """

    now_s: float
    silent_s: Mapping[tuple[str, str], float]
    unable: Mapping[tuple[str, str], str] = field(default_factory=dict)


class Attendance:
    """Watches over the devices of all clients.

    Args:
        prepared: the job.
        board, journal: of the coordinator.
        book: where plans are written down.
        patience: how long devices are waited for.
        num_samples, round_samples, predicted_s: of the round loop, by client; kept true.
        observe: told what happens.
    """

    def __init__(
        self,
        prepared: Prepared,
        board: Board,
        journal: Journal,
        *,
        book: PlanBook,
        patience: Patience,
        num_samples: dict[str, int],
        round_samples: dict[str, int],
        predicted_s: dict[str, float],
        observe: Observer,
    ) -> None:
        self._prepared = prepared
        self._board = board
        self._journal = journal
        self._book = book
        self._patience = patience
        self._num_samples = num_samples
        self._round_samples = round_samples
        self._predicted_s = predicted_s
        self._observe = observe
        self._started_s = time.monotonic()
        self._looked_s = 0.0
        self._num_spare = 0
        kept = book.read(prepared)
        self._clients = {
            name: _Attendant(whole, kept.get(name, whole)) for name, whole in prepared.clients.items()
        }
        for client in self._clients.values():
            self._enroll(client)

    def setup_of(self, client: str) -> ClientSetup:
        """A client as it is cut now."""
        return self._clients[client].setup

    def begin_round(self, *, num_spare: int) -> None:
        """Before a round is opened: let those who have come since make plans better.

        Args:
            num_spare: clients of its cohort without which it may be closed.
        """
        self._num_spare = num_spare
        look = self._look()
        for client in self._clients.values():
            if self._board.is_training(client.name):
                continue  # late for an earlier round, which it finishes first
            here = {device for device in _names(client.whole) if self._is_here(client, device, look)}
            if client.better is None and not self._absent(client, look):
                self._improve(client, here)
            if self._board.is_training(client.name):
                continue  # late for an earlier round, and to go on with it
            better, client.better = client.better, None
            if better is not None and set(better.plan.devices) <= here and self._cut(client, better):
                self._observe(Note(f"{client.name} goes on over {', '.join(better.plan.devices)}"))

    def check(self) -> None:
        """See who is there; called several times a second."""
        look = self._look()
        if look.now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = look.now_s
        for client in self._clients.values():
            self._count(client)
            absent = self._absent(client, look)
            here = {device for device in _names(client.whole) if self._is_here(client, device, look)}
            if not absent:
                client.stranded_since_s = 0.0
                self._improve(client, here)
            elif self._board.is_training(client.name):
                self._do_without(client, absent, here, look.now_s)

    def _look(self) -> _Look:
        return _Look(time.monotonic(), self._board.status().silent_s, self._board.unable())

    def _is_here(self, client: _Attendant, device: str, look: _Look) -> bool:
        who = client.name, device
        return who not in look.unable and look.silent_s.get(who, float("inf")) <= self._patience.absence_s

    def _absent(self, client: _Attendant, look: _Look) -> dict[str, str]:
        """Devices of the present plan that are waited for no longer, and what is known of them."""
        absent = {}
        for device in client.setup.plan.devices:
            who = client.name, device
            if who in look.unable:
                absent[device] = look.unable[who]
            elif who not in look.silent_s:
                waited_s = look.now_s - self._started_s
                if waited_s > self._patience.first_s:
                    absent[device] = f"not heard in {waited_s:.0f} s"
            elif look.silent_s[who] > self._patience.absence_s:
                absent[device] = f"silent for {look.silent_s[who]:.0f} s"
        return absent

    def _do_without(
        self, client: _Attendant, absent: Mapping[str, str], here: set[str], now_s: float
    ) -> None:
        """One step of the ladder, for a client that has not finished the open round."""
        told = ", ".join(f"{device} ({how})" for device, how in absent.items())
        lost = f"{client.name} is without {told}"
        setup = self._plan(client, here)
        if setup is not None:
            if self._cut(client, setup):
                client.stranded_since_s = 0.0
                self._board.lost(f"{lost}; it goes on over {', '.join(setup.plan.devices)}")
            return
        why = f"{lost}, and {client.refusal}"
        if not client.stranded_since_s:
            client.stranded_since_s = now_s
            self._board.lost(why)
        waited_s = now_s - client.stranded_since_s
        if self._num_spare > len(self._board.given_up()) or waited_s > self._patience.stranded_s:
            self._board.give_up(client.name, why)

    def _plan(self, client: _Attendant, here: set[str]) -> ClientSetup | None:
        """The client over these devices; None if no plan fits them, which is found out once."""
        if frozenset(here) == client.tried and client.refusal:
            return None
        client.tried, client.refusal = frozenset(here), ""
        if here == set(_names(client.whole)):
            return client.whole
        try:
            if not here:
                raise PlanError("no device is left")
            devices = [device for device in client.whole.client.devices if device.name in here]
            return plan_anew(self._prepared, client.whole, devices)
        except PlanError as error:
            client.refusal = f"no plan fits the others: {error}" if here else str(error)
            return None

    def _improve(self, client: _Attendant, here: set[str]) -> None:
        """See what the partitioner makes of devices that the present plan does not know."""
        if here <= set(_names(client.setup)) or frozenset(here) == client.tried:
            return
        setup = self._plan(client, here)
        client.better = None
        if setup is not None and setup.plan.digest != client.setup.plan.digest:
            client.better = setup

    def _cut(self, client: _Attendant, setup: ClientSetup) -> bool:
        """Cut a client anew, unless its round has just been completed; returns whether it is."""
        before, client.setup = client.setup, setup
        self._write()  # first, so that a coordinator that dies now knows what its devices were told
        if not self._enroll(client):
            client.setup = before
            self._write()
            return False
        client.counted = False
        return True

    def _enroll(self, client: _Attendant) -> bool:
        members = {
            f"{member.client}/{member.device}": member
            for member in members_of_client(self._prepared, client.setup)
        }
        void = self._board.replace_client(client.name, members)
        for rank in void or ():
            self._journal.discard(client.name, rank)
        return void is not None

    def _write(self) -> None:
        clients = self._clients.values()
        self._book.write({c.name: c.setup for c in clients if c.setup.plan.digest != c.whole.plan.digest})

    def _count(self, client: _Attendant) -> None:
        """Note how many samples the client has, once its devices have said so."""
        num_samples = None if client.counted else self._board.samples_of(client.name)
        if num_samples is not None:
            client.counted = True
            client.setup = client.setup.with_samples(num_samples)
            self._num_samples[client.name] = num_samples
            self._round_samples[client.name] = client.setup.round_samples
            self._predicted_s[client.name] = client.setup.predicted_s


def _names(setup: ClientSetup) -> Sequence[str]:
    return [device.name for device in setup.client.devices]
