"""Encryption of both front doors: a certificate, its key, and whose certificates clients need."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from astraea_jax.errors import StartupError


@dataclass(frozen=True)
class Tls:
    """Files in PEM format. The certificate's file may hold the whole chain.

    Raises:
        StartupError: a file cannot be read, or they do not belong together.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Clients have to show a certificate that this authority has signed; None: they need none."""

    def __post_init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # or else it would ask for one
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ValueError) as error:
            raise StartupError(
                f"TLS cannot be served with {self.certificate} and {self.key}"
                f"{f' for clients of {self.client_ca}' if self.client_ca else ''}: {error}"
            ) from error

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return what a gRPC server needs."""
        ca = None if self.client_ca is None else self.client_ca.read_bytes()
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)

    def uvicorn_options(self) -> dict[str, Any]:
        """Return what uvicorn needs."""
        return {
            "ssl_certfile": str(self.certificate),
            "ssl_keyfile": str(self.key),
            "ssl_ca_certs": None if self.client_ca is None else str(self.client_ca),
            "ssl_cert_reqs": ssl.CERT_NONE if self.client_ca is None else ssl.CERT_REQUIRED,
        }
