"""The commands of a federation's operator: `fedmp certs`, `fedmp enroll`, `fedmp revoke`.

All of them work on one folder, `federation/` unless told otherwise, on the coordinator's machine or on
a safer one. Only `devices.json`, `server.pem` and `server-key.pem` (and `ca.pem` for mutual TLS) need to
be where the coordinator runs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fedmp.errors import ConfigError
from fedmp.identity import Credentials, CredentialStore
from fedmp.identity.certificates import Authority

__all__ = ["certs", "enroll", "revoke"]

_NAME = re.compile(r"^[^/\s]+(/[^/\s]+)?$")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise what argparse would print and exit with.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`")


def certs(arguments: Sequence[str]) -> None:
    """Make an authority, unless the folder has one, and a certificate for the coordinator.

    Raises:
        ConfigError: the arguments are wrong, or the authority's files cannot be used.
    """
    parser = _parser("fedmp certs", certs.__doc__)
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="name or address of the coordinator")
    parser.add_argument("--days", type=int, default=365, help="that the certificate is valid (365)")
    given = parser.parse_args(arguments)
    folder: Path = given.folder
    authority = _authority(folder, make=True)
    authority.issue_server(given.hosts, days=given.days).save(
        folder / "server.pem", folder / "server-key.pem"
    )
    print(f"authority:   {folder / 'ca.pem'} (its key {folder / 'ca-key.pem'}: keep it safe, best offline)")
    print(f"coordinator: {folder / 'server.pem'} for {', '.join(given.hosts)}")


def enroll(arguments: Sequence[str]) -> None:
    """Issue a credentials file for each device; what it had before is revoked.

    Raises:
        ConfigError: a name is not CLIENT/DEVICE, or there is no authority for `--mutual`.
    """
    parser = _parser("fedmp enroll", enroll.__doc__)
    parser.add_argument("devices", nargs="+", metavar="CLIENT/DEVICE")
    parser.add_argument("--coordinator", help="URL to write into the files, as https://HOST:PORT")
    parser.add_argument("--mutual", action="store_true", help="with a certificate of its own, for mutual TLS")
    parser.add_argument("--days", type=int, default=365, help="that such a certificate is valid (365)")
    given = parser.parse_args(arguments)
    folder: Path = given.folder
    names = [_split(parser, name) for name in given.devices]
    authority = _authority(folder, make=False) if given.mutual else None
    trusted = (folder / "ca.pem").read_text() if (folder / "ca.pem").is_file() else None
    store = CredentialStore(folder / "devices.json")
    for client, device in names:
        issued = authority.issue_device(client, device, days=given.days) if authority else None
        path = folder / "credentials" / f"{client}.{device}.json"
        Credentials(
            client=client,
            device=device,
            token=store.enroll(client, device),
            coordinator=given.coordinator,
            ca=trusted,
            certificate=issued and issued.certificate,
            key=issued and issued.key,
        ).save(path)
        print(f"{client}/{device}: {path}")


def revoke(arguments: Sequence[str]) -> None:
    """Take back credentials: of a device, or of every device of a client. A running coordinator notices.

    Raises:
        ConfigError: a name holds no valid credential.
    """
    parser = _parser("fedmp revoke", revoke.__doc__)
    parser.add_argument("names", nargs="+", metavar="CLIENT[/DEVICE]")
    given = parser.parse_args(arguments)
    store = CredentialStore(given.folder / "devices.json")
    for name in given.names:
        client, _, device = name.partition("/")
        taken = store.revoke(client, device or None)
        if not taken:
            raise ConfigError(f"{name} holds no valid credential; nothing was revoked for it")
        print(f"revoked: {', '.join(f'{client}/{each}' for each in taken)}")


def _parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog=program, description=(description or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("federation"), help="(federation)")
    return parser


def _split(parser: argparse.ArgumentParser, name: str) -> tuple[str, str]:
    client, slash, device = name.partition("/")
    if not slash or not _NAME.match(name):
        parser.error(f"{name!r} is not of the form CLIENT/DEVICE")
    return client, device


def _authority(folder: Path, *, make: bool) -> Authority:
    certificate, key = folder / "ca.pem", folder / "ca-key.pem"
    if make and not certificate.exists() and not key.exists():
        Authority.make().save(certificate, key)
    return Authority.load(certificate, key)
