"""Malformed requests and headers, a great many: no exception, nothing left behind, and the next scrape intact.

`FUZZ_REQUESTS` (per protocol) and `FUZZ_SEED` make it longer, or another one.
"""

import base64
import logging
import os
import random
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import bcrypt
import pytest
from conftest import wait_until
from endpoint import ask, client_context, hold, make_certificate, resources, trained_aggregator
from prometheus_client.parser import text_string_to_metric_families

from exporter import MetricsServer
from exporter.web import access, connections

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "20000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
PER_CONNECTION = 25
CLIENTS = 4

AUTHORIZATION = "Basic " + base64.b64encode(b"alice:secret").decode()
SEEDS = {
    "Accept": [
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
        "application/openmetrics-text; version=abc",
        'text/*;q="0.5"',
    ],
    "Accept-Encoding": ["gzip, deflate;q=0.5, *;q=0", "identity;q=1.0, gzip;q=0.999"],
    "Authorization": [AUTHORIZATION, "Basic " + base64.b64encode(b"\xff\x00:\xff\x00").decode(), "Digest username=a"],
    "Host": ["127.0.0.1"],
    "Connection": ["keep-alive", "Upgrade, HTTP2-Settings"],
    "Upgrade": ["h2c", "websocket"],
    "Cookie": ["a=b"],
}
TARGETS = [
    "/",
    "/metrics",
    "/metrics?name[]=ppo_gradient_cv&name[]=up",
    "/-/healthy",
    "/-/ready",
    "/%2e%2e/etc/passwd",
    "http://x/metrics",
    "*",
    "//[::1/metrics?%",
]
METHODS = ["GET", "HEAD", "POST", "OPTIONS", "CONNECT", "TRACE", "PRI", "get", "M-SEARCH"]
TOKENS = [*";,=/*\"'%&?#:[]{}() \t", "q=", "q=1e309", "q=nan", "version=", "99999999999999999999", "é", "\\", "gzip"]
FRAMING = [
    b"Content-Length: -1\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 3\r\n",
    b"Expect: 100-continue\r\nContent-Length: 3\r\n",
    b" folded: yes\r\n",
    b": nameless\r\n",
    b"Name with spaces: x\r\n",
    b"X: \x00\r\n",
    b"X: a\rb\r\n",
    b"Host: twice\r\n",
    b"X" * 20_000,
]


def mutated(chance: random.Random, text: str) -> str:
    """`text` with some of it replaced, removed, doubled or followed by what may mean something there."""
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.randrange(6))
        text = text[:start] + chance.choice([chance.choice(TOKENS), "", text[start:end] * 3]) + text[end:]
    return text


def odd_request(chance: random.Random) -> bytes:
    """A whole request with nonsense in target and headers, most often one that leaves the connection usable."""
    method = "GET" if chance.random() < 0.8 else chance.choice(METHODS)
    target = chance.choice(TARGETS)
    if chance.random() < 0.3:
        target = re.sub(r"[^!-~]", "", mutated(chance, target)) or "/"
    lines = [f"{method} {target} HTTP/1.1", "Host: x"]
    if chance.random() < 0.9:
        lines.append(f"Authorization: {AUTHORIZATION}")
    for name in chance.sample([name for name in SEEDS if name not in ("Host", "Connection")], chance.randrange(1, 4)):
        if name != "Authorization" or len(lines) == 2:
            lines.append(f"{name}: {mutated(chance, chance.choice(SEEDS[name])).strip()}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def broken_request(chance: random.Random) -> bytes:
    """Bytes that are no request, or not quite one."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 400))
    request = bytearray(odd_request(chance))
    if kind == 1:
        for _ in range(chance.randrange(1, 8)):
            request[chance.randrange(len(request))] = chance.randrange(256)
    elif kind == 2:
        del request[chance.randrange(len(request)) :]
    elif kind == 3:
        request[-2:-2] = chance.choice(FRAMING)
        request += chance.choice([b"", b"abc", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"5;" + b"x" * 20_000])
    else:
        request[:] = request.replace(b"HTTP/1.1", chance.choice([b"HTTP/9.9", b"HTTP/1.0", b"HTTP/2.0", b"", b"JUNK"]))
    return bytes(request)


def answers(client: socket.socket) -> Iterator[int]:
    """Statuses of the answers until the server hangs up."""
    received = b""
    try:
        while part := client.recv(1 << 16):
            received += part
    except OSError:
        pass  # reset because of what the server did not care to read
    return map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", received))


def attack(port: int, tls: ssl.SSLContext | None, seed: int, requests: int) -> Counter:
    """Send requests until `requests` of them have been dealt with; how many got which status."""
    chance, statuses, broken = random.Random(seed), Counter(), 0
    last = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    while statuses.total() + broken < requests:
        batch = [odd_request(chance) for _ in range(PER_CONNECTION - 1)]
        with hold(port, b"".join(batch) + last, tls) as client:
            statuses.update(answers(client))
        with hold(port, broken_request(chance), tls) as client:
            if tls is None:
                client.shutdown(socket.SHUT_WR)
                statuses.update(answers(client))
        if tls is not None:  # and what is no handshake
            with hold(port, broken_request(chance), None) as client:
                client.shutdown(socket.SHUT_WR)
                assert not list(answers(client))
        broken += tls is not None  # of these there is no status
    return statuses


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.filterwarnings("error")
def test_malformed_requests_do_no_harm(tmp_path, scheme, caplog, monkeypatch):
    # As fast as it goes: what holds attackers up is tested elsewhere.
    monkeypatch.setattr(connections, "CPU_SHARE", 100.0)
    monkeypatch.setattr(access, "CHECKING_SHARE", 1.0)
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    file, tls = tmp_path / "web.yml", None
    text = f"basic_auth_users:\n  alice: {hashed}\n"
    if scheme == "https":
        tls = client_context(make_certificate(tmp_path / "server.pem"))
        text += "tls_server_config: {cert_file: server.pem, key_file: server.key}\n"
    file.write_text(text)
    tomorrow = time.time() + 86400.0  # so that the run is ready, however long it takes
    with MetricsServer(trained_aggregator(timestamp_seconds=tomorrow), port=0, web_config_file=file) as server:
        first = scrape(server, tls)
        threads, descriptors = resources()
        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            attacks = [
                clients.submit(attack, server.port, tls, f"{SEED}/{scheme}/{number}", REQUESTS // CLIENTS)
                for number in range(CLIENTS)
            ]
            statuses = sum((each.result() for each in attacks), Counter())
        print(
            f"{scheme}: {REQUESTS} requests, {time.monotonic() - started:.0f} s, statuses {dict(sorted(statuses.items()))}"
        )
        assert {200, 401, 404, 405} <= set(statuses)
        assert not {status for status in statuses if status >= 500} - {501}  # an unknown transfer coding
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        wait_until(lambda: resources()[1] <= descriptors, "all descriptors are free again")
        assert resources()[0] <= threads + 1  # the one that compares passwords
        assert scrape(server, tls) == first


def scrape(server: MetricsServer, tls: ssl.SSLContext | None) -> dict[tuple, float]:
    """The samples of the run."""
    text = ask(server.url, tls=tls, Authorization=AUTHORIZATION).text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "run" in sample.labels
    }
