"""The coordinator's list of enrolled devices: hashes of their tokens, never the tokens.

A token is 256 random bits, so a plain SHA-256 of it tells nothing and needs no salt. The file is read again
whenever it changes: what is enrolled or revoked beside a running coordinator counts from the next request.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmp.errors import ConfigError
from fedmp.identity.credentials import write_private

__all__ = ["CredentialStore", "Identity", "token_digest"]


@dataclass(frozen=True)
class Identity:
    """Whose credential it is.

    Attributes:
        client, device: names in the topology.
        is_revoked: whether it has been taken back.
    """

    client: str
    device: str
    is_revoked: bool = False


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    client: str
    device: str
    digest: str
    issued: str
    revoked: str | None = None


class _Contents(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: tuple[_Entry, ...] = ()


class CredentialStore:
    """Enrolled devices in a JSON file.

    Args:
        path: of the file; made at the first enrolment.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Identity] = {}

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    def enroll(self, client: str, device: str) -> str:
        """Issue a new token; an earlier one of the same device is revoked.

        Returns:
            The token, which is not kept here.

        Raises:
            ConfigError: the file is there and malformed.
        """
        token = secrets.token_urlsafe(32)
        entry = _Entry(client=client, device=device, digest=token_digest(token), issued=_now())
        self._write((*_revoke(self._read(), client, device), entry))
        return token

    def revoke(self, client: str, device: str | None = None) -> list[str]:
        """Take back the credential of a device, or those of all devices of a client.

        Returns:
            The devices that held one.

        Raises:
            ConfigError: the file is malformed.
        """
        before = self._read()
        self._write(_revoke(before, client, device))
        return sorted(
            {e.device for e in before if e.client == client and device in (None, e.device) and not e.revoked}
        )

    def identify(self, token: str) -> Identity | None:
        """Whose token it is; None if it was never issued here."""
        with self._lock:
            self._refresh()
            return self._known.get(token_digest(token))

    def enrolled(self) -> list[Identity]:
        """Every device with a valid credential."""
        return [Identity(entry.client, entry.device) for entry in self._read() if entry.revoked is None]

    def _refresh(self) -> None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._known, self._stamp = {}, None
            return
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._known = {e.digest: Identity(e.client, e.device, bool(e.revoked)) for e in self._read()}
            self._stamp = stamp

    def _read(self) -> tuple[_Entry, ...]:
        try:
            return _Contents.model_validate_json(self._path.read_bytes()).devices
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError) as error:
            raise ConfigError(f"the list of enrolled devices {self._path} cannot be read: {error}") from error

    def _write(self, entries: Sequence[_Entry]) -> None:
        write_private(self._path, _Contents(devices=tuple(entries)).model_dump_json(indent=1).encode())


def token_digest(token: str) -> str:
    """What a token is known by."""
    # surrogates may come from a header that is no UTF-8; they belong to no token, and must not raise
    return hashlib.sha256(b"fedmp device token\0" + token.encode(errors="surrogateescape")).hexdigest()


def _revoke(entries: Sequence[_Entry], client: str, device: str | None) -> tuple[_Entry, ...]:
    now = _now()
    return tuple(
        entry.model_copy(update={"revoked": entry.revoked or now})
        if entry.client == client and device in (None, entry.device)
        else entry
        for entry in entries
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
