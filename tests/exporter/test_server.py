"""The endpoint as its clients see it: what they get, and how little they can do to it."""

import base64
import contextlib
import gc
import gzip
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from pathlib import Path

import bcrypt
import pytest
from conftest import wait_until
from endpoint import UPDATE, ask, client_context, hold, make_certificate, resources, trained_aggregator

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.health import STALLED_SECONDS
from exporter.metrics import build_collectors
from exporter.snapshot import Snapshot
from exporter.web import connections
from exporter.web import exposition as exposition_module
from exporter.web.connections import Request, Response
from exporter.web.exposition import DEFAULT_FORMAT, Exposition

TEXT = "text/plain; version=0.0.4; charset=utf-8"
TEXT_1 = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with MetricsServer(trained_aggregator(), port=0) as server:
        yield server.url


def protected(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A client's side of TLS, and the web configuration file of the server's."""
    certificate, file = make_certificate(folder / "server.pem"), folder / "web.yml"
    file.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}\n")
    return client_context(certificate), file


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/-/healthy", 200),
        ("GET", "/-/ready", 200),
        ("HEAD", "/-/ready", 200),
        ("GET", "/metrics?x=%FF&name[", 200),
        ("GET", "http://somewhere/-/healthy", 200),
        ("GET", "/healthy", 404),
        ("GET", "/metrics/", 404),
        ("POST", "/nowhere", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/-/healthy", 405),
    ],
)
def test_each_path_says_what_it_is(url, method, path, status):
    answer = ask(url, path, method)
    assert answer.status == status
    assert (answer.headers["Allow"] == "GET, HEAD") == (status == 405)
    assert "Server" not in answer.headers
    assert bool(answer.body) == (method != "HEAD")
    assert int(answer.headers["Content-Length"]) > 0


def test_ready_from_the_first_update_until_updates_stall():
    aggregator = RunAggregator()
    with MetricsServer(aggregator, port=0) as server:

        def ready() -> tuple[int, str]:
            answer = ask(server.url, "/-/ready")
            return answer.status, answer.text

        assert ready() == (503, "Not ready.\nno run yet\n")
        aggregator.register_run("r", ["op", "slot"])
        assert ready() == (503, "Not ready.\nrun r: no update yet\n")
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        assert ready() == (200, "Ready.\n")
        emit_ppo_update(UPDATE, run="r", handler=aggregator, timestamp_seconds=time.time() - STALLED_SECONDS - 20)
        status, text = ready()
        assert status == 503
        assert "run r: no update for 32" in text
        assert ask(server.url, "/-/healthy").status == 200


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", OPENMETRICS.replace("underscores", "allow-utf-8")),
        ("application/openmetrics-text;version=0.0.1", "application/openmetrics-text; version=0.0.1; charset=utf-8"),
        ("text/plain;version=1.0.0", TEXT_1),
        ("Application/OpenMetrics-Text; Version=1.0.0;q=0.5, text/plain;q=0.4", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0.2, text/plain;version=0.0.4;q=0.3, */*;q=0.1", TEXT),
        ("*/*, application/openmetrics-text;version=1.0.0", OPENMETRICS),
        ("application/openmetrics-text;q=0", TEXT),
        # Whatever else a header says, it is an answer that is due.
        ("application/openmetrics-text;version=abc", TEXT),
        ("application/openmetrics-text;version=9.9.9, text/plain;version=1.0.0;q=0.1", TEXT_1),
        ("application/openmetrics-text;q=high", TEXT),
        ("application/openmetrics-text;q=nan", TEXT),
        (";;;,,=;q=,/;\"", TEXT),
        ("text/plain;version=1.0.0;escaping=\"nonsense\"", TEXT_1),
    ],
)  # fmt: skip
def test_the_format_that_is_liked_best_is_sent(url, accept, content_type):
    answer = ask(url, Accept=accept)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    assert answer.text.endswith("# EOF\n") == ("openmetrics" in content_type)
    assert answer.text.count("# EOF") == ("openmetrics" in content_type)


@pytest.mark.parametrize(
    ("accept_encoding", "is_compressed"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=1.0, identity;q=0.5", True),
        ("gzip;q=0.4, identity;q=0.5", False),
        ("gzip;q=0", False),
        ("gzip;q=0, *", False),
        ("gzip;q=often", False),
        ("identity", False),
        ("br", False),
        ("", False),
    ],
)
def test_gzip_is_sent_to_those_who_want_it(url, accept_encoding, is_compressed):
    answer = ask(url, Accept_Encoding=accept_encoding)
    assert (answer.headers["Content-Encoding"] == "gzip") == is_compressed
    text = gzip.decompress(answer.body) if is_compressed else answer.body
    assert b"ppo_gradient_cv{" in text


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text"])
def test_names_choose_samples(url, accept):
    query = (
        "?name[]=ppo_gradient_cv&name[]=ppo_updates_total&name[]=ppo_gradient_cv_per_step_count&name%5B%5D=python_info"
    )
    lines = ask(url, f"/metrics{query}", Accept=accept).text.splitlines()
    samples = {line.partition("{")[0] for line in lines if not line.startswith("#")}
    assert samples == {"ppo_gradient_cv", "ppo_updates_total", "ppo_gradient_cv_per_step_count", "python_info"}
    whole = ask(url, "/metrics?name[]=ppo_gradient_cv_per_step", Accept=accept).text
    assert 'ppo_gradient_cv_per_step_bucket{le="+Inf",run="r"} 1.0' in whole
    assert ask(url, "/metrics?name[]=nothing", Accept=accept).text.strip() in ("", "# EOF")


def test_a_collector_that_fails_takes_only_its_own_metrics_with_it(caplog):
    aggregator = trained_aggregator()
    intact = aggregator.snapshot
    with MetricsServer(aggregator, port=0) as server:
        aggregator.snapshot = Snapshot(runs={"r": None})
        for _ in range(2):
            answer = ask(server.url)
            assert answer.status == 200
            assert "ppo_gradient_cv{" not in answer.text
            assert "process_cpu_seconds_total" in answer.text
            assert 'ppo_exporter_collector_success{collector="run"} 0.0' in answer.text
            assert 'ppo_exporter_collector_success{collector="process"} 1.0' in answer.text
            assert 'ppo_exporter_collector_duration_seconds{collector="run"} ' in answer.text
        assert [record.message for record in caplog.records].count(
            "collector run failed; its metrics are missing until it works again"
        ) == 1
        aggregator.snapshot = intact
        answer = ask(server.url)
        assert "ppo_gradient_cv{" in answer.text
        assert 'ppo_exporter_collector_success{collector="run"} 1.0' in answer.text


def test_a_page_that_fails_is_logged_once_and_takes_nothing_with_it(caplog):
    def fail(request: Request) -> Response:
        raise RuntimeError

    with MetricsServer(trained_aggregator(), port=0, handlers={"/fails": fail}) as server:
        assert [ask(server.url, path).status for path in ("/fails", "/fails", "/metrics", "/fails")] == [500, 500, 200, 500]
    assert [record.message for record in caplog.records] == ["/fails cannot be answered until this works again"]


def test_where_the_cpu_is_short_what_was_said_a_moment_ago_must_do(monkeypatch):
    monkeypatch.setattr(exposition_module, "OLD_SECONDS", 3600.0)
    aggregator = trained_aggregator()
    exposition = Exposition(build_collectors(aggregator), {})

    def updates(will_take_old: bool) -> bytes:
        body = exposition.render(DEFAULT_FORMAT, will_take_old=will_take_old).plain
        return re.search(rb"^ppo_updates_total.* (\S+)$", body, re.MULTILINE)[1]

    assert updates(True) == b"1.0"
    emit_ppo_update(UPDATE, run="r", handler=aggregator)
    assert (updates(True), updates(False), updates(True)) == (b"1.0", b"2.0", b"2.0")
    emit_ppo_update(UPDATE, run="r", handler=aggregator)
    monkeypatch.setattr(exposition_module, "OLD_SECONDS", 0.0)
    assert updates(True) == b"3.0"


def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(url):
    client = hold(int(url.split(":")[2].split("/")[0]), b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n" * 3, None)
    with client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: client.recv(65536), b""))
    assert [line for line in answers.split(b"\r\n") if line.startswith(b"HTTP/")] == [
        *[b"HTTP/1.1 404 Not Found"] * 3,
        b"HTTP/1.1 200 OK",
    ]
    assert answers.endswith(b"Healthy.\n")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_who_has_said_all_it_has_to_say_is_answered_all_the_same(tmp_path, scheme, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 600.0)  # there is nothing to wait for
    tls, file = protected(tmp_path) if scheme == "https" else (None, None)
    with MetricsServer(trained_aggregator(), port=0, web_config_file=file) as server:
        with hold(server.port, b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n", tls) as client:
            if tls is None:
                client.shutdown(socket.SHUT_WR)
            else:
                client.setblocking(False)
                with pytest.raises(ssl.SSLWantReadError):
                    client.unwrap()  # says so, and does not wait for the same from the other side
                client.settimeout(20)
            answer = b""
            with contextlib.suppress(ssl.SSLZeroReturnError):  # both have said so
                while received := client.recv(65536):
                    answer += received
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"Healthy.\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello from TLS\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000, 431),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000 + b"\r\n\r\n", 431),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n" + b"a" * 99_999, 405),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\nExpect: 100-continue\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 9999, 200),
        (b"GET /metrics?" + b"&name[]=a" * 1500 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_what_is_refused_or_not_read_to_its_end_is_answered_and_ends_the_connection(url, request_, status):
    with hold(int(url.split(":")[2].split("/")[0]), request_, None) as client:
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert ask(url).status == 200


def slow_reader(port: int, head: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n") -> socket.socket:
    """Asks 400 times, and has no room for the answers."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    client.sendall((head + b"\r\n") * 400)
    return client


def test_who_reads_slowly_gets_everything_in_order(url, monkeypatch):
    monkeypatch.setattr(connections, "CPU_SHARE", 100.0)
    with slow_reader(int(url.split(":")[2].split("/")[0])) as client:
        client.settimeout(20)
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(65536), b""))
    *scrapes, last = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(scrapes) == 400 and last.endswith(b"Healthy.\n")
    for head, _, body in (scrape.partition(b"\r\n\r\n") for scrape in scrapes):
        assert f"Content-Length: {len(body)}\r\n".encode() in head


HEAD = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        HEAD.replace(b"/metrics", b"/metrics?name[]=ppo_gradient_cv") + b"\r\n",
        HEAD + b"Accept: " + b"a/b;q=0.5," * 1500 + b"\r\n\r\n",
        HEAD.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2000,
        HEAD.replace(b"/metrics", b"/nowhere") + b"\r\n",
        b"\0" * 1000,
    ],
    ids=["names", "long accept", "chunks", "small", "junk"],
)
def test_clients_take_no_more_of_the_cpu_than_their_share(request_):
    def attack(port: int, ended: threading.Event) -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError), hold(port, request_ * 20, None) as client:
                client.settimeout(0.5)
                while client.recv(1 << 20) and not ended.is_set():
                    client.sendall(request_)

    def seconds(thread: int) -> float:
        """Of CPU time that the thread has used."""
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    others = set(threading.enumerate())
    with MetricsServer(trained_aggregator(), port=0) as server:
        (thread,) = (each.native_id for each in set(threading.enumerate()) - others)
        ended, started, before = threading.Event(), time.monotonic(), seconds(thread)
        with ThreadPoolExecutor(30) as clients:
            for _ in range(30):
                clients.submit(attack, server.port, ended)
            time.sleep(4.0)
            used = seconds(thread) - before
            allowed = connections.CPU_SHARE * (time.monotonic() - started) + connections.CPU_BURST_SECONDS
            kept = [len(each._http.trailing_data[0]) for each in tuple(server._server.connections)]
            ended.set()
        assert used < allowed + 0.05  # for the spell that may be under way
        assert max(kept, default=0) <= 2 * connections.MAX_HEADER_BYTES
    assert not [each for each in set(threading.enumerate()) - others if each.name == "metrics-server"]


def test_scrapes_beyond_the_limit_are_sent_away_and_nothing_else_counts(tmp_path):
    (file := tmp_path / "web.yml").write_text(f"basic_auth_users:\n  a: {bcrypt.hashpw(b'b', bcrypt.gensalt(4)).decode()}\n")
    header = {"Authorization": "Basic " + base64.b64encode(b"a:b").decode()}

    def not_reading(port: int, path: bytes, authorization: str) -> socket.socket:
        return slow_reader(port, b"GET %b HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\n" % (path, authorization.encode()))

    with MetricsServer(trained_aggregator(), port=0, max_requests=3, web_config_file=file) as server:
        scrape = partial(ask, server.url, **header)
        assert scrape().status == 200
        others = [not_reading(server.port, b"/metrics", "") for _ in range(5)]
        others += [not_reading(server.port, b"/", header["Authorization"]) for _ in range(5)]
        assert [scrape().status for _ in range(20)] == [200] * 20
        readers = [not_reading(server.port, b"/metrics", header["Authorization"]) for _ in range(3)]
        answer = wait_until(lambda: (a := scrape()).status == 503 and a, "the limit is reached")
        assert answer.headers["Retry-After"] == "1"
        assert ask(server.url, "/-/healthy", **header).status == 200
        for client in readers + others:
            client.close()
        wait_until(lambda: scrape().status == 200, "the limit is free again")


def held_connections(port: int, client: ssl.SSLContext | None) -> list[socket.socket]:
    """Five hundred, of every kind; those that send a byte a second are fed by the test."""
    half = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: te"
    if client is None:
        return [hold(port, request, None) for request in [b"", half, b"G"] for _ in range(167)]
    never_finished = [hold(port, request, None) for request in (b"", b"\x16\x03\x01\x02\x00\x01") for _ in range(150)]
    return never_finished + [hold(port, request, client) for request in (b"", half) for _ in range(100)]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_held_connections_are_closed_and_keep_nobody_from_scraping(tmp_path, scheme):
    tls, file = protected(tmp_path) if scheme == "https" else (None, None)
    with MetricsServer(trained_aggregator(), port=0, web_config_file=file) as server:
        assert ask(server.url, tls=tls).status == 200
        threads, descriptors = resources()
        held = held_connections(server.port, tls)
        closed: set[socket.socket] = set()

        def all_are_closed() -> bool:
            for client in held:
                if client not in closed:
                    try:
                        if select.select([client], [], [], 0)[0] and not client.recv(1024):
                            closed.add(client)
                        elif client in held[-100:]:
                            client.sendall(b"x")
                    except OSError:
                        closed.add(client)
            assert ask(server.url, tls=tls).status == 200
            now_threads, now_descriptors = resources()
            assert now_threads <= threads + 1
            assert now_descriptors - len(held) <= descriptors + connections.MAX_CONNECTIONS + 2
            return len(closed) == len(held)

        wait_until(all_are_closed, "all held connections are closed", 30)
        for client in held:
            client.close()
        wait_until(lambda: resources()[1] <= descriptors, "their descriptors are free")


def test_an_answer_that_took_long_keeps_others_waiting_for_seconds_only(monkeypatch):
    monkeypatch.setattr(connections, "CPU_SHARE", 1e-6)
    monkeypatch.setattr(connections, "_LONGEST_PAUSE_SECONDS", 0.5)

    def work(request: Request) -> Response:
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            pass
        return Response.text(HTTPStatus.OK, "done")

    with MetricsServer(trained_aggregator(), port=0, handlers={"/work": work}) as server:
        for path in ("/work", "/work", "/-/healthy"):
            assert ask(server.url, path).status == 200


def test_who_asks_and_takes_no_answer_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    with MetricsServer(trained_aggregator(), port=0) as server:
        readers = [slow_reader(server.port) for _ in range(15)]
        assert ask(server.url, "/-/healthy").status == 200
        for client in readers:
            client.close()


def test_the_connection_that_has_waited_longest_makes_room(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    with MetricsServer(trained_aggregator(), port=0) as server:
        held = [hold(server.port, b"GET", None) for _ in range(30)]
        assert ask(server.url).status == 200
        closed = [bool(select.select([client], [], [], 0)[0]) for client in held]
        assert closed == [True] * 21 + [False] * 9
        for client in held:
            client.close()


def test_who_has_just_been_answered_is_not_who_makes_room(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    request = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
    with MetricsServer(trained_aggregator(), port=0) as server:
        held = [hold(server.port, b"", None) for _ in range(10)]

        def answers(client: socket.socket) -> bool:
            client.sendall(request)
            return client.recv(1024).startswith(b"HTTP/1.1 200")

        assert answers(held[0])
        held.append(hold(server.port, b"", None))
        assert answers(held[-1])
        assert held[1].recv(1024) == b""
        assert answers(held[0])
        for client in held:
            client.close()


def test_a_forked_child_does_not_hold_the_port_or_the_clients():
    server = MetricsServer(trained_aggregator(), port=0)
    client = hold(server.port, b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n", None)
    assert client.recv(1024).startswith(b"HTTP/1.1 200")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        server.close()
        os.read(reading, 1)
        os._exit(0)
    try:
        assert ask(server.url).status == 200
        server.close()
        assert client.recv(1024) == b""
        MetricsServer(RunAggregator(), port=server.port).close()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        client.close()
        os.close(reading)
        os.close(writing)


def test_a_child_forked_in_a_storm_of_clients_holds_none_of_their_connections():
    def storm(port: int, ended: threading.Event) -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                hold(port, b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n", None).close()

    def sockets_of(port: int) -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
                count += copy.getsockname()[1:2] == (port,)
        return count

    with MetricsServer(trained_aggregator(), port=0) as server, ThreadPoolExecutor(4) as clients:
        ended, statuses = threading.Event(), []
        for _ in range(4):
            clients.submit(storm, server.port, ended)
        for _ in range(50):
            child = os.fork()
            if child == 0:
                os._exit(min(sockets_of(server.port), 100))
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        ended.set()
        assert statuses == [0] * 50
        assert ask(server.url).status == 200


def test_connections_end_without_the_garbage_collector():
    gc.collect()  # what other tests' servers have left
    gc.disable()
    try:
        with MetricsServer(trained_aggregator(), port=0) as server:
            for _ in range(20):
                for request in (b"junk\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
                    with hold(server.port, request, None) as client:
                        assert b"".join(iter(lambda: client.recv(65536), b""))

            def alive() -> int:
                return sum(type(each).__name__ == "_Connection" for each in gc.get_objects())

            wait_until(lambda: alive() <= 1, "their objects are gone", 10)  # the loop still holds its last timer
    finally:
        gc.enable()


def test_no_address_is_not_every_address():
    with pytest.raises(OSError, match="no address"):
        MetricsServer(RunAggregator(), address="", port=0)


def test_closing_ends_thread_and_descriptors(tmp_path: Path):
    MetricsServer(RunAggregator(), port=0).close()
    before = resources()
    for _ in range(5):
        server = MetricsServer(trained_aggregator(), port=0)
        with hold(server.port, b"GET /me", None):
            assert ask(server.url).status == 200
            server.close()
            server.close()
    assert resources() == before
