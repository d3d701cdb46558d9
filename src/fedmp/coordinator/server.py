"""An HTTP server in a thread of its own: a listening socket, TLS where there are certificates, deadlines."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from fedmp.coordinator.guard import Limits, guarded_protocol
from fedmp.errors import ConfigError

__all__ = ["HttpServer", "Tls", "check_address"]


@dataclass(frozen=True)
class Tls:
    """The coordinator's own certificate.

    Attributes:
        certificate: file of the certificate, with those between it and the authority.
        key: file of its private key.
        client_ca: file of the authority whose certificates devices must show (mutual TLS); None asks for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Find out early whether the files can be used.

        Raises:
            ConfigError: one is missing or malformed.
        """
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.client_ca)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the coordinator's certificate ({self.certificate}, {self.key}"
                f"{f', {self.client_ca}' if self.client_ca else ''}) cannot be used: {error}; `fedmp certs` makes one"
            ) from error

    def options(self) -> dict[str, Any]:
        """The arguments of a uvicorn server."""
        return {
            "ssl_certfile": str(self.certificate),
            "ssl_keyfile": str(self.key),
            "ssl_ca_certs": str(self.client_ca) if self.client_ca else None,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.client_ca else ssl.CERT_NONE,
        }


class HttpServer:
    """Serves an ASGI app while its context is open.

    Args:
        app: the app; its lifespan is run.
        host, port: where to listen; port 0 picks a free one.
        tls: None speaks plain HTTP.
        limits: what a peer may take.
        on_cut: told of connections that are cut for being slow.

    Raises:
        ConfigError: the address or the certificate cannot be used.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        tls: Tls | None,
        limits: Limits,
        on_cut: Callable[[str, str], None],
    ) -> None:
        if tls is not None:
            tls.check()
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=guarded_protocol(limits, on_cut),
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=int(limits.idle_timeout_s),
            limit_concurrency=limits.max_connections,
            timeout_graceful_shutdown=2,
            **(tls.options() if tls else {}),
        )
        logging.getLogger("uvicorn").addHandler(logging.NullHandler())
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="fedmp-coordinator", daemon=True)

    def start(self, ready: threading.Event) -> None:
        """Serve; `ready` is set by the app once it is up.

        Raises:
            ConfigError: it did not come up.
        """
        self._thread.start()
        if not ready.wait(30):
            self.stop()
            raise ConfigError(f"the coordinator's service did not come up on {self.url}")

    def stop(self) -> None:
        """Answer what is under way, for a moment, and end."""
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def check_address(host: str, port: int) -> None:
    """Find out early whether a service could listen here.

    Raises:
        ConfigError: it could not.
    """
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off Nagle's algorithm only where it sees this protocol, and then a body that follows its
    # head would wait 40 ms for the peer's delayed acknowledgement (https://github.com/Kludex/uvicorn/issues/3149)
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the coordinator cannot listen on {host}:{port}: {error.strerror}; choose another with "
            f"engine.port=NUMBER, or engine.port=0 for a free one"
        ) from error
    return listener
