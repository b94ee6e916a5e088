"""What the endpoint stands, beside other servers that can live in a thread, and what it costs the training.

`servers` starts each server in a process whose main thread trains a small network, holds connections open (a held
connection that the server closes is opened again), floods it, and scrapes it once a second meanwhile. Servers that are
not installed are left out: `pip install cheroot uvicorn hypercorn granian` into an environment of your own.

`training` times the same updates of the real trainer again and again: with the endpoint scraped once a second, and
flooded by eight clients, in an order that changes from round to round, each between two blocks without the endpoint.
The table gives medians of the ratio of a block's speed to that of its two neighbours, by wall time and by CPU time of
the whole process, which other programs and other guests of the machine disturb less. Its first row, of one block
without the endpoint to the one before, shows how much of that is noise. The trainer has one core, clients another.

    .venv/bin/python -m benchmarks.endpoint --help
"""

import argparse
import asyncio
import http.client
import multiprocessing
import os
import platform
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from prometheus_client import make_asgi_app, make_wsgi_app, start_http_server

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.metrics import build_registry
from exporter.telemetry import GradientStep, summarize_gradient_steps
from trainer.environments.host_growth import ACTION_HEADS

HELD = 500
FLOODING_CLIENTS = 8
PATIENCE = 8.0  # seconds of every timeout that a server has, as the endpoint's own
HALF = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: te"


def aggregator() -> RunAggregator:
    """A run with as many heads as the trainer's, after one update."""
    steps = [GradientStep({head: 1.0 + i for i, head in enumerate(ACTION_HEADS)}, 4.0)]
    runs = RunAggregator()
    emit_ppo_update(summarize_gradient_steps(steps), run="r", handler=runs)
    return runs


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> "Certificate":
        made = cls(folder / "server.pem", folder / "server.key")
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -days 2"
        subprocess.run([*command.split(), "-keyout", made.key, "-out", made.cert], check=True, capture_output=True)
        return made


# Each serves until its process ends.


def serve_ours(port: int, certificate: Certificate | None) -> None:
    file = None
    if certificate is not None:
        file = certificate.cert.with_name("web.yml")
        file.write_text(f"tls_server_config: {{cert_file: {certificate.cert}, key_file: {certificate.key}}}\n")
    MetricsServer(aggregator(), port=port, web_config_file=file)


def serve_prometheus_client(port: int, certificate: Certificate | None) -> None:
    tls = {"certfile": str(certificate.cert), "keyfile": str(certificate.key)} if certificate else {}
    start_http_server(port, "127.0.0.1", build_registry(aggregator()), **tls)


def serve_prometheus_client_bounded(port: int, certificate: Certificate | None) -> None:
    """Its server with 14 threads at most, a timeout, and the handshake in the request's own thread."""
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    from prometheus_client.exposition import ThreadingWSGIServer

    slots = threading.BoundedSemaphore(14)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None:
        context.load_cert_chain(certificate.cert, certificate.key)

    class Handler(WSGIRequestHandler):
        timeout = PATIENCE

        def log_message(self, *args: object) -> None: ...

    class Server(ThreadingWSGIServer):
        def get_request(self) -> tuple:
            connection, address = super().get_request()
            connection.settimeout(PATIENCE)
            if certificate is not None:
                connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, address

        def process_request(self, *request: object) -> None:
            if slots.acquire(blocking=False):
                super().process_request(*request)
            else:
                self.shutdown_request(request[0])

        def process_request_thread(self, *request: object) -> None:
            try:
                super().process_request_thread(*request)
            finally:
                slots.release()

        def handle_error(self, *request: object) -> None: ...

    server = make_server("127.0.0.1", port, make_wsgi_app(build_registry(aggregator())), Server, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def serve_cheroot(port: int, certificate: Certificate | None) -> None:
    from cheroot.ssl.builtin import BuiltinSSLAdapter
    from cheroot.wsgi import Server

    app = make_wsgi_app(build_registry(aggregator()))
    server = Server(("127.0.0.1", port), app, numthreads=14, timeout=PATIENCE, request_queue_size=512)
    server.error_log = lambda *args, **options: None
    if certificate is not None:
        server.ssl_adapter = BuiltinSSLAdapter(str(certificate.cert), str(certificate.key))
    threading.Thread(target=server.start, daemon=True).start()


def serve_uvicorn(port: int, certificate: Certificate | None) -> None:
    import uvicorn

    tls = {"ssl_certfile": certificate.cert, "ssl_keyfile": str(certificate.key)} if certificate else {}
    app = make_asgi_app(build_registry(aggregator()))
    config = uvicorn.Config(
        app, port=port, log_level="critical", timeout_keep_alive=int(PATIENCE), lifespan="off", **tls
    )
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()


def serve_hypercorn(port: int, certificate: Certificate | None) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config.from_mapping(
        bind=f"127.0.0.1:{port}", errorlog=None, keep_alive_timeout=PATIENCE, read_timeout=int(PATIENCE),
        ssl_handshake_timeout=PATIENCE, backlog=512,
    )  # fmt: skip
    if certificate is not None:
        config.certfile, config.keyfile = str(certificate.cert), str(certificate.key)
    app = make_asgi_app(build_registry(aggregator()))

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await serve(app, config, shutdown_trigger=asyncio.Event().wait)

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()


def serve_granian(port: int, certificate: Certificate | None) -> None:
    from granian.constants import Interfaces
    from granian.http import HTTP1Settings
    from granian.server.embed import Server

    tls = {"ssl_cert": certificate.cert, "ssl_key": certificate.key} if certificate else {}
    server = Server(
        make_asgi_app(build_registry(aggregator())), address="127.0.0.1", port=port, interface=Interfaces.ASGI,
        http1_settings=HTTP1Settings(header_read_timeout=int(PATIENCE * 1000)), log_enabled=False, **tls,
    )  # fmt: skip
    threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True).start()


SERVERS: dict[str, Callable[[int, Certificate | None], None]] = {
    "this endpoint": serve_ours,
    "prometheus-client": serve_prometheus_client,
    "prometheus-client, bounded": serve_prometheus_client_bounded,
    "cheroot": serve_cheroot,
    "uvicorn": serve_uvicorn,
    "hypercorn": serve_hypercorn,
    "granian": serve_granian,
}


def host(name: str, port: int, certificate: Certificate | None, report: multiprocessing.Queue) -> None:
    """In a process of its own: serve, train, and say once a second how that goes."""
    pin(0)
    torch.set_num_threads(1)
    try:
        SERVERS[name](port, certificate)
    except ImportError as error:
        return report.put(str(error))
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
    optimizer = torch.optim.Adam(network.parameters())
    batch = torch.randn(64, 64)
    steps, since = 0, time.monotonic()
    while True:
        optimizer.zero_grad()
        (network(batch) - batch).square().mean().backward()
        optimizer.step()
        steps += 1
        if (now := time.monotonic()) - since >= 1.0:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            report.put((steps / (now - since), int(status["Threads"]), int(status["VmRSS"].split()[0]) / 1024))
            steps, since = 0, now


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Held:
    """A connection that is held as long as the server lets it, and then opened again.

    The kind says what is held back: all (idle), a TLS handshake (handshake), the second half of a header (half), or
    all but a byte a second (drip).
    """

    def __init__(self, port: int, kind: str, tls: ssl.SSLContext | None) -> None:
        self._port, self._kind = port, kind
        self._tls = None if kind in ("idle", "handshake") else tls
        self._sock: socket.socket | None = None
        self._opened = 0.0

    @property
    def seconds(self) -> float:
        """For which the connection has been held, as far as it is known that it still is."""
        return time.monotonic() - self._opened if self._sock is not None else 0.0

    def tend(self) -> None:
        """Open what is closed, feed what drips."""
        try:
            if self._sock is None:
                self._opened = time.monotonic()
                self._sock = socket.create_connection(("127.0.0.1", self._port), timeout=2.0)
                if self._tls is not None:
                    self._sock = self._tls.wrap_socket(self._sock)
                if self._kind != "idle":
                    self._sock.sendall(b"\x16\x03\x01\x02\x00" if self._kind == "handshake" else HALF)
                self._sock.setblocking(False)
            else:
                if self._kind == "drip":
                    self._sock.sendall(b"x")
                if not self._sock.recv(1024):
                    raise ConnectionAbortedError
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            if self._sock is not None:
                self._sock.close()
                self._sock = None


def hold(port: int, is_tls: bool, report: multiprocessing.Queue) -> None:
    """In a process of its own: hold connections; says once a second for how long the longest one has been held."""
    pin(1)
    tls = client_tls() if is_tls else None
    kinds = ("idle", "handshake", "half", "drip") if is_tls else ("idle", "half", "drip")
    held = [Held(port, kinds[index % len(kinds)], tls) for index in range(HELD)]
    threads = 10

    def run(number: int) -> None:
        while True:
            until = time.monotonic() + 1.0
            for each in held[number::threads]:
                each.tend()
            time.sleep(max(0.0, until - time.monotonic()))

    for number in range(threads):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    while True:
        time.sleep(1.0)
        report.put(max(each.seconds for each in held))


def scrape_for(port: int, is_tls: bool, seconds: float) -> list[float]:
    """Seconds that each of `seconds` scrapes took, one started every second; infinite where it failed or took 10."""
    tls = client_tls() if is_tls else None
    begin, took = time.monotonic(), []
    for number in range(round(seconds)):
        late = time.monotonic() - begin - number
        time.sleep(max(0.0, -late))
        started = time.monotonic()
        is_missed = late > 1.0  # for the one before took so long
        took.append(float("inf") if is_missed or not scrape(port, tls, 10.0) else time.monotonic() - started)
    return took


def scrape(port: int, tls: ssl.SSLContext | None, timeout: float) -> bool:
    """Whether a scrape on a connection of its own brings the metrics."""
    if tls is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout, context=tls)
    try:
        connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        return bool(response.read()) and response.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def flood(port: int, is_tls: bool, report: multiprocessing.Queue) -> None:
    """In a process of its own: eight clients that scrape without a pause, half of them on a kept connection."""
    pin(1)
    tls = client_tls() if is_tls else None

    def on_new_connections() -> None:
        while True:
            if scrape(port, tls, 10.0):
                report.put(None)
            else:
                time.sleep(0.01)

    def on_one_connection() -> None:
        while True:
            if tls is None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
            else:
                connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10.0, context=tls)
            try:
                while True:
                    connection.request("GET", "/metrics")
                    response = connection.getresponse()
                    response.read()
                    report.put(None)
            except (OSError, http.client.HTTPException):
                connection.close()
                time.sleep(0.01)

    for number in range(FLOODING_CLIENTS):
        target = on_new_connections if number % 2 else on_one_connection
        threading.Thread(target=target, daemon=True).start()
    time.sleep(3600)


@contextmanager
def process(target: Callable, *args: object) -> Iterator[multiprocessing.Queue]:
    """Runs `target` in a process with a queue as its last argument."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=target, args=(*args, queue), daemon=True)
    child.start()
    queue.pid = child.pid
    try:
        yield queue
    finally:
        child.kill()
        child.join()


def drained(queue: multiprocessing.Queue) -> list:
    items = []
    while not queue.empty():
        items.append(queue.get())
    return items


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def named(server: str) -> str:
    """With its version, where it is a package."""
    package, comma, rest = server.partition(",")
    try:
        return f"{package} {version(package)}{comma}{rest}"
    except PackageNotFoundError:
        return server


def measure_server(name: str, certificate: Certificate | None, seconds: float) -> list[str] | None:
    """A row of the table, or None where the server is not installed."""
    is_tls, port = certificate is not None, free_port()
    with process(host, name, port, certificate) as status:
        if isinstance(first := status.get(timeout=60), str):
            print(f"{name}: {first}", file=sys.stderr)
            return None
        tls = client_tls() if is_tls else None
        while not scrape(port, tls, 2.0):
            time.sleep(0.2)
        latencies = []
        for _ in range(50):
            started = time.perf_counter()
            scrape(port, tls, 2.0)
            latencies.append(time.perf_counter() - started)
        with process(flood, port, is_tls) as answered:
            while answered.empty():
                time.sleep(0.1)
            ratios, requests, flooded_scrapes = [], 0, []
            for _ in range(4):
                os.kill(answered.pid, signal.SIGSTOP)
                time.sleep(1.5)
                drained(status), drained(answered)
                alone = statistics.mean(status.get()[0] for _ in range(3))
                os.kill(answered.pid, signal.SIGCONT)
                drained(status)
                flooded_scrapes += scrape_for(port, is_tls, 5)
                ratios.append(statistics.mean(speed for speed, _, _ in drained(status)) / alone)
                requests += len(drained(answered))
        memory = status.get()[2]
        with process(hold, port, is_tls) as longest:
            time.sleep(3.0)
            drained(status)
            scrapes = scrape_for(port, is_tls, seconds)
            states = drained(status)
            held = drained(longest)
        in_time = sum(took <= 1.0 for took in scrapes)
        return [
            named(name),
            "HTTPS" if is_tls else "HTTP",
            f"{statistics.median(latencies) * 1e3:.1f}",
            f"{in_time} of {len(scrapes)}",
            f"{max(scrapes) * 1e3:.0f}" if max(scrapes) < 10 else "failed",
            f"{max(held):.1f}" if max(held) < seconds else "all the time",
            f"{max(threads for _, threads, _ in states)}",
            f"{max(memory_now for _, _, memory_now in states) - memory:+.0f}",
            f"{requests / len(flooded_scrapes):.0f}",
            f"{sum(took <= 1.0 for took in flooded_scrapes)} of {len(flooded_scrapes)}",
            f"{statistics.median(ratios) - 1:+.0%}",
        ]


def compare_servers(options: argparse.Namespace) -> None:
    print(
        "| server | | scrape, ms | scrapes within 1 s, 500 held | slowest, ms | longest held, s | threads | MiB "
        "| flood, answers/s | scrapes within 1 s, flooded | training, flooded |\n|" + "---|" * 11
    )
    with tempfile.TemporaryDirectory() as folder:
        certificate = Certificate.make(Path(folder))
        for name in options.server or SERVERS:
            for tls in (None, certificate):
                row = measure_server(name, tls, options.seconds)
                if row is not None:
                    print(f"| {' | '.join(row)} |", flush=True)


def scrape_every_second(port: int, is_tls: bool, report: multiprocessing.Queue) -> None:
    """In a process of its own: what Prometheus does."""
    pin(1)
    report.put(None)
    while True:
        scrape_for(port, is_tls, 60)


def measure_training(options: argparse.Namespace) -> None:
    from trainer.config import TrainerConfig
    from trainer.training import Training

    pin(0)

    def block(client: Callable | None = None) -> tuple[float, float]:
        """Wall time and the process' CPU time of the same updates, each time a new run with the same seed."""
        training = Training(TrainerConfig(total_timesteps=2**40, run="r", anneal_learning_rate=False))
        with ExitStack() as stack:
            if client is not None:
                server = stack.enter_context(MetricsServer(training.aggregator, port=0))
                stack.enter_context(process(client, server.port, False)).get(timeout=60)
            for _ in range(options.before):
                training.update(lambda: False)
            wall, cpu = time.monotonic(), time.process_time()
            for _ in range(options.updates):
                training.update(lambda: False)
            return time.monotonic() - wall, time.process_time() - cpu

    ways = {"scraped every second": scrape_every_second, f"flooded by {FLOODING_CLIENTS} clients": flood}
    ratios: dict[str, list[tuple[float, float]]] = {"no endpoint": [], **{name: [] for name in ways}}

    def compare(name: str, measured: tuple[float, float], *alone: tuple[float, float]) -> None:
        ratios[name].append(tuple(statistics.mean(times) / time for time, times in zip(measured, zip(*alone))))

    alone = [block()]
    for number in range(options.rounds):
        for name in random.Random(number).sample(list(ways), len(ways)):
            measured = block(ways[name])
            alone.append(block())
            compare(name, measured, *alone[-2:])
            compare("no endpoint", alone[-1], alone[-2])
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    middle = statistics.median(wall for wall, _ in alone)
    print(
        f"{options.rounds} rounds of {options.updates} updates, which take {middle:.1f} s without the endpoint; before "
        f"them, {options.before} that are not timed\n\n"
        "| way | speed | by CPU time | all ratios of speed |\n|---|---|---|---|"
    )
    for name, each in ratios.items():
        speed, by_cpu = (statistics.median(column) for column in zip(*each))
        print(f"| {name} | {speed:.3f} | {by_cpu:.3f} | {' '.join(f'{ratio:.3f}' for ratio, _ in sorted(each))} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoint", description=__doc__.split("\n\n")[0])
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    commands = parser.add_subparsers(required=True)
    servers = commands.add_parser("servers", help="compare servers", **defaults)
    servers.add_argument("--server", action="append", choices=SERVERS, help="only this one; may be given several times")
    servers.add_argument("--seconds", type=float, default=60, help="of scrapes with connections held")
    servers.set_defaults(run=compare_servers)
    training = commands.add_parser("training", help="cost to the real trainer", **defaults)
    training.add_argument("--rounds", type=int, default=10, help="rounds, each with one block of every way")
    training.add_argument("--updates", type=int, default=30, help="updates of a block")
    training.add_argument("--before", type=int, default=3, help="updates before those that are timed")
    training.set_defaults(run=measure_training)
    options = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}\n")
    options.run(options)


if __name__ == "__main__":
    main()
