"""The paths of the endpoint and their answers: an ASGI application."""

import asyncio
import gzip
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs

from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest, gzip_accepted
from prometheus_client.registry import Collector

from exporter.collectors import GuardedCollectors, build_collectors
from exporter.metrics import RUN_LABEL
from exporter.serving.access import Access
from exporter.serving.state import Relay, State
from exporter.serving.status import StatusPage

CLIENT_SECONDS = 8
"""Time limit of a connection for its TLS handshake, for a complete request, and for reading an answer."""
_OPENMETRICS, _TEXT = "application/openmetrics-text", "text/plain"
_GZIP_LEVEL = 1  # a quarter of the size; higher levels save little more
_Answer = tuple[int, Mapping[str, str], bytes]
_log = logging.getLogger(__name__)


class Application:
    """Answers `/`, `/metrics`, `/-/healthy` and `/-/ready`.

    Args:
        state: the newest state from the training process.
        access: decides who may read.
        max_requests: limit for scrapes in progress; more get 503; 0 for no limit.
        pid: PID of the training process, for the process metrics.
    """

    def __init__(self, state: State, access: Access, max_requests: int, pid: int) -> None:
        self._state = state
        self._access = access
        self._max_requests = max_requests
        self._scrapes = 0
        collectors = build_collectors(state, state.process_labels, pid=lambda: pid)
        taken = frozenset(metric.name for metric in GuardedCollectors(collectors).describe())
        for name in state.metrics:
            collectors[name] = Relay(state, name, frozenset() if name in collectors else taken)
        self._collectors = GuardedCollectors(collectors, state.process_labels)
        page = StatusPage(state)
        self._paths: dict[str, Callable[[Mapping[str, str], Mapping[str, list[str]]], _Answer]] = {
            "/": lambda headers, query: page.answer(),
            "/metrics": self._metrics,
            "/-/healthy": lambda headers, query: _text(200, "Healthy."),
            "/-/ready": lambda headers, query: self._ready(),
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]},{text}" if key in headers else text
        refusal = await self._access.refusal(headers.get("authorization", ""))
        is_scrape = refusal is None and scope["path"] == "/metrics"
        self._scrapes += is_scrape
        try:
            status, own, body = _text(*refusal) if refusal else self._answer(scope, headers)
            own = {**self._access.config.headers, **own, "Content-Length": str(len(body))}
            encoded = [(name.lower().encode(), value.encode()) for name, value in own.items()]
            async with asyncio.timeout(CLIENT_SECONDS):
                await send({"type": "http.response.start", "status": status, "headers": encoded})
                await send({"type": "http.response.body", "body": body})
        finally:
            self._scrapes -= is_scrape

    def _answer(self, scope: Any, headers: Mapping[str, str]) -> _Answer:
        path = scope["path"]
        if path not in self._paths:
            return _text(404, "Not found; there are " + ", ".join(self._paths))
        if scope["method"] not in ("GET", "HEAD"):
            return _text(405, "Use GET or HEAD.", {"Allow": "GET, HEAD"})
        if path == "/metrics" and 0 < self._max_requests < self._scrapes:
            return _text(503, f"There are {self._max_requests} scrapes already.", {"Retry-After": "1"})
        try:
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=1000)
        except ValueError:
            return _text(400, "Too many parameters.")
        try:
            status, own, body = self._paths[path](headers, query)
        except Exception:
            _log.exception("%s cannot be answered", path)
            return _text(500, "Internal error; see the log.")
        if gzip_accepted(",".join(preferences(headers.get("accept-encoding", "")))):
            return status, {**own, "Content-Encoding": "gzip"}, gzip.compress(body, _GZIP_LEVEL, mtime=0)
        return status, own, body

    def _metrics(self, headers: Mapping[str, str], query: Mapping[str, list[str]]) -> _Answer:
        names, runs = frozenset(query.get("name[]", ())), frozenset(query.get("run", ()))
        if missing := sorted(runs - self._state.snapshot.runs.keys()):
            return _text(404, f"There is no run {', '.join(missing)} here.")
        encode, content_type = negotiate(headers.get("accept", ""))
        body = encode(_Selection(self._collectors, names, runs) if names or runs else self._collectors)
        return 200, {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}, body

    def _ready(self) -> _Answer:
        """Ready if every run has completed an update and none is stalled."""
        now, runs = time.time(), self._state.snapshot.runs.values()
        reasons = [
            f"run {run.run}: " + ("no update yet" if at is None else f"no update for {now - at:.0f} s")
            for run in runs
            if (at := run.last_update_timestamp_seconds) is None or now - at > run.stalled_after_seconds
        ]
        if reasons or not runs:
            return _text(503, "\n".join(["Not ready.", *(reasons or ["no run yet"])]))
        return _text(200, "Ready.")


class _Selection(Collector):
    """Samples whose name or family is in `names`, of one of `runs` or of no run; an empty set means all."""

    def __init__(self, collector: Collector, names: frozenset[str], runs: frozenset[str]) -> None:
        self._collector, self._names, self._runs = collector, names, runs

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            selected = Metric(family.name, family.documentation, family.type, family.unit)
            selected.samples = [
                sample
                for sample in family.samples
                if (not self._names or {family.name, sample.name} & self._names)
                and (not self._runs or sample.labels.get(RUN_LABEL) in (*self._runs, None))
            ]
            if selected.samples:
                yield selected


def negotiate(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Encoder and content type that an Accept header prefers; the text format if it accepts none of ours.

    https://prometheus.io/docs/instrumenting/content_negotiation/ describes the header.
    """
    for element in preferences(accept):
        media_type, *parameters = (part.strip() for part in element.split(";"))
        version = next((part.partition("=")[2] for part in parameters if part.startswith("version=")), "")
        if media_type == _OPENMETRICS and version in ("", "1.0.0") or (media_type, version) == (_TEXT, "1.0.0"):
            return choose_encoder(element)
        if media_type in (_TEXT, "text/*", "*/*") and version in ("", "0.0.4"):
            break
    return generate_latest, CONTENT_TYPE_PLAIN_0_0_4


def preferences(header: str) -> list[str]:
    """The elements of an Accept or Accept-Encoding header, most preferred first, without refused ones."""

    def quality(element: str) -> float:
        try:
            return float(element.partition("q=")[2].split(";")[0] or 1.0)
        except ValueError:
            return 0.0

    return sorted((each for each in header.lower().split(",") if quality(each) > 0), key=quality, reverse=True)


def _text(status: int, text: str, headers: Mapping[str, str] = {}) -> _Answer:
    return status, {"Content-Type": "text/plain; charset=utf-8", **headers}, f"{text}\n".encode()
