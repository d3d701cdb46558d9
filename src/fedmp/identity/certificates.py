"""Certificates for a federation of its own: an authority, the coordinator's certificate, devices' certificates.

Elliptic-curve keys (P-256), which every TLS stack of the last ten years accepts. Needs the
`cryptography` package (`pip install 'fedmp[deploy]'`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmp.errors import ConfigError
from fedmp.identity.credentials import write_private

__all__ = ["Authority", "Issued"]

_AUTHORITY_DAYS = 3650
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_CLOCK_SKEW = timedelta(hours=1)  # a machine whose clock is behind must not refuse a fresh certificate


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str

    def save(self, certificate: Path, key: Path) -> None:
        """Write both; the key is readable by its owner alone."""
        write_private(key, self.key.encode())
        certificate.parent.mkdir(parents=True, exist_ok=True)
        certificate.write_text(self.certificate)


class Authority:
    """A certificate authority.

    Args:
        certificate: its own certificate.
        key: its private key, which signs; keep it off the coordinator's machine if you can.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @staticmethod
    def make(name: str = "fedmp") -> Authority:
        """A new authority, valid for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} certificate authority")])
        certificate = (
            _builder(subject, subject, key.public_key(), days=_AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return Authority(certificate, key)

    @staticmethod
    def load(certificate: Path, key: Path) -> Authority:
        """Read an authority that was saved.

        Raises:
            ConfigError: a file is missing or malformed, or the two do not belong together.
        """
        try:
            loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = serialization.load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"the authority in {certificate} and {key} cannot be read: {error}; `fedmp certs` makes one"
            ) from error
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
            raise ConfigError(f"{key} is not the key of the authority's certificate {certificate}")
        return Authority(loaded, private)

    def save(self, certificate: Path, key: Path) -> None:
        """Write both files."""
        private = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        Issued(self.pem, private.decode()).save(certificate, key)

    @property
    def pem(self) -> str:
        """Its certificate, for those who are to trust it."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue_server(self, hosts: Sequence[str], *, days: int = 365) -> Issued:
        """A certificate for the coordinator.

        Args:
            hosts: names and addresses under which devices will reach it.
            days: that it is valid.

        Raises:
            ConfigError: no host is given, or one is malformed.
        """
        if not hosts:
            raise ConfigError(
                "a server certificate needs at least one host name or address of the coordinator"
            )
        return self._issue(
            hosts[0],
            [_subject_name(host) for host in hosts],
            ExtendedKeyUsageOID.SERVER_AUTH,
            days,
        )

    def issue_device(self, client: str, device: str, *, days: int = 365) -> Issued:
        """A certificate with which a device shows who it is, for mutual TLS."""
        name = f"{client}/{device}"
        return self._issue(
            name,
            [x509.UniformResourceIdentifier(f"urn:fedmp:{name}")],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            days,
        )

    def _issue(
        self, name: str, alternatives: Sequence[x509.GeneralName], use: x509.ObjectIdentifier, days: int
    ) -> Issued:
        if days < 1:
            raise ConfigError(f"days is {days}; a certificate must be valid for at least 1")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        certificate = (
            _builder(subject, self._certificate.subject, key.public_key(), days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Issued(certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(host):
        raise ConfigError(f"{host!r} is no host name or address")
    return x509.DNSName(host)
