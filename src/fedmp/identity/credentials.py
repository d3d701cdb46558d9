"""A device's credentials: one small file that says who it is and where its coordinator answers."""

from __future__ import annotations

import os
import ssl
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmp.errors import ConfigError

__all__ = ["Credentials", "write_private"]


class Credentials(BaseModel):
    """What `fedmp enroll` hands to a device; keep it secret, it is all that a device is known by.

    Attributes:
        client, device: names in the topology.
        token: 256 random bits; the coordinator keeps only their hash.
        coordinator: URL of the coordinator; may be given to `fedmp device` instead.
        ca: certificate (PEM) of the authority that signed the coordinator's certificate; None trusts the
            authorities that the system trusts.
        certificate, key: this device's own certificate and private key (PEM), for mutual TLS.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: str = Field(min_length=1)
    device: str = Field(min_length=1)
    token: str = Field(min_length=32, pattern=r"^[A-Za-z0-9_-]+$", repr=False)
    coordinator: str | None = None
    ca: str | None = Field(default=None, repr=False)
    certificate: str | None = Field(default=None, repr=False)
    key: str | None = Field(default=None, repr=False)

    @staticmethod
    def load(path: str | Path) -> Credentials:
        """Read a credentials file.

        Raises:
            ConfigError: it is missing or no credentials file.
        """
        try:
            return Credentials.model_validate_json(Path(path).expanduser().read_bytes())
        except OSError as error:
            raise ConfigError(
                f"credentials {str(path)!r} cannot be read: {error.strerror}; `fedmp enroll` makes them"
            ) from error
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"{str(path)!r} is no credentials file: {where}: {first['msg']}") from error

    def save(self, path: Path) -> None:
        """Write the file, readable by its owner alone."""
        write_private(path, self.model_dump_json(indent=1, exclude_none=True).encode())

    def ssl_context(self) -> ssl.SSLContext:
        """A context that trusts this file's authority, and shows its certificate if there is one.

        Raises:
            ConfigError: a certificate or key in the file is malformed.
        """
        try:
            context = ssl.create_default_context(cadata=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate and self.key:
                _load_chain(context, self.certificate, self.key)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"a certificate in the credentials of {self.client}/{self.device} is malformed: {error}"
            ) from error
        return context


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _load_chain(context: ssl.SSLContext, certificate: str, key: str) -> None:
    # Python's ssl reads own certificates from files alone
    with tempfile.TemporaryDirectory(prefix="fedmp-") as folder:
        path = Path(folder) / "chain.pem"
        write_private(path, f"{certificate}\n{key}\n".encode())
        context.load_cert_chain(path)
