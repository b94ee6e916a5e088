"""How the endpoint copes with bad clients, and what it costs training.

`servers` scrapes once a second while clients hold connections, which they reopen when the server closes them, and while
another process fills the server's core, as training may. If uvicorn is installed, it gets the same test, with the same
application and niceness. The server has one core, its clients another.

`training` trains with the real trainer on the exporter process' own core, while clients have another. In every other
block of updates it stops the exporter process (SIGSTOP), and its clients wait. It compares each block's speed with that
of the two blocks beside it, because the speed of a shared machine changes. In the first line of the table the process
is always stopped, which shows the noise. The process' part of the CPU time has little noise.

    .venv/bin/python -m benchmarks.endpoint --help
"""

import argparse
import http.client
import importlib.util
import itertools
import math
import multiprocessing
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.link import DEFAULT_MAX_REQUESTS
from exporter.serving.access import Access
from exporter.serving.application import CLIENT_SECONDS, Application
from exporter.serving.state import State
from exporter.telemetry import GradientStep, summarize_gradient_steps

SLOW_READERS = 20
FLOODING_CLIENTS = 8
WARM_UP = 2  # updates before the timed ones, while clients start
BRIEF = 20  # seconds of scrapes beside slow readers, and on a busy core
ENOUGH = 1.0  # seconds that a scrape may take
GIVE_UP = 10.0  # seconds after which Prometheus gives up
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = 500
STARTS = {"idle": b"", "half a header": REQUEST[:20], "a byte a second": REQUEST[:20], "no handshake": b"\x16\x03\x01"}
"""First bytes on a held connection; the last kind is only for TLS."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoint", description=__doc__.split("\n\n")[0])
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    commands = parser.add_subparsers(required=True)
    uvicorn = "To test uvicorn too: `pip install --target FOLDER uvicorn==0.54.0`, and set PYTHONPATH=FOLDER."
    servers = commands.add_parser("servers", help="how servers cope with bad clients", description=uvicorn, **defaults)
    servers.add_argument("--seconds", type=int, default=60, help=f"seconds of scrapes beside {HELD} connections")
    servers.set_defaults(run=compare_servers)
    training = commands.add_parser("training", help="what the endpoint costs training", **defaults)
    training.add_argument("--rounds", type=int, default=80, help="blocks with the endpoint in each line of the table")
    training.add_argument("--updates", type=int, default=1, help="updates of a block")
    training.set_defaults(run=measure_training)
    options = parser.parse_args()
    core, clients_core, *_ = sorted(os.sched_getaffinity(0))  # needs Linux and two cores
    print(f"{machine('hypercorn', 'h11', 'torch')}\n\n    python -m benchmarks.endpoint {' '.join(sys.argv[1:])}\n")
    options.run(options, core, clients_core)


def compare_servers(options: argparse.Namespace, core: int, clients_core: int) -> None:
    print(
        "| server | | held connections | scrapes within 1 s | slowest, ms | longest held, s | memory, MiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    servers = {"exporter process": serve_exporter}
    if importlib.util.find_spec("uvicorn") is not None:
        servers["uvicorn"] = serve_uvicorn
    with tempfile.TemporaryDirectory() as folder:
        for name, tls in itertools.product(servers, (None, make_certificate(Path(folder)))):
            with servers[name](core, tls) as (port, pid):
                os.sched_setaffinity(0, {clients_core})
                list(scrapes(port, 50, 0.1, tls))  # until it is up and warm
                longest = multiprocessing.RawValue("d")
                kinds = list(STARTS) if tls else list(STARTS)[:-1]
                held, readers = (kinds * HELD)[:HELD], ["slow reader"] * SLOW_READERS
                for what, seconds, where, beside, *arguments in (
                    ("none, but another process fills the core", BRIEF, core, fill_core),
                    (f"{HELD}: {', '.join(kinds)}", options.seconds, clients_core, hold, port, held, tls, longest),
                    (f"{SLOW_READERS} slow readers", BRIEF, clients_core, hold, port, readers, tls, longest),
                ):
                    longest.value, before, took, memory = 0.0, resident_mib(pid), [], []
                    with process(where, beside, *arguments):
                        for each in scrapes(port, seconds, 1.0, tls):
                            took.append(each)
                            memory.append(resident_mib(pid) - before)
                    print(
                        f"| {name} | {'HTTPS' if tls else 'HTTP'} | {what} "
                        f"| {sum(each <= ENOUGH for each in took)} of {len(took)} | {max(took) * 1e3:.0f} "
                        f"| {longest.value:.1f} | {max(memory):+.1f} |",
                        flush=True,
                    )


def measure_training(options: argparse.Namespace, core: int, clients_core: int) -> None:
    os.sched_setaffinity(0, {core})  # before torch starts threads; the exporter process inherits it
    from trainer.config import TrainerConfig
    from trainer.training import Training

    training = Training(TrainerConfig(total_timesteps=2**40, run="r", anneal_learning_rate=False))
    print(
        "| endpoint | speed, median of ratios | middle half | CPU time of the exporter process | scrapes |\n"
        "|---|---|---|---|---|"
    )
    for name, clients, interval in (
        ("stopped, like its neighbors", 0, 0.0),
        ("on, not scraped", 0, 0.0),
        ("scraped once a second", 1, 2.0),  # it is stopped half of the time
        (f"flooded by {FLOODING_CLIENTS} clients", FLOODING_CLIENTS, 0.0),
    ):
        answers = multiprocessing.get_context("spawn").Queue()
        with (
            MetricsServer(training.aggregator, port=0) as server,
            process(clients_core, scrape_on, server.port, clients, interval, answers),
        ):
            exporter, seconds, own, others = exporter_pid(), [], 0.0, 0.0
            for _ in range(WARM_UP):
                training.update(lambda: False)
            for number in range(2 * options.rounds + 1):
                is_on = number % 2 and "stopped" not in name
                os.kill(exporter, signal.SIGCONT if is_on else signal.SIGSTOP)
                begin, before, others_before = time.monotonic(), time.process_time(), cpu_seconds(exporter)
                for _ in range(options.updates):
                    training.update(lambda: False)
                seconds.append(time.monotonic() - begin)
                if number % 2:
                    own, others = own + time.process_time() - before, others + cpu_seconds(exporter) - others_before
            os.kill(exporter, signal.SIGCONT)
            scraped = answers.qsize()
        ratios = [(seconds[at - 1] + seconds[at + 1]) / 2 / seconds[at] for at in range(1, len(seconds), 2)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        part = others / (own + others)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {part:.2%} | {scraped} |", flush=True)


@contextmanager
def serve_exporter(core: int, certificate: Path | None) -> Iterator[tuple[int, int]]:
    """Port and process id of an exporter process."""
    file = None if certificate is None else certificate.with_name("web.yml")
    if file is not None:
        file.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}")
    os.sched_setaffinity(0, {core})  # the exporter process inherits it
    with MetricsServer(a_run(), port=0, web_config_file=file) as server:
        yield server.port, exporter_pid()


@contextmanager
def serve_uvicorn(core: int, certificate: Path | None) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(core, run_uvicorn, port, certificate, a_run().snapshot.plain()) as pid:
        yield port, pid


def run_uvicorn(port: int, certificate: Path | None, snapshot: Any) -> None:
    import uvicorn

    os.nice(19)
    state = State({})
    state.take(snapshot, {})
    options: dict[str, Any] = {"log_level": "critical", "lifespan": "off", "timeout_keep_alive": CLIENT_SECONDS}
    if certificate is not None:
        options |= {"ssl_certfile": certificate, "ssl_keyfile": certificate.with_suffix(".key")}
    uvicorn.run(Application(state, Access(None), DEFAULT_MAX_REQUESTS, os.getppid()), port=port, **options)


def hold(port: int, kinds: list[str], certificate: Path | None, longest: Any) -> None:
    """Hold a connection of every kind until this process ends; `longest` gets the longest time in seconds."""

    def hold_one(kind: str) -> None:
        with socket.socket() as connection:
            if kind == "slow reader":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(GIVE_UP)
            connection.connect(("127.0.0.1", port))
            opened, is_open = time.monotonic(), True
            if certificate and kind != "no handshake":
                connection = client_tls().wrap_socket(connection)
            connection.settimeout(1.0)
            connection.sendall(STARTS.get(kind, b""))
            while is_open:
                try:
                    if kind == "slow reader":
                        connection.sendall(REQUEST * 100)
                    else:
                        is_open = bool(connection.recv(1024))
                except TimeoutError:
                    if kind == "a byte a second":
                        connection.sendall(b"x")
                finally:
                    longest.value = max(longest.value, time.monotonic() - opened)

    in_threads(hold_one, kinds)


def fill_core() -> None:
    while True:
        pass


def scrape_on(port: int, clients: int, interval: float, answers: multiprocessing.Queue) -> None:
    """Scrape with this number of `clients` until this process ends; `answers` gets the seconds of each scrape."""
    in_threads(lambda _: [answers.put(took) for took in scrapes(port, 2**30, interval, None)], range(clients))


def scrapes(port: int, number: int, interval: float, certificate: Path | None) -> Iterator[float]:
    """Seconds of each scrape from the time when it was due; infinite if it failed or could not start in time.

    Each scrape has its own connection; without an interval all share one.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GIVE_UP)
    if certificate is not None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=GIVE_UP, context=client_tls())
    begin = time.monotonic()
    for index in range(number):
        due = begin + index * interval if interval else time.monotonic()
        time.sleep(max(0.0, due - time.monotonic()))
        is_good = False
        if time.monotonic() - due < GIVE_UP:
            with suppress(OSError, http.client.HTTPException), closing(connection) if interval else ExitStack():
                connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
                response = connection.getresponse()
                is_good = bool(response.read()) and response.status == 200
            if not is_good:
                connection.close()
        yield time.monotonic() - due if is_good else math.inf


def in_threads(run: Callable[[Any], object], arguments: Iterable[Any]) -> None:
    """Run it again and again for all arguments at once, as clients."""
    os.setsid()  # the kernel divides CPU time by session: keep clients out of the server's session

    def again(argument: Any) -> None:
        while True:
            with suppress(OSError):
                run(argument)
            time.sleep(0.01)

    for argument in arguments:
        threading.Thread(target=again, args=(argument,), daemon=True).start()
    threading.Event().wait()


@contextmanager
def process(core: int, target: Callable[..., None], *args: object) -> Iterator[int]:
    """PID of a process on this core that runs `target`, which must not end by itself."""
    child = multiprocessing.get_context("spawn").Process(target=on_core, args=(core, target, *args), daemon=True)
    child.start()
    try:
        yield child.pid
        if not child.is_alive():
            raise RuntimeError(f"{target.__name__} has ended")
    finally:
        child.kill()
        child.join()


def on_core(core: int, target: Callable[..., None], *args: object) -> None:
    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    os.sched_setaffinity(0, {core})
    threading.Thread(target=end_with_parent, daemon=True).start()
    target(*args)


def exporter_pid() -> int:
    return int(subprocess.check_output(["pgrep", "-P", str(os.getpid()), "-f", "[-]m exporter"]))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def a_run() -> RunAggregator:
    """A run with seven heads, as in the default environment."""
    runs, norms = RunAggregator(), {f"head-{number}": 1.0 + number for number in range(7)}
    emit_ppo_update(summarize_gradient_steps([GradientStep(norms, 4.0)]), run="r", handler=runs)
    return runs


def make_certificate(folder: Path) -> Path:
    """A certificate in `folder`, with its key beside it."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -days 2"
    files = ["-keyout", folder / "server.key", "-out", folder / "server.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return folder / "server.pem"


def client_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


if __name__ == "__main__":
    main()
