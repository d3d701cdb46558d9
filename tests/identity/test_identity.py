"""Credentials and certificates: what is issued is accepted, what is taken back is not, and nothing secret is kept."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from fedmp.cli import main
from fedmp.errors import ConfigError
from fedmp.identity import Credentials, CredentialStore, Identity
from fedmp.identity.certificates import Authority, Issued


def test_a_token_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path / "devices.json")
    token = store.enroll("ann", "d0")
    assert store.identify(token) == Identity("ann", "d0")
    assert token not in store.path.read_text()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("token", ["", "x", "ann/d0", "\udcff", "é" * 40, "0" * 100_000])
def test_what_was_never_issued_is_nobody(tmp_path: Path, token: str) -> None:
    store = CredentialStore(tmp_path / "devices.json")
    assert store.identify(token) is None
    store.enroll("ann", "d0")
    assert store.identify(token) is None


def test_a_new_enrolment_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    store = CredentialStore(tmp_path / "devices.json")
    first, second = store.enroll("ann", "d0"), store.enroll("ann", "d0")
    assert store.identify(first) == Identity("ann", "d0", is_revoked=True)
    assert store.identify(second) == Identity("ann", "d0")
    assert store.enrolled() == [Identity("ann", "d0")]


def test_a_store_that_another_process_changes_is_read_again(tmp_path: Path) -> None:
    here, elsewhere = (CredentialStore(tmp_path / "devices.json") for _ in range(2))
    tokens = [elsewhere.enroll("ann", device) for device in ("d0", "d1")]
    assert [here.identify(token) for token in tokens] == [Identity("ann", "d0"), Identity("ann", "d1")]
    assert elsewhere.revoke("ann") == ["d0", "d1"]
    assert all(identity and identity.is_revoked for identity in map(here.identify, tokens))
    assert elsewhere.revoke("ann") == []


def test_a_store_that_is_malformed_is_named(tmp_path: Path) -> None:
    (tmp_path / "devices.json").write_text("{")
    with pytest.raises(ConfigError, match=r"list of enrolled devices .*devices\.json cannot be read"):
        CredentialStore(tmp_path / "devices.json").identify("x")


def test_credentials_return_from_their_file_and_do_not_show_their_secrets(tmp_path: Path) -> None:
    credentials = Credentials(client="ann", device="d0", token="t" * 43, coordinator="https://x:1")
    credentials.save(tmp_path / "a" / "ann.json")
    assert Credentials.load(tmp_path / "a" / "ann.json") == credentials
    assert stat.S_IMODE((tmp_path / "a" / "ann.json").stat().st_mode) == 0o600
    assert "ttt" not in repr(credentials)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("", "is no credentials file"),
        ('{"client": "a", "device": "b"}', "no credentials file: token: Field required"),
        ('{"client": "a", "device": "b", "token": "short"}', "no credentials file: token"),
    ],
)
def test_a_bad_credentials_file_is_named_and_its_content_not_repeated(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "ann.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as error:
        Credentials.load(path)
    assert "short" not in str(error.value)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    """One TLS connection over loopback; returns the client's error, or empty."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            near, _ = listener.accept()
            with near:
                try:
                    with server.wrap_socket(near, server_side=True) as secured:
                        secured.sendall(b"welcome")
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            raw = socket.create_connection(listener.getsockname(), timeout=10)
            with raw, client.wrap_socket(raw, server_hostname=host) as secured:
                return "" if secured.recv(16) == b"welcome" else "closed"
        except OSError as error:
            return str(error)
        finally:
            thread.join(timeout=10)


def server_context(issued: Issued, folder: Path, *, client_ca: str | None = None) -> ssl.SSLContext:
    issued.save(folder / "s.pem", folder / "s.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "s.pem", folder / "s.key")
    if client_ca:
        context.load_verify_locations(cadata=client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def credentials(ca: str | None, own: Issued | None = None) -> Credentials:
    return Credentials(
        client="ann",
        device="d0",
        token="t" * 43,
        ca=ca,
        certificate=own and own.certificate,
        key=own and own.key,
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "fed.example.org"])
def test_a_device_trusts_its_own_authority_for_the_hosts_of_the_certificate(
    tmp_path: Path, host: str
) -> None:
    authority = Authority.make()
    server = server_context(authority.issue_server(["fed.example.org", "127.0.0.1"]), tmp_path)
    assert handshake(server, credentials(authority.pem).ssl_context(), host) == ""


@pytest.mark.parametrize(
    ("ca", "host", "reason"),
    [
        ("another", "127.0.0.1", "certificate verify failed"),
        ("system", "127.0.0.1", "certificate verify failed"),
        ("own", "127.0.0.2", "IP address mismatch"),
        ("own", "other.example.org", "Hostname mismatch"),
    ],
)
def test_a_device_refuses_another_authority_and_another_host(
    tmp_path: Path, ca: str, host: str, reason: str
) -> None:
    authority = Authority.make()
    server = server_context(authority.issue_server(["127.0.0.1"]), tmp_path)
    trusted = {"another": Authority.make().pem, "system": None, "own": authority.pem}[ca]
    assert reason in handshake(server, credentials(trusted).ssl_context(), host)


def test_mutual_tls_lets_in_devices_of_the_authority_alone(tmp_path: Path) -> None:
    authority, other = Authority.make(), Authority.make()
    issued = authority.issue_server(["127.0.0.1"])
    server = server_context(issued, tmp_path, client_ca=authority.pem)

    def enter(own: Issued | None) -> str:
        return handshake(server, credentials(authority.pem, own).ssl_context(), "127.0.0.1")

    assert enter(authority.issue_device("ann", "d0")) == ""
    assert enter(None) != ""
    assert enter(other.issue_device("ann", "d0")) != ""
    assert enter(issued) != "", "a server's certificate is not a device's"


def test_the_commands_set_up_a_federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path / "federation")]
    assert main(["certs", "127.0.0.1", "fed.example.org", *folder]) == 0
    authority = (tmp_path / "federation" / "ca.pem").read_text()
    assert main(["certs", "10.0.0.1", *folder]) == 0
    assert (tmp_path / "federation" / "ca.pem").read_text() == authority, "an authority is made once"
    assert main(["enroll", "ann/d0", "ann/d1", "--coordinator", "https://x:1", "--mutual", *folder]) == 0
    made = Credentials.load(tmp_path / "federation" / "credentials" / "ann.d0.json")
    assert (made.client, made.device, made.coordinator, made.ca) == ("ann", "d0", "https://x:1", authority)
    made.ssl_context()
    store = CredentialStore(tmp_path / "federation" / "devices.json")
    assert store.identify(made.token) == Identity("ann", "d0")
    assert main(["revoke", "ann", *folder]) == 0
    assert store.enrolled() == []
    assert main(["revoke", "ann/d0", *folder]) == 2
    assert "ann/d0 holds no valid credential" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["certs"], "required: HOST"),
        (["certs", "a b"], "'a b' is no host name"),
        (["certs", "x", "--days", "0"], "days is 0"),
        (["enroll", "ann"], "'ann' is not of the form CLIENT/DEVICE"),
        (["enroll", "ann/d0", "--mutual"], "`fedmp certs` makes one"),
        (["enroll", "ann/d0", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
