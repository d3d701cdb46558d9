"""Which devices have said that they can begin, what they hold, and which of them cannot take their place.

Part of the board, whose lock guards it.
"""

from __future__ import annotations

from fedmp.coordinator.members import Member
from fedmp.errors import RefusedError
from fedmp.records import Ready

__all__ = ["Joining"]


class Joining:
    """Who has joined.

    Args:
        is_needed: whether devices must say that they are ready before they are told to train.
    """

    def __init__(self, *, is_needed: bool) -> None:
        self._is_needed = is_needed
        self._ready: dict[Member, int | None] = {}
        self._samples: dict[str, int] = {}
        self._unable: dict[tuple[str, str], tuple[str, str]] = {}

    @property
    def is_needed(self) -> bool:
        """Whether devices come on their own account."""
        return self._is_needed

    def join(self, member: Member, message: Ready) -> int | None:
        """A device can begin, or says why it cannot.

        Args:
            member: the device.
            message: what it says.

        Returns:
            Samples of the client; None while no device has told.

        Raises:
            RefusedError: another device of the client holds another number of samples.
        """
        num_samples, who = message.num_samples, (member.client, member.device)
        if message.unable:
            self._unable[who] = message.process, message.unable
        elif who in self._unable and self._unable[who][0] != message.process:
            del self._unable[who]  # it was started anew, so something may have changed
        for other, held in self._ready.items():
            if other.client == member.client and None not in (held, num_samples) and held != num_samples:
                raise RefusedError(
                    f"{member.client}/{member.device} holds {num_samples} samples, but {other.client}/"
                    f"{other.device} holds {held}; give both the same data and split",
                    status=409,
                    reason="disagreement",
                )
        self._ready[member] = num_samples
        if num_samples is not None:
            self._samples[member.client] = num_samples
        return self._samples.get(member.client)

    def must_join(self, member: Member) -> bool:
        """Whether a device has to say first that it is ready."""
        return self._is_needed and member not in self._ready

    def is_unable(self, member: Member) -> bool:
        """Whether a device cannot take its place."""
        return (member.client, member.device) in self._unable

    def unable(self) -> dict[tuple[str, str], str]:
        """Devices that cannot take their place, by client and device, and why."""
        return {who: reason for who, (_, reason) in self._unable.items()}

    def samples_of(self, client: str) -> int | None:
        """Samples of a client; None while none of its devices has told."""
        return self._samples.get(client)

    def forget(self, client: str) -> None:
        """A client was planned anew: its devices must join again."""
        self._ready = {member: held for member, held in self._ready.items() if member.client != client}
