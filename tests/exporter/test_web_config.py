"""The web configuration file: what it protects, that nothing in it is overlooked, and that node_exporter takes it too."""

import base64
import contextlib
import gc
import itertools
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import bcrypt
import pytest
from conftest import free_ports, wait_until
from endpoint import Answer, ask, client_context, hold, make_certificate, trained_aggregator

from exporter import MetricsServer
from exporter.server import WebConfigError
from exporter.web import access, config, connections

ALICE = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
BOB = bcrypt.hashpw("пароль:s".encode(), bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A folder with the server's certificate, two clients' and a stranger's, and their authority `ca.pem`."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = make_certificate(folder / "ca.pem", "DNS:authority")
    make_certificate(folder / "server.pem", "IP:127.0.0.1", authority)
    make_certificate(folder / "prometheus.pem", "DNS:prometheus.example,IP:::1", authority)
    make_certificate(folder / "other.pem", "DNS:other.example,email:a@example.org", authority)
    make_certificate(folder / "stranger.pem", "DNS:prometheus.example")
    return folder


@pytest.fixture
def serve(certificates: Path, tmp_path: Path) -> Callable[[str], MetricsServer]:
    """Starts a server with a configuration; `cert_file` and the like are looked up in the test's folder."""
    servers = []
    for path in certificates.iterdir():
        shutil.copy(path, tmp_path)

    def start(text: str) -> MetricsServer:
        (tmp_path / "web.yml").write_text(text)
        servers.append(MetricsServer(trained_aggregator(), port=0, web_config_file=tmp_path / "web.yml"))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
VERIFIED = TLS + "  client_ca_file: ca.pem\n  client_auth_type: RequireAndVerifyClientCert\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tls_server_config: [", ":1: "),
        ("- a\n", ":1: expected `key: value` lines"),
        ("[" * 5000, "nested too deeply"),
        ("\ntls_sever_config: {}\n", ":2: tls_sever_config: unknown key; did you mean tls_server_config?"),
        (TLS + "  cert_file: a\n", ":4: tls_server_config.cert_file: is there twice, before in line 2"),
        (TLS + "basic_auth_users:\n  a: x\n  a: y\n", ":6: basic_auth_users.a: is there twice, before in line 5"),
        (TLS + "  cert: inline\n", ":4: tls_server_config.cert: is there beside cert_file"),
        ("tls_server_config: {}\n", ":1: tls_server_config: needs cert_file or cert as well"),
        ("tls_server_config:\n  cert_file: server.pem\n", ":2: tls_server_config.cert_file: needs key_file or key as well"),
        ("tls_server_config:\n  key_file: server.key\n", ":2: tls_server_config.key_file: needs cert_file or cert as well"),
        ("tls_server_config:\n  cert_file: no.pem\n  key_file: server.key\n", ":2: tls_server_config.cert_file: cannot read"),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: ca.key\n", ":3: tls_server_config.key_file: is not the key"),
        ("tls_server_config:\n  cert_file: web.yml\n  key_file: server.key\n", ":2: tls_server_config.cert_file: certificate and"),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: locked.key\n", ":3: tls_server_config.key_file: is encrypted"),
        (TLS + "  client_ca_file: ca.pem\n", ":4: tls_server_config.client_ca_file: needs a client_auth_type"),
        (TLS + "  client_auth_type: RequireAndVerifyClientCert\n", ":4: tls_server_config.client_auth_type: needs client_ca"),
        (TLS + "  client_auth_type: RequireAnyClientCert\n", "RequireAnyClientCert is not supported here"),
        (TLS + "  client_auth_type: Sometimes\n", ":4: tls_server_config.client_auth_type: must be one of NoClientCert"),
        (TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem\n  client_allowed_sans: [a]\n", ":6: "),
        (TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: server.key\n", ":5: .*holds no certificate"),
        (TLS + "  min_version: TLS9\n", ":4: tls_server_config.min_version: must be one of TLS10"),
        (TLS + "  min_version: TLS13\n  max_version: TLS12\n", ":4: tls_server_config.min_version: .*above max_version"),
        (TLS + "  cipher_suites:\n  - TLS_RSA_WITH_RC4_128_SHA\n", ":5: tls_server_config.cipher_suites: must be one of"),
        (TLS + "  cipher_suites: [TLS_AES_128_GCM_SHA256]\n", ":4: .*suites of TLS 1.3 only"),
        (TLS + "  curve_preferences: [CurveP256, X25519]\n", ":4: .*only one curve is supported here"),
        (TLS + "  prefer_server_cipher_suites: maybe\n", ":4: .*must be true or false"),
        (TLS + "http_server_config:\n  http2: true\n", ":5: http_server_config.http2: HTTP/2 is not supported here"),
        ("http_server_config:\n  headers:\n    X-Other: a\n", ":3: http_server_config.headers.X-Other: unknown key"),
        ("http_server_config:\n  headers:\n    X-Frame-Options: maybe\n", ":3: .*must be one of deny, sameorigin, got 'maybe'"),
        ('http_server_config:\n  headers:\n    X-XSS-Protection: "a\\r\\nSet-Cookie: b"\n', ":3: .*cannot be a header's value"),
        ("basic_auth_users:\n  alice: secret\n", ":2: basic_auth_users.alice: must be a bcrypt hash"),
        ("rate_limit:\n  interval: 1s\n", ":2: rate_limit.interval: needs burst as well"),
        ("rate_limit:\n  burst: 3\n", ":2: rate_limit.burst: needs interval as well"),
        ("rate_limit:\n  burst: 3\n  interval: often\n", ":3: rate_limit.interval: must be a duration"),
        ("rate_limit:\n  burst: 0\n  interval: 1s\n", ":2: rate_limit.burst: must be a whole number from 1"),
        ("rate_limit:\n  burst: " + "9" * 5000 + "\n  interval: 1s\n", ":2: rate_limit.burst: must be a whole number"),
        ("rate_limit:\n  burst: 1\n  interval: " + "9" * 400 + "h\n", ":3: rate_limit.interval: is too long"),
        (TLS + "  client_auth_type: RequireClientCert\n", "RequireClientCert is not supported here"),
        (VERIFIED + "  client_allowed_sans: []\n", ":6: tls_server_config.client_allowed_sans: must name somebody"),
        (TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca: ''\n", ":4: .*needs client_ca_file or client_ca"),
        (TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca: é\n", ":5: .*holds no certificate"),
        (TLS.replace("server.pem", '"a\\0b"'), ":2: tls_server_config.cert_file: cannot read"),
        (TLS.replace("server.pem", '"\\ud800"'), ":2: tls_server_config.cert_file: cannot read"),
        (TLS.replace("cert_file: server.pem", 'cert: "\\ud800"'), ":2: tls_server_config.cert: "),
        (f"basic_auth_users:\n  a: {ALICE.replace('2b', '2')}\n", ":2: basic_auth_users.a: must be a bcrypt hash"),
        (f"basic_auth_users:\n  a: {ALICE[:28]}x{ALICE[29:]}\n", ":2: basic_auth_users.a: must be a bcrypt hash"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_line(serve, tmp_path, text, message):
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", tmp_path / "server.key", "-out", tmp_path / "locked.key"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    with pytest.raises(WebConfigError, match=message) as refused:
        serve(text)
    assert str(refused.value).startswith(f"{tmp_path}/web.yml:")
    assert "BEGIN" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "basic_auth_users: {}\nhttp_server_config:\n",
        "rate_limit: {interval: 0, burst: 0}\n",
        "rate_limit: {interval: 0s}\n",
    ],
)
def test_an_empty_file_changes_nothing(serve, text):
    server = serve(text)
    assert server.url.startswith("http://")
    assert ask(server.url).status == 200


def test_certificates_can_stand_in_the_file_itself(serve, tmp_path):
    def inline(name: str) -> str:
        return "|\n" + "".join(f"    {line}\n" for line in (tmp_path / name).read_text().splitlines())

    server = serve(
        f"tls_server_config:\n  cert: {inline('server.pem')}  key: {inline('server.key')}  client_ca: {inline('ca.pem')}"
        "  client_auth_type: VerifyClientCertIfGiven\n"
    )
    authority = tmp_path / "ca.pem"
    assert ask(server.url, tls=client_context(authority)).status == 200
    assert ask(server.url, tls=client_context(authority, tmp_path / "other.pem")).status == 200
    with pytest.raises(OSError):
        ask(server.url, tls=client_context(authority, tmp_path / "stranger.pem"))


def test_only_clients_with_the_right_certificate_get_in(serve, tmp_path):
    server = serve(VERIFIED + '  client_allowed_sans: ["prometheus.example", "0:0::1", "b@example.org"]\n')
    authority = tmp_path / "ca.pem"
    assert ask(server.url, tls=client_context(authority, tmp_path / "prometheus.pem")).status == 200
    for name in ("other.pem", "stranger.pem"):
        with pytest.raises(OSError):
            ask(server.url, tls=client_context(authority, tmp_path / name))
    with pytest.raises(OSError):
        ask(server.url, tls=client_context(authority))
    with pytest.raises(OSError):
        ask(server.url.replace("https", "http"))


def test_a_certificate_that_is_named_itself_is_trusted(serve, tmp_path):
    """As in Go, and so in Prometheus' own exporters: an authority need not be a root."""
    server = serve(VERIFIED.replace("ca.pem", "prometheus.pem"))
    assert ask(server.url, tls=client_context(tmp_path / "ca.pem", tmp_path / "prometheus.pem")).status == 200
    with pytest.raises(OSError):
        ask(server.url, tls=client_context(tmp_path / "ca.pem", tmp_path / "other.pem"))


def handshake(url: str, context: ssl.SSLContext) -> tuple[str, str]:
    """Version and cipher suite that were agreed on."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
            return client.version(), client.cipher()[0]


def test_versions_and_ciphers_are_as_configured(serve, tmp_path):
    server = serve(
        TLS + "  max_version: TLS12\n  curve_preferences: [X25519]\n  cipher_suites:\n"
        "  - TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384\n  - TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\n"
    )
    context = client_context(tmp_path / "ca.pem")
    context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384")
    assert handshake(server.url, context) == ("TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384")
    context.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")
    with pytest.raises(ssl.SSLError):
        handshake(server.url, context)

    newest_only = serve(TLS + "  min_version: TLS13\n")
    context = client_context(tmp_path / "ca.pem")
    assert handshake(newest_only.url, context)[0] == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        handshake(newest_only.url, context)


def test_users_need_their_password_everywhere(serve):
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n  bob: {BOB}\n")
    for path in ("/metrics", "/-/healthy", "/nowhere"):
        answer = ask(server.url, path)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="metrics"')
    for user, password, status in [
        ("alice", "secret", 200),
        ("bob", "пароль:s", 200),
        ("alice", "Secret", 401),
        ("bob", "secret", 401),
        ("carol", "secret", 401),  # is compared with somebody's hash, but is not that somebody
        ("dave", "пароль:s", 401),
        ("alice", "", 401),
        ("", "secret", 401),
        ("alice", "\0" + "s" * 5000, 401),
    ]:
        for _ in range(2):  # the second answer is remembered
            assert ask(server.url, Authorization=basic(user, password)).status == status, (user, password)
    for header in ("Basic", "Basic !", "Basic YWxpY2U=", "Bearer secret"):
        assert ask(server.url, Authorization=header).status == 401
    assert ask(server.url, Authorization=basic("alice", "secret").replace("Basic", "bASIC")).status == 200


def test_a_password_is_hashed_once_and_an_unknown_user_as_often_as_a_known_one(serve, monkeypatch):
    checked = []
    real = bcrypt.checkpw
    monkeypatch.setattr(access.bcrypt, "checkpw", lambda *given: checked.append(given) or real(*given))
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n  bob: {BOB}\n")
    for user, password in [("alice", "secret"), ("alice", "wrong"), ("nobody", "wrong")]:
        checked.clear()
        for _ in range(5):
            ask(server.url, Authorization=basic(user, password))
        assert len(checked) == 1


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_who_guesses_passwords_keeps_nobody_out(serve, source):
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(8)).decode()
    server = serve(f"basic_auth_users:\n  alice: {hashed}\n")
    ended = threading.Event()

    def guess(number: int) -> None:
        for attempt in itertools.count():
            if ended.is_set():
                return
            connection = HTTPConnection("127.0.0.1", server.port, source_address=(source, 0))
            with contextlib.suppress(OSError, HTTPException):
                connection.request("GET", "/", headers={"Authorization": basic("alice", f"{number} {attempt}")})
                connection.getresponse().read()
            connection.close()

    with ThreadPoolExecutor(16) as guessers:
        for number in range(16):
            guessers.submit(guess, number)
        try:
            wait_until(
                lambda: any(thread.name == "metrics-passwords" for thread in threading.enumerate()),
                "passwords are being compared",
            )
            assert ask(server.url, Authorization=basic("alice", "secret")).status == 200
        finally:
            ended.set()


def test_more_guessers_than_connections_keep_nobody_out(serve, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    right = {"Authorization": basic("alice", "secret")}
    assert ask(server.url, **right).status == 200
    ended = threading.Event()
    monkeypatch.setattr(access.bcrypt, "checkpw", lambda *given: ended.wait(20))
    guesses = (
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('alice', str(number))}\r\n\r\n" for number in range(30)
    )
    clients = [hold(server.port, guess.encode(), None) for guess in guesses]
    assert ask(server.url, **right).status == 200
    ended.set()
    for client in clients:
        client.close()


@pytest.mark.parametrize("failing", ["start", "checkpw"])
def test_where_passwords_cannot_be_compared_they_are_once_they_can_be_again(serve, monkeypatch, caplog, failing):
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    right = {"Authorization": basic("alice", "secret")}
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "metrics-passwords":
            raise RuntimeError("can't start new thread")
        real(thread)

    def panic(*given: bytes) -> bool:
        raise BaseException("panic")

    with monkeypatch.context() as patch:
        if failing == "start":
            patch.setattr(threading.Thread, "start", start)
        else:
            patch.setattr(access.bcrypt, "checkpw", panic)
        assert [ask(server.url, **right).status for _ in range(2)] == [503, 503]
    assert caplog.text.count("passwords cannot be compared until this works again") == 1
    assert ask(server.url, **right).status == 200


def test_a_password_that_nobody_waits_for_is_not_compared_and_closing_waits_for_none(serve, monkeypatch, recwarn):
    gc.collect()
    recwarn.clear()
    compared = []

    def slow(password: bytes, hashed: bytes) -> bool:
        compared.append(password)
        time.sleep(1.0)
        return False

    monkeypatch.setattr(access.bcrypt, "checkpw", slow)
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    for number in range(50):
        request = f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('alice', str(number))}\r\n\r\n"
        with hold(server.port, request.encode(), None) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    assert ask(server.url, Authorization=basic("alice", "last")).status == 401
    assert compared[-1] == b"last" and len(compared) <= 3
    hold(server.port, request.encode(), None).close()
    server.close()
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_file_system_that_does_not_answer_leaves_the_configuration_before_in_force(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_RECHECK_SECONDS", 0.0)
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    file = tmp_path / "web.yml"
    file.unlink()
    os.mkfifo(file)  # whose reader waits for a writer
    try:
        for _ in range(3):
            assert ask(server.url).status == 401
            assert ask(server.url, Authorization=basic("alice", "secret")).status == 200
        assert [thread.name for thread in threading.enumerate()].count("metrics-config") == 1
        server.close()
        with pytest.raises(ConnectionRefusedError):
            ask(server.url)
    finally:
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))


def test_headers_and_rate_limit(serve):
    server = serve(
        "http_server_config:\n  headers:\n    X-Frame-Options: deny\n    Strict-Transport-Security: max-age=1\n"
        "    X-XSS-Protection: ''\n"
        "rate_limit:\n  interval: 1h0m0.5s\n  burst: 3\n"
    )
    answers = [ask(server.url) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert answers[3].headers["Retry-After"]
    for answer in answers:
        assert answer.headers["X-Frame-Options"] == "deny"
        assert answer.headers["Strict-Transport-Security"] == "max-age=1"
        assert "X-XSS-Protection" not in answer.headers


def test_users_and_certificates_are_read_again_and_a_broken_file_changes_nothing(serve, tmp_path, caplog):
    text = TLS + f"basic_auth_users:\n  alice: {ALICE}\n"
    server = serve(text)
    old, new = client_context(tmp_path / "ca.pem"), client_context(make_certificate(tmp_path / "renewed.pem"))
    alice, bob = basic("alice", "secret"), basic("bob", "пароль:s")
    assert ask(server.url, tls=old, Authorization=alice).status == 200

    for broken in (text + "rate_limit: 5\n", f"basic_auth_users:\n  alice: {BOB}\n", TLS):
        caplog.clear()
        (tmp_path / "web.yml").write_text(broken)
        wait_until(lambda: ask(server.url, tls=old, Authorization=alice) and caplog.records, "it is found broken")
        assert "the configuration before stays in force" in caplog.text
        assert ask(server.url, tls=old, Authorization=alice).status == 200

    (tmp_path / "web.yml").write_text(text.replace(f"alice: {ALICE}", f"bob: {BOB}"))
    wait_until(lambda: ask(server.url, tls=old, Authorization=alice).status == 401, "alice is gone")
    assert ask(server.url, tls=old, Authorization=bob).status == 200

    os.replace(tmp_path / "renewed.key", tmp_path / "server.key")
    os.replace(tmp_path / "renewed.pem", tmp_path / "server.pem")

    def renewed() -> Answer | None:
        try:
            return ask(server.url, tls=new, Authorization=bob)
        except ssl.SSLCertVerificationError:
            return None

    assert wait_until(renewed, "the new certificate is served").status == 200


def test_a_file_that_changes_while_it_is_read_is_read_again_and_an_emptied_one_opens_nothing(
    serve, tmp_path, monkeypatch
):
    file, read = tmp_path / "web.yml", config.read_web_config
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    alice, bob = basic("alice", "secret"), basic("bob", "пароль:s")
    assert ask(server.url, Authorization=alice).status == 200
    reads = []

    def read_slowly(path: Path) -> object:
        read_before = read(path)
        if not reads:  # somebody writes on
            file.write_text(f"basic_auth_users:\n  bob: {BOB}\n")
        reads.append(path)
        return read_before

    monkeypatch.setattr(config, "read_web_config", read_slowly)
    file.write_text("")
    assert wait_until(lambda: reads or ask(server.url).status == 200, "it is read") is reads
    wait_until(lambda: ask(server.url, Authorization=bob).status == 200, "the rest is found")
    assert ask(server.url).status == ask(server.url, Authorization=alice).status == 401


def test_node_exporter_takes_the_same_file_and_does_the_same(serve, tmp_path, node_exporter):
    ours = serve(
        TLS + "  client_ca_file: ca.pem\n  client_auth_type: RequireAndVerifyClientCert\n"
        "  min_version: TLS12\n  max_version: TLS12\n  prefer_server_cipher_suites: true\n"
        "  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256]\n  curve_preferences: [CurveP256]\n"
        "http_server_config:\n  http2: false\n  headers:\n    X-Content-Type-Options: nosniff\n"
        f"basic_auth_users:\n  alice: {ALICE}\n  bob: {BOB}\n"
    )
    port = free_ports().metrics
    command = [node_exporter, f"--web.config.file={tmp_path / 'web.yml'}", f"--web.listen-address=127.0.0.1:{port}"]
    tls = client_context(tmp_path / "ca.pem", tmp_path / "prometheus.pem")
    with (tmp_path / "node_exporter.log").open("w") as log:
        theirs = subprocess.Popen(command, stderr=log)
        try:
            url = f"https://127.0.0.1:{port}"

            def is_up() -> bool:
                try:
                    return ask(url, "/", tls=tls).status == 401
                except ConnectionRefusedError:
                    assert theirs.poll() is None, Path(log.name).read_text()
                    return False

            wait_until(is_up, "node_exporter is up")
            for each in (ours.url, url):
                assert handshake(each, tls) == ("TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256")
                assert ask(each, tls=tls, Authorization=basic("alice", "wrong")).status == 401
                for user, password in (("alice", "secret"), ("bob", "пароль:s")):
                    answer = ask(each, tls=tls, Authorization=basic(user, password))
                    assert (answer.status, answer.headers["X-Content-Type-Options"]) == (200, "nosniff")
                    assert "process_cpu_seconds_total" in answer.text
                with pytest.raises(OSError):
                    ask(each, tls=client_context(tmp_path / "ca.pem"))
        finally:
            theirs.terminate()
            theirs.wait(10)
