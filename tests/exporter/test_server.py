"""The endpoint from its clients' side: what they get, and that they cannot harm it."""

import contextlib
import gc
import gzip
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
from conftest import wait_until
from endpoint import UPDATE, ask, client_context, hold, make_certificate, trained_aggregator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.health import STALLED_SECONDS

TEXT = "text/plain; version=0.0.4; charset=utf-8"
TEXT_1 = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"
GET_HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of an endpoint with two runs, `r` and `s`."""
    aggregator = trained_aggregator()
    aggregator.register_run("s", ["op"])
    emit_ppo_update(UPDATE, run="s", handler=aggregator)
    with MetricsServer(aggregator, port=0) as server:
        yield server.url


def values(text: str) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/-/healthy", 200),
        ("GET", "/-/ready", 200),
        ("HEAD", "/-/ready", 200),
        ("GET", "/metrics?x=%FF&name[", 200),
        ("GET", "/metrics?" + "&name[]=a" * 1500, 400),
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


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", TEXT),
        ("application/openmetrics-text", OPENMETRICS.removesuffix("; escaping=underscores")),
        ("application/openmetrics-text;version=1.0.0;escaping=dots", OPENMETRICS.replace("underscores", "dots")),
        ("text/plain;version=1.0.0", TEXT_1),
        ("Application/OpenMetrics-Text; Version=1.0.0;q=0.5, text/plain;q=0.4", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0.2, text/plain;version=0.0.4;q=0.3, */*;q=0.1", TEXT),
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
    assert answer.text.count("# EOF") == answer.text.endswith("# EOF\n") == ("openmetrics" in content_type)


@pytest.mark.parametrize(
    ("accept_encoding", "is_compressed"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip;q=1.0, identity;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0, identity", False),
        ("gzip;q=often", False),
        ("identity", False),
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


@pytest.mark.parametrize(
    ("query", "runs"), [("run=r", {"r"}), ("run=s&name[]=ppo_updates_total", {"s"}), ("run=r&run=s", {"r", "s"})]
)
def test_runs_choose_samples(url, query, runs):
    text = ask(url, f"/metrics?{query}").text
    assert set(re.findall(r'^ppo_updates_total{run="(.*)"} ', text, re.MULTILINE)) == runs
    assert set(re.findall(r'[{,]run="(.*?)"', text)) == runs
    assert ("process_cpu_seconds_total" in text) == ("name" not in query)


def test_an_unknown_run_is_not_found(url):
    answer = ask(url, "/metrics?run=r&run=other")
    assert (answer.status, answer.text) == (404, "There is no run other here.\n")


def test_ready_from_the_first_update_until_updates_stall():
    aggregator = RunAggregator()
    with MetricsServer(aggregator, port=0) as server:

        def ready() -> tuple[int, str]:
            server.flush()
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


def test_a_run_whose_updates_take_minutes_is_ready_for_longer(monkeypatch):
    aggregator = trained_aggregator(timestamp_seconds=time.time() - 760)
    end = time.monotonic() + 360
    with monkeypatch.context() as patch:
        patch.setattr("exporter.aggregator.time.monotonic", lambda: end)
        emit_ppo_update(UPDATE, run="r", handler=aggregator, timestamp_seconds=time.time() - 400)
    with MetricsServer(aggregator, port=0) as server:
        assert ask(server.url, "/-/ready").status == 200


class Failing(Collector):
    """Raises until `is_failing` is taken away."""

    is_failing = True

    def collect(self) -> list[prometheus_client.Metric]:
        if self.is_failing:
            raise RuntimeError("out of order")
        return []


def test_metrics_of_a_users_own_are_served_beside_ours_and_take_none_with_them_when_they_fail(caplog):
    own = CollectorRegistry()
    Counter("frames", "Frames\nrendered", ["level"], registry=own).labels('a"\\b').inc(3)
    Histogram("latency_seconds", "Of an environment", registry=own).observe(0.2)
    Info("code", "What runs", registry=own).info({"commit": "abc"})
    (rate := Gauge("rate", "NaN at first", registry=own)).set(float("nan"))
    with MetricsServer(trained_aggregator(), port=0, registry=own) as server:
        text = ask(server.url).text
        assert generate_latest(own).decode() in text
        assert 'ppo_exporter_collector_success{collector="registry"} 1.0' in text
        assert ask(server.url, "/metrics?name[]=rate&run=r").text.endswith("\nrate NaN\n")

        own.register(failing := Failing())
        for _ in range(2):
            server.flush()
            text = ask(server.url).text
            assert "rate" not in values(text) and "ppo_gradient_cv{" in text and "process_cpu_seconds_total" in text
            assert 'ppo_exporter_collector_success{collector="registry"} 0.0' in text
            assert 'ppo_exporter_collector_success{collector="run"} 1.0' in text
        (record,) = caplog.records
        assert "cannot be read" in record.message and "out of order" in record.exc_text

        failing.is_failing = False
        rate.set(2)
        wait_until(lambda: "\nrate 2.0\n" in ask(server.url).text, "it is read again, with no new snapshot", 5)


def test_metrics_of_a_users_own_that_are_ours_too_are_served_once():
    with MetricsServer(trained_aggregator(), port=0, registry=prometheus_client.REGISTRY) as server:
        families = re.findall(r"^# TYPE (\S+)", ask(server.url).text, re.MULTILINE)
    assert len(families) == len(set(families))
    assert {"python_gc_collections_total", "process_cpu_seconds_total", "ppo_gradient_cv"} <= set(families)


def test_the_process_that_is_told_of_is_the_one_that_trains():
    aggregator = trained_aggregator()
    with MetricsServer(aggregator, port=0) as server:
        before = gc.get_stats()
        gc.collect()
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        server.flush()
        after, scraped = gc.get_stats(), values(ask(server.url).text)
    own = {
        sample.name: sample.value for metric in ProcessCollector(registry=None).collect() for sample in metric.samples
    }
    assert scraped["process_start_time_seconds",] == own["process_start_time_seconds"]
    assert scraped["process_resident_memory_bytes",] == pytest.approx(own["process_resident_memory_bytes"], rel=0.1)
    for generation in "012":
        told = scraped["python_gc_collections_total", generation]
        assert before[int(generation)]["collections"] <= told <= after[int(generation)]["collections"]
    assert scraped["python_gc_collections_total", "2"] > before[2]["collections"]


def test_a_websocket_is_refused(url):
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    request += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
    with hold(port_of(url), request) as client:
        assert client.recv(1024).startswith(b"HTTP/1.1 403 ")


def port_of(url: str) -> int:
    return int(url.split(":")[2].partition("/")[0])


def test_every_ipv6_address_is_every_ipv4_address_too():
    if not socket.has_dualstack_ipv6():
        pytest.skip("IPv6 alone, or not at all")
    with MetricsServer(trained_aggregator(), address="::", port=0) as server:
        for host in ("127.0.0.1", "[::1]"):
            assert ask(f"http://{host}:{server.port}").status == 200


def test_no_address_is_not_every_address():
    with pytest.raises(OSError, match="no address"):
        MetricsServer(RunAggregator(), address="", port=0)


def slow_reader(port: int, path: bytes = b"/metrics", requests: int = 400, buffer: int = 2048) -> socket.socket:
    """By default it asks so often that the answers, which it does not take, fill every buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path * requests)
    return client


def test_scrapes_beyond_the_limit_are_sent_away_and_nothing_else_counts():
    with MetricsServer(trained_aggregator(), port=0, max_requests=1) as server:
        readers = [slow_reader(server.port, b"/")]
        assert [ask(server.url).status for _ in range(10)] == [200] * 10
        readers.append(slow_reader(server.port))
        answer = wait_until(lambda: (a := ask(server.url)).status == 503 and a, "the limit is reached")
        assert answer.headers["Retry-After"] == "1"
        assert ask(server.url, "/-/healthy").status == 200
        for client in readers:
            client.close()
        wait_until(lambda: ask(server.url).status == 200, "the limit is free again")


class LongStory(Collector):
    """So much that no buffer takes it."""

    def collect(self) -> list[prometheus_client.Metric]:
        return [GaugeMetricFamily("story", "x" * 8_000_000, 1)]


def test_held_connections_are_closed_and_keep_nobody_from_scraping(tmp_path):
    certificate, file = make_certificate(tmp_path / "server.pem"), tmp_path / "web.yml"
    file.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}\n")
    tls, aggregator, held, trickling = client_context(certificate), trained_aggregator(), [], []
    with contextlib.ExitStack() as stack:
        long = stack.enter_context(MetricsServer(aggregator, port=0, max_requests=1, registry=LongStory()))
        http = stack.enter_context(MetricsServer(aggregator, port=0))
        https = stack.enter_context(MetricsServer(aggregator, port=0, web_config_file=file))

        def status_beside_a_slow_reader() -> int:
            with contextlib.suppress(ConnectionResetError):
                slow.recv(1 << 15)
            return ask(long.url, "/metrics?name[]=ppo_updates_total").status

        def all_are_closed() -> bool:
            is_closed = connections(http.port, https.port) == 0  # before a scrape opens another one
            for url, context in ((http.url, None), (https.url, tls)):
                started = time.monotonic()
                assert ask(url, tls=context).status == 200
                assert time.monotonic() - started < 5.0
            for client in trickling:
                with contextlib.suppress(OSError):
                    client.sendall(b"x")
            return status_beside_a_slow_reader() == 200 and is_closed

        slow = stack.enter_context(slow_reader(long.port, requests=1, buffer=1 << 16))
        wait_until(lambda: status_beside_a_slow_reader() == 503, "the one who reads bit by bit has the only place")
        half = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: te"
        for _ in range(10):
            held += [hold(http.port, start) for start in (b"", half)]
            held += [hold(https.port, start) for start in (b"", b"\x16\x03\x01\x02\x00\x01")]
            held += [hold(https.port, start, tls) for start in (b"", half)]
            trickling += [hold(http.port, b"G"), hold(https.port, b"G", tls)]
        held += trickling + [slow_reader(http.port) for _ in range(5)]
        for client in held:
            stack.enter_context(client)
        assert connections(http.port, https.port) == len(held)
        wait_until(all_are_closed, "all are closed", 12)


def test_a_connection_that_the_client_has_closed_is_let_go():
    with MetricsServer(trained_aggregator(), port=0) as server:
        clients = [hold(server.port, request) for request in (b"", b"GET", GET_HEALTHY) for _ in range(10)]
        assert connections(server.port) == len(clients)
        for client in clients:
            client.close()
        wait_until(lambda: connections(server.port) == 0, "they are closed", 4)


def connections(*ports: int) -> int:
    """Those that servers at these ports have not closed, as the kernel has it: ESTABLISHED, and CLOSE_WAIT."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(state in ("01", "08") and int(local.split(":")[1], 16) in ports for _, local, _, state, *_ in lines)
