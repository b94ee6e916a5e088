"""Malformed requests: none causes an error in the server or ends it, and the next scrape is intact.

`FUZZ_SEED` gives other ones.
"""

import base64
import contextlib
import os
import random
import re
import socket
from collections import Counter
from collections.abc import Iterable

import bcrypt
import pytest
from endpoint import ask, client_context, exporters, hold, make_certificate, trained_aggregator

from exporter import MetricsServer

SEED = os.environ.get("FUZZ_SEED", "1")
ODD, BROKEN = 40, 10  # at a time

AUTHORIZATION = "Basic " + base64.b64encode(b"alice:secret").decode()
SEEDS = {
    "Accept": [
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
        "application/openmetrics-text; version=abc",
        'text/*;q="0.5"',
    ],
    "Accept-Encoding": ["gzip, deflate;q=0.5, *;q=0", "identity;q=1.0, gzip;q=0.999"],
    "Authorization": [AUTHORIZATION, "Basic " + base64.b64encode(b"\xff\x00:\xff\x00").decode(), "Digest username=a"],
    "Cookie": ["a=b"],
    "Connection": ["Upgrade, HTTP2-Settings"],
    "Upgrade": ["h2c", "websocket"],
    "HTTP2-Settings": ["AAMAAABkAAQAoAAAAAIAAAAA"],
}
HEADERS, UPGRADE = list(SEEDS)[:-3], list(SEEDS)[-3:]
TARGETS = ["/", "/metrics", "/metrics?name[]=ppo_gradient_cv&run=r", "/-/healthy", "/-/ready", "/%2e%2e/etc/passwd"]
TARGETS += ["http://x/metrics", "*", "//[::1/metrics?%"]
METHODS = ["HEAD", "POST", "OPTIONS", "CONNECT", "TRACE", "PRI", "get", "M-SEARCH"]
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
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def mutated(chance: random.Random, text: str) -> str:
    """`text` with some of it replaced, removed, doubled or followed by what may mean something there."""
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.randrange(6))
        text = text[:start] + chance.choice([chance.choice(TOKENS), "", text[start:end] * 3]) + text[end:]
    return text


def odd_request(chance: random.Random, names: Iterable[str]) -> bytes:
    """A whole request with nonsense in target and in the headers `names`."""
    method = "GET" if chance.random() < 0.8 else chance.choice(METHODS)
    target = chance.choice(TARGETS)
    if chance.random() < 0.3:
        target = re.sub(r"[^!-~]", "", mutated(chance, target)) or "/"
    lines = {"Host": "x", "Authorization": AUTHORIZATION}
    for name in names:
        lines[name] = mutated(chance, chance.choice(SEEDS[name])).strip()
    return "\r\n".join([f"{method} {target} HTTP/1.1", *map(": ".join, lines.items()), "", ""]).encode()


def broken_request(chance: random.Random) -> bytes:
    """Bytes that are no request, or not quite one."""
    kind = chance.randrange(7)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 400))
    if kind == 1:
        bodies = [chance.randbytes(chance.randrange(40)) for _ in range(5)]
        return HTTP2 + b"".join(len(body).to_bytes(3) + chance.randbytes(6) + body for body in bodies)
    if kind == 2:
        return odd_request(chance, UPGRADE)
    request = bytearray(odd_request(chance, chance.sample(HEADERS, 3)))
    if kind == 3:
        for _ in range(chance.randrange(1, 8)):
            request[chance.randrange(len(request))] = chance.randrange(256)
    elif kind == 4:
        del request[chance.randrange(len(request)) :]
    elif kind == 5:
        request[-2:-2] = chance.choice(FRAMING)
        request += chance.choice([b"", b"abc", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"5;" + b"x" * 20_000])
    else:
        request[:] = request.replace(b"HTTP/1.1", chance.choice([b"HTTP/9.9", b"HTTP/1.0", b"HTTP/2.0", b"", b"JUNK"]))
    return bytes(request)


def statuses(client: socket.socket) -> list[int]:
    """Of the answers that are there, or that come until the server hangs up where `client` blocks."""
    received = b""
    with contextlib.suppress(OSError), client:  # there is no more, or it was reset
        while part := client.recv(1 << 16):
            received += part
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@pytest.mark.parametrize("requests", [500, pytest.param(200_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_malformed_requests_do_no_harm(tmp_path, scheme, requests, capfd):
    file, tls, http2 = tmp_path / "web.yml", None, None
    text = f"basic_auth_users:\n  alice: {bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n"
    if scheme == "https":
        authority = make_certificate(tmp_path / "server.pem")
        tls, http2 = client_context(authority), client_context(authority)
        http2.set_alpn_protocols(["h2"])
        text += "tls_server_config: {cert_file: server.pem, key_file: server.key}\n"
    file.write_text(text)
    chance, others, told = random.Random(f"{SEED}/{scheme}"), exporters(), Counter()
    with MetricsServer(trained_aggregator(), port=0, web_config_file=file) as server:

        def scrape() -> str:
            return ask(server.url, "/metrics?run=r", tls=tls, Authorization=AUTHORIZATION).text

        def of_the_run() -> list[str]:
            return [line for line in scrape().splitlines() if 'run="r"' in line]

        first, process = of_the_run(), exporters() - others
        for _ in range(requests // (ODD + BROKEN)):
            clients = []
            for _ in range(BROKEN):
                broken = broken_request(chance)
                context = chance.choice([tls, tls, None]) if broken[:3] != b"PRI" else http2
                clients.append(hold(server.port, broken, context))
                if context is None and chance.random() < 0.5:
                    clients[-1].shutdown(socket.SHUT_WR)
            batch = [odd_request(chance, chance.sample(HEADERS, chance.randrange(1, 4))) for _ in range(ODD)]
            batch.append(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            told.update(statuses(hold(server.port, b"".join(batch), tls)))
            for client in clients:  # which have waited for so long that there is no more to come
                client.setblocking(False)
                told.update(statuses(client))
        assert of_the_run() == first
        assert exporters() - others == process
    assert {200, 400, 401, 404, 405} <= set(told)
    assert not {status for status in told if status >= 500} - {501}  # an unknown transfer coding
    assert capfd.readouterr().err == ""
