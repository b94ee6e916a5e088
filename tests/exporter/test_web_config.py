"""The web configuration file: what it protects, that no key is ignored, and that node_exporter accepts it too."""

import base64
import contextlib
import os
import select
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import bcrypt
import pytest
from conftest import free_ports, wait_until
from endpoint import Answer, ask, client_context, exporters, hold, make_certificate, trained_aggregator

from exporter import MetricsServer
from exporter.child import WebConfigError
from exporter.serving.web_config import WebConfigFile

ALICE = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
BOB = bcrypt.hashpw("пароль:s".encode(), bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")
SLOW = bcrypt.hashpw(b"secret", bcrypt.gensalt(11)).decode()
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
IF_GIVEN = TLS + "  client_ca_file: ca.pem\n  client_auth_type: VerifyClientCertIfGiven\n"
VERIFIED = IF_GIVEN.replace("VerifyClientCertIfGiven", "RequireAndVerifyClientCert")


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
    encrypt = ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", folder / "server.key"]
    subprocess.run([*encrypt, "-out", folder / "locked.key"], check=True, capture_output=True)
    return folder


@pytest.fixture
def configure(certificates: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a configuration beside the certificates; gives its path."""
    shutil.copytree(certificates, tmp_path, dirs_exist_ok=True)

    def write(text: str, name: str = "web.yml") -> Path:
        (path := tmp_path / name).write_text(text)
        return path

    return write


@pytest.fixture
def serve(configure: Callable[[str], Path]) -> Iterator[Callable[..., MetricsServer]]:
    """Starts a server with a configuration."""
    with contextlib.ExitStack() as servers:

        def start(text: str, **options: int) -> MetricsServer:
            server = MetricsServer(trained_aggregator(), port=0, web_config_file=configure(text), **options)
            return servers.enter_context(server)

        yield start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tls_server_config: [", ":1: "),
        ("- a\n", ": the file: must be `key: value` lines"),
        ("[" * 500, "maximum recursion depth exceeded"),
        ("\udcff", "can't decode byte 0xff"),
        ("tls_sever_config: {}\n", ": tls_sever_config: unknown key; did you mean tls_server_config?"),
        (TLS + "  cert_file: a\n", ":2: a key is set twice"),
        (TLS + "basic_auth_users:\n  a: x\n  a: y\n", ":5: a key is set twice"),
        (TLS + "  cert: inline\n", ": tls_server_config.cert: is not supported here"),
        (TLS + "  key: inline\n", ": tls_server_config.key: is not supported here"),
        (TLS + "  client_ca: inline\n", ": tls_server_config.client_ca: is not supported here"),
        (TLS + "  cipher_suites: [TLS_AES_128_GCM_SHA256]\n", ".cipher_suites: is not supported here"),
        (TLS + "  curve_preferences: [X25519]\n", ": tls_server_config.curve_preferences: is not supported here"),
        (TLS + "  prefer_server_cipher_suites: true\n", ".prefer_server_cipher_suites: is not supported here"),
        (TLS + "  min_version: TLS10\n", ": tls_server_config.min_version: must be one of TLS12, TLS13, got 'TLS10'"),
        (TLS + "  max_version: TLS11\n", ": tls_server_config.max_version: must be one of TLS12, TLS13, got 'TLS11'"),
        (TLS + "  min_version: TLS13\n  max_version: TLS12\n", ".min_version: must be at most max_version"),
        ("tls_server_config: {}\n", ": tls_server_config.cert_file: must be given"),
        ("tls_server_config:\n  cert_file: server.pem\n", ": tls_server_config.key_file: must be given"),
        (TLS.replace("server.pem", "no.pem"), ": tls_server_config.cert_file: must be a file that is there, got"),
        (TLS.replace("server.pem", '"a\\0b"'), ": embedded null"),
        (TLS.replace("server.pem", "."), ": tls_server_config: .*Is a directory"),
        (TLS.replace("server.pem", "web.yml"), ": tls_server_config: "),
        (TLS.replace("server.key", "ca.key"), ": tls_server_config: .*KEY_VALUES_MISMATCH"),
        (TLS.replace("server.key", "locked.key"), ": tls_server_config.key_file: is encrypted, which is not supported"),
        (TLS + "  client_ca_file: ca.pem\n", ": tls_server_config.client_ca_file: must be given if, and only if"),
        (VERIFIED.replace("  client_ca_file: ca.pem\n", ""), ": tls_server_config.client_ca_file: must be given if"),
        (IF_GIVEN.replace("ca.pem", "server.key"), ": tls_server_config: .*"),
        (TLS + "  client_auth_type: RequireAnyClientCert\n", ": tls_server_config.client_auth_type: must be one of"),
        (TLS + "  client_auth_type: 5\n", ": tls_server_config.client_auth_type: must be one of"),
        (IF_GIVEN + "  client_allowed_sans: [a]\n", ": tls_server_config.client_allowed_sans: must be a list"),
        (VERIFIED + "  client_allowed_sans: []\n", ": tls_server_config.client_allowed_sans: must be a list"),
        (VERIFIED + "  client_allowed_sans: a\n", ": tls_server_config.client_allowed_sans: must be a list"),
        ("http_server_config:\n  http2: maybe\n", ": http_server_config.http2: must be true or false"),
        ("http_server_config:\n  headers:\n    X-Other: a\n", ": http_server_config.headers.X-Other: unknown key"),
        ('http_server_config: {headers: {X-XSS-Protection: "a\\r\\nB: c"}}\n', "X-XSS-Protection: must be a header's"),
        ("basic_auth_users:\n  alice: secret\n", ": basic_auth_users.alice: must be a bcrypt hash"),
        ("basic_auth_users:\n  a: $2$04$" + "." * 53 + "\n", ": basic_auth_users.a: must be a bcrypt hash"),
        ("basic_auth_users:\n  a:\n", ": basic_auth_users.a: must be a bcrypt hash"),
        ("basic_auth_users: [a]\n", ": basic_auth_users: must be `key: value` lines"),
        ("rate_limit:\n  interval: 1s\n", ": rate_limit.burst: must be a whole number of at least 1"),
        ("rate_limit:\n  burst: 3\n", ": rate_limit.interval: must be a duration"),
        ("rate_limit:\n  burst: 3\n  interval: often\n", ": rate_limit.interval: must be a duration"),
        ("rate_limit:\n  burst: 0\n  interval: 1s\n", ": rate_limit.burst: must be a whole number .*, got 0"),
        ("rate_limit:\n  burst: " + "9" * 5000 + "\n  interval: 1s\n", ": Exceeds the limit"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_file_and_key(configure, text, message):
    path = configure("")
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WebConfigError, match=message) as refused:
        WebConfigFile(path)
    assert str(path) in str(refused.value)
    assert "BEGIN" not in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize("text", [TLS + "  cert: inline\n", None])
def test_nothing_is_served_with_a_file_that_cannot_be_used(configure, tmp_path, text):
    path, before = tmp_path / "no.yml" if text is None else configure(text), exporters()
    with pytest.raises(WebConfigError, match=f"{path}"):
        MetricsServer(trained_aggregator(), port=0, web_config_file=path)
    assert exporters() == before


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "basic_auth_users: {}\nhttp_server_config:\n", "rate_limit: {interval: 0, burst: 0}\n"]
    + ["rate_limit: {interval: 0s}\n", "tls_server_config:\n"],
)
def test_an_empty_file_changes_nothing(configure, text):
    file = WebConfigFile(configure(text))
    assert file.context is None
    assert (file.current.users, file.current.headers, file.current.rate_limit) == ({}, {}, None)


def test_only_clients_with_the_right_certificate_get_in(serve, tmp_path):
    server = serve(VERIFIED + '  client_allowed_sans: ["prometheus.example", "b@example.org"]\n')
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
    text = IF_GIVEN.replace("ca.pem", "prometheus.pem")
    server = serve(
        text.replace("VerifyClientCertIfGiven", "RequireAndVerifyClientCert") + '  client_allowed_sans: ["0:0::1"]\n'
    )
    assert ask(server.url, tls=client_context(tmp_path / "ca.pem", tmp_path / "prometheus.pem")).status == 200
    with pytest.raises(OSError):
        ask(server.url, tls=client_context(tmp_path / "ca.pem", tmp_path / "other.pem"))


def version(url: str, context: ssl.SSLContext) -> str:
    with hold(urlsplit(url).port, b"", context) as client:
        return client.version()


def http_version(url: str, authority: Path) -> str:
    command = ["curl", "-sS", "--http2", "--cacert", authority, "-o", os.devnull, "-w", "%{http_code} %{http_version}"]
    return subprocess.run([*command, url], check=True, capture_output=True, text=True).stdout


def test_http_2_is_spoken_unless_it_is_switched_off(serve, tmp_path):
    server = serve(IF_GIVEN)
    assert http_version(server.url, tmp_path / "ca.pem") == "200 2"
    with pytest.raises(OSError):  # it may have no certificate, but not a wrong one
        ask(server.url, tls=client_context(tmp_path / "ca.pem", tmp_path / "stranger.pem"))
    server = serve(TLS + "http_server_config: {http2: false}\n")
    assert http_version(server.url, tmp_path / "ca.pem") == "200 1.1"


def test_users_need_their_password_everywhere(serve):
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n  bob: {BOB}\n")
    for path in ("/", "/metrics", "/-/healthy", "/-/ready", "/nowhere"):
        answer = ask(server.url, path)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="metrics"')
        assert b"ppo" not in answer.body
    for user, password, status in [
        ("alice", "secret", 200),
        ("bob", "пароль:s", 200),
        ("alice", "Secret", 401),
        ("bob", "secret", 401),
        ("carol", "secret", 401),  # is compared with somebody's hash, but is not that somebody
        ("dave", "пароль:s", 401),
        ("alice", "", 401),
        ("", "secret", 401),
        ("alice", "secret\0", 401),
        ("alice", "\0" + "s" * 5000, 401),
    ]:
        for _ in range(2):  # the second answer is remembered
            assert ask(server.url, Authorization=basic(user, password)).status == status, (user, password)
    for header in ("Basic", "Basic !", "Basic YWxpY2U=", "Bearer secret", basic("alice", "secret")[6:]):
        assert ask(server.url, Authorization=header).status == 401
    assert ask(server.url, Authorization=basic("alice", "secret").replace("Basic", "Bearer")).status == 401
    assert ask(server.url, Authorization=basic("alice", "secret").replace("Basic", "bASIC")).status == 200


def test_time_does_not_tell_who_is_known_and_who_guesses_keeps_nobody_out(serve):
    server = serve(f"basic_auth_users:\n  alice: {SLOW}\n", max_requests=1)

    def seconds(user: str, password: str, status: int) -> float:
        started = time.perf_counter()
        assert ask(server.url, Authorization=basic(user, password)).status == status
        return time.perf_counter() - started

    seconds("alice", "secret", 200)
    wrong, unknown = (min(seconds(user, password, 401) for password in "abc") for user in ("alice", "nobody"))
    assert unknown > wrong / 4
    assert min(seconds("alice", "secret", 200) for _ in range(3)) < wrong / 4  # remembered

    guess = "GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n\r\n"
    guesses = [hold(server.port, guess.format(basic("alice", f"guess {number}")).encode()) for number in range(10)]
    seconds("alice", "secret", 200)
    assert not select.select(guesses[-1:], [], [], 0)[0]  # it was not after all of them
    for client in guesses:
        client.close()


def test_headers_and_rate_limit(serve):
    server = serve(
        "http_server_config:\n  headers:\n    X-Frame-Options: deny\n    Strict-Transport-Security: max-age=1\n"
        "    X-XSS-Protection: ''\n"
        "rate_limit:\n  interval: 1h0m0.5s\n  burst: 3\n"
    )
    answers = [ask(server.url, path) for path in ("/metrics", "/", "/nowhere", "/metrics")]
    assert [answer.status for answer in answers] == [200, 200, 404, 429]
    assert answers[3].headers["Retry-After"]
    for answer in answers:
        assert answer.headers["X-Frame-Options"] == "deny"
        assert answer.headers["Strict-Transport-Security"] == "max-age=1"
        assert "X-XSS-Protection" not in answer.headers


def test_users_and_certificate_are_read_again(serve, configure, tmp_path, capfd):
    text = TLS + f"basic_auth_users:\n  alice: {ALICE}\n"
    server = serve(text)
    old, new = client_context(tmp_path / "ca.pem"), client_context(make_certificate(tmp_path / "renewed.pem"))
    alice, bob = basic("alice", "secret"), basic("bob", "пароль:s")
    assert ask(server.url, tls=old, Authorization=alice).status == 200

    log = ""

    def is_logged() -> bool:
        nonlocal log
        log += capfd.readouterr().err
        return "the previous configuration stays in use" in log

    configure(text + "rate_limit: 5\n")
    wait_until(is_logged, "it is found broken", 5)
    assert f"{tmp_path}/web.yml: rate_limit: must be" in log
    assert ask(server.url, tls=old, Authorization=alice).status == 200

    configure(text.replace(f"alice: {ALICE}", f"bob: {BOB}"))
    os.replace(tmp_path / "renewed.key", tmp_path / "server.key")
    os.replace(tmp_path / "renewed.pem", tmp_path / "server.pem")

    def renewed() -> Answer | None:
        with contextlib.suppress(ssl.SSLCertVerificationError):
            return ask(server.url, tls=new, Authorization=bob)

    assert wait_until(renewed, "the new certificate is served", 5).status == 200
    assert ask(server.url, tls=new, Authorization=alice).status == 401


def test_a_new_version_that_opens_or_breaks_something_is_not_taken(configure, tmp_path, caplog):
    text = VERIFIED + f"basic_auth_users:\n  alice: {ALICE}\n"
    news = {
        "": "restart to switch",
        VERIFIED: "restart to switch",
        text.replace(TLS, TLS + "  min_version: TLS13\n"): "restart to switch",
        text.replace("RequireAnd", "").replace("ClientCert", "ClientCertIfGiven"): "restart to switch",
        text.replace("ca.pem", "stranger.pem"): "restart to switch",
        text.replace("server.key", "ca.key"): "KEY_VALUES_MISMATCH",
        text + "rate_limit: 5\n": "rate_limit: must be",
        text.replace("server.pem", "gone.pem"): "cert_file: must be a file that is there",
    }
    files = [WebConfigFile(configure(text, f"{number}.yml")) for number in range(len(news))]
    before = [file.current for file in files]
    for number, new in enumerate(news):
        configure(new, f"{number}.yml")
    wait_until(lambda: len(caplog.records) == len(news), "each is logged once", 5)
    messages = sorted(record.message for record in caplog.records)
    for number, (message, reason) in enumerate(zip(messages, news.values(), strict=True)):
        assert message.startswith(f"{tmp_path}/{number}.yml: ") and reason in message
        assert message.endswith("; the previous configuration stays in use")
    assert [file.current for file in files] == before


def test_a_file_system_that_does_not_answer_keeps_nobody_out(serve, tmp_path, capfd):
    server = serve(f"basic_auth_users:\n  alice: {ALICE}\n")
    (tmp_path / "web.yml").unlink()
    os.mkfifo(tmp_path / "web.yml")  # whose reader waits for a writer, and then for its end

    def writer() -> int | None:
        with contextlib.suppress(OSError):  # while nobody reads
            return os.open(tmp_path / "web.yml", os.O_WRONLY | os.O_NONBLOCK)

    waiting = wait_until(writer, "it is being read", 5)
    assert ask(server.url).status == 401
    assert ask(server.url, Authorization=basic("alice", "secret")).status == 200
    os.close(waiting)
    wait_until(lambda: "restart to switch" in capfd.readouterr().err, "it opens nothing", 5)
    assert ask(server.url).status == 401


def test_node_exporter_takes_the_same_file_and_does_the_same(serve, tmp_path, node_exporter):
    ours = serve(
        VERIFIED + "  min_version: TLS12\n  max_version: TLS12\n"
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
                assert version(each, tls) == "TLSv1.2"
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
