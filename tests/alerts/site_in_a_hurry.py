"""A fast site: real servers, rules and routes thirty times as fast, and scripted runs.

What a run does is a function of the number of its scrape, which stands for half a minute. Its metrics are those of the
real exporter.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import Observability
from prometheus_client import CollectorRegistry, generate_latest

from exporter import PPOUpdatePayload, RunAggregator
from exporter.collectors import RunCollector

SEVEN = ("slot", "blueprint", "alpha", "target", "speed", "curve", "op")


@dataclass
class Run:
    """A scripted run.

    Attributes:
        script: called with the run and the number of the scrape, from 1 on, before each answer; True where the
            endpoint is to fail.
        instance: the target's label.
    """

    name: str
    script: Callable[["Run", int], bool | None]
    instance: str = ""
    heads: tuple[str, ...] = SEVEN
    register: Mapping[str, Any] = field(default_factory=dict)
    aggregator: RunAggregator = field(init=False)
    scrapes: int = 0

    def __post_init__(self) -> None:
        self.instance = self.instance or f"{self.name}:9842"
        self.start()

    def start(self) -> None:
        """As a process of its own does, without an update."""
        self.aggregator = RunAggregator()
        self.aggregator.register_run(self.name, self.heads, **self.register)
        self.registry = CollectorRegistry()
        self.registry.register(RunCollector(self.aggregator))
        self._rendered, self._body = None, b""

    def update(self, cv: float = 0.2, *, steps: int = 10, **fields: Any) -> None:
        """One update whose steps all have this CV, or those of `gradient_cv_per_step`."""
        fields.setdefault("gradient_cv_per_step", (cv,) * steps)
        fields.setdefault("head_gradient_norms", dict.fromkeys(self.heads, 1.0))
        payload = PPOUpdatePayload(run=self.name, gradient_cv=cv, contributing_heads=len(self.heads), **fields)
        self.aggregator.handle_ppo_update(payload)

    def answer(self) -> bytes | None:
        """The body of a scrape; None where it fails. Made anew only when something has changed."""
        self.scrapes += 1
        if self.script(self, self.scrapes):
            return None
        if self._rendered is not self.aggregator.snapshot:
            self._rendered, self._body = self.aggregator.snapshot, generate_latest(self.registry)
        return self._body


@pytest.fixture
def start_site(start_observability: Callable) -> Iterator[Callable[[list[Run]], Observability]]:
    """Starts servers that watch some runs."""
    servers = []

    def start(runs: list[Run]) -> Observability:
        by_path = {f"/{number}": run for number, run in enumerate(runs)}

        class Endpoints(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            lock = threading.Lock()

            def do_GET(self) -> None:
                with self.lock:
                    body = by_path[self.path].answer()
                self.send_response(503 if body is None else 200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoints)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # Prometheus did not wait
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        site = start_observability()
        for path, run in by_path.items():
            labels = {"run": run.name, "instance": run.instance, "__metrics_path__": path}
            target = {"targets": [f"127.0.0.1:{server.server_port}"], "labels": labels}
            (site.targets / f"{path[1:]}.json").write_text(json.dumps([target]))
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
