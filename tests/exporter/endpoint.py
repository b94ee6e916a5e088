"""Clients and certificates for tests of the endpoint."""

import contextlib
import http.client
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from exporter import RunAggregator, emit_ppo_update
from exporter.telemetry import GradientStep, summarize_gradient_steps

UPDATE = summarize_gradient_steps([GradientStep({"op": 1.0, "slot": 3.0}, 4.0)])


def trained_aggregator(**update: object) -> RunAggregator:
    """An aggregator with a run `r` that has completed an update, just now unless `timestamp_seconds` says otherwise."""
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op", "slot"])
    emit_ppo_update(UPDATE, run="r", handler=aggregator, **update)
    return aggregator


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(
    url: str, path: str = "/metrics", method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str
) -> Answer:
    """One request on a connection of its own; underscores in header names stand for hyphens."""
    host = urlsplit(url).netloc
    if tls is None:
        connection = http.client.HTTPConnection(host, timeout=20)
    else:
        connection = http.client.HTTPSConnection(host, timeout=20, context=tls)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def client_context(authority: Path, certificate: Path | None = None) -> ssl.SSLContext:
    """TLS of a client that trusts `authority`; with a certificate of its own, whose key lies beside it."""
    context = ssl.create_default_context(cafile=authority)
    if certificate is not None:
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


def make_certificate(path: Path, sans: str = "IP:127.0.0.1", authority: Path | None = None) -> Path:
    """A certificate for `sans`, signed by `authority` or by itself; its key is beside it."""
    signer = ["-CA", authority, "-CAkey", authority.with_suffix(".key")] if authority else []
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={path.stem}", "-addext", f"subjectAltName={sans}", "-days", "2"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),  # else Python 3.13 refuses it
            *("-keyout", path.with_suffix(".key"), "-out", path, *signer),
        ],
        check=True,
        capture_output=True,
    )
    return path


def hold(port: int, request: bytes, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A connection on which `request` has been sent, after a TLS handshake where `tls` is given."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    if tls is not None:
        client = tls.wrap_socket(client, server_hostname="127.0.0.1")
    client.sendall(request)
    return client


def exporters() -> set[int]:
    """Ids of the exporter processes of this process that have not ended."""
    running = set()
    for pid in " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split():
        with contextlib.suppress(FileNotFoundError):
            if b"\0-m\0exporter\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                running.add(int(pid))
    return running
