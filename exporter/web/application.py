"""Paths of the endpoint, and what is said on each."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from urllib.parse import parse_qs

from exporter.aggregator import RunAggregator
from exporter.health import STALLED_SECONDS
from exporter.web.access import Access
from exporter.web.connections import Request, Response
from exporter.web.exposition import Exposition, negotiate
from exporter.web.status import StatusPage

DEFAULT_MAX_REQUESTS = 40
RETRY_AFTER_SECONDS = 1
_METHODS = ("GET", "HEAD")
_log = logging.getLogger(__name__)

Handler = Callable[[Request], Response]


class Application:
    """Answers requests: `/`, `/metrics`, `/-/healthy`, `/-/ready`, and what else is put into `handlers` by path.

    Args:
        aggregator: whose runs decide on readiness.
        exposition: what `/metrics` says.
        access: who may ask, how often, and what headers every response carries.
        max_requests: of a path, whose clients have not taken their answers whole, above which further ones are sent
            away; 0 for no limit.
    """

    def __init__(
        self,
        aggregator: RunAggregator,
        exposition: Exposition,
        access: Access,
        max_requests: int = DEFAULT_MAX_REQUESTS,
    ) -> None:
        self._aggregator = aggregator
        self._exposition = exposition
        self._access = access
        self._max_requests = max_requests
        self._unfinished: Counter[str] = Counter()  # by path, answers of which the client has not taken everything
        self._failing: set[str] = set()
        self.handlers: dict[str, Handler] = {
            "/": StatusPage(aggregator),
            "/metrics": self._metrics,
            "/-/healthy": self._healthy,
            "/-/ready": self._ready,
        }

    def __call__(self, request: Request) -> Response | asyncio.Task[Response]:
        refusal = self._access.refusal(request)
        if callable(refusal):
            return asyncio.get_running_loop().create_task(self._answer_later(request, refusal))
        return self._answer(request, refusal)

    async def _answer_later(self, request: Request, refusal: Callable[[], Awaitable[Response | None]]) -> Response:
        return self._answer(request, await refusal())

    def _answer(self, request: Request, refusal: Response | None) -> Response:
        response = refusal or self._answer_on_path(request)
        return replace(response, headers=(*response.headers, *self._access.headers(response)))

    def _answer_on_path(self, request: Request) -> Response:
        path = _path(request)
        handler = self.handlers.get(path)
        if handler is None:
            return Response.text(HTTPStatus.NOT_FOUND, "Not found; there are " + ", ".join(sorted(self.handlers)))
        if request.method not in _METHODS:
            allow = ", ".join(_METHODS)
            return Response.text(HTTPStatus.METHOD_NOT_ALLOWED, f"Use {allow}.", ("Allow", allow))
        if 0 < self._max_requests <= self._unfinished[path]:
            return _busy(f"There are {self._max_requests} requests already that have not got their answer whole.")
        try:
            response = handler(request)
        except Exception:
            if path not in self._failing:
                _log.exception("%s cannot be answered until this works again", path)
            self._failing.add(path)
            return Response.text(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; see the log.")
        self._failing.discard(path)
        self._unfinished[path] += 1
        return replace(response, ended=partial(self._finish, path))

    def _finish(self, path: str) -> None:
        self._unfinished[path] -= 1

    def _metrics(self, request: Request) -> Response:
        try:
            names = frozenset(parse_qs(_query(request), max_num_fields=1000).get("name[]", ()))
        except ValueError:
            return Response.text(HTTPStatus.BAD_REQUEST, "Too many names.")
        if names and request.will_take_old:
            return _busy("What is chosen by name[] is rendered for each client, for which there is no time now.")
        format = negotiate(request.headers.get("accept", ""))
        return self._exposition.render(format, names, will_take_old=request.will_take_old).response(
            request.headers.get("accept-encoding", ""),
            ("Content-Type", format.content_type),
            ("Vary", "Accept, Accept-Encoding"),
        )

    def _healthy(self, request: Request) -> Response:
        return Response.text(HTTPStatus.OK, "Healthy.")

    def _ready(self, request: Request) -> Response:
        """Ready when every run has completed an update, and none has stalled."""
        now = time.time()
        reasons = [
            f"run {run.run}: " + ("no update yet" if at is None else f"no update for {now - at:.0f} s")
            for run in self._aggregator.snapshot.runs.values()
            if (at := run.last_update_timestamp_seconds) is None or now - at > STALLED_SECONDS
        ]
        if not self._aggregator.snapshot.runs:
            reasons = ["no run yet"]
        if reasons:
            return Response.text(HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(["Not ready.", *reasons]))
        return Response.text(HTTPStatus.OK, "Ready.")


def _busy(reason: str) -> Response:
    return Response.text(HTTPStatus.SERVICE_UNAVAILABLE, reason, ("Retry-After", str(RETRY_AFTER_SECONDS)))


def _path(request: Request) -> str:
    target = request.target.partition("?")[0]
    if target.lower().startswith(("http://", "https://")):  # as a proxy is asked; the host does not matter here
        target = "/" + target.split("://", 1)[1].partition("/")[2]
    return target


def _query(request: Request) -> str:
    return request.target.partition("?")[2]
