"""What `/metrics` says: the formats that Prometheus knows, the metrics of each collector, and how long they took."""

import gzip
import logging
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from http import HTTPStatus

from prometheus_client import exposition as text
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from exporter.metrics import COLLECTOR_DURATION, COLLECTOR_SUCCESS, Collection
from exporter.web.connections import Response

_ESCAPINGS = (openmetrics.UNDERSCORES, openmetrics.ALLOWUTF8, openmetrics.DOTS, openmetrics.VALUES)
BODY_SECONDS = 0.2
"""A whole body is sent again for this long, where no collector has a new state: the next scrape of a flood."""
OLD_SECONDS = 1.0
"""So old may be what is sent while the endpoint has to save: new states come faster than it may render them."""
_GZIP_LEVEL = 1  # a quarter of the size; higher levels save little more and cost the training several times as much
_MAX_PREFERENCES = 100
_END = b"# EOF\n"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """An exposition format: media type, version, and how names beyond ASCII would be escaped."""

    media_type: str
    version: str
    escaping: str = openmetrics.UNDERSCORES

    @property
    def content_type(self) -> str:
        suffix = f"; escaping={self.escaping}" if self.version == "1.0.0" else ""
        return f"{self.media_type}; version={self.version}; charset=utf-8{suffix}"

    @property
    def is_openmetrics(self) -> bool:
        return self.media_type == _OPENMETRICS

    @property
    def encode(self) -> Callable[[Collector], bytes]:
        if self.is_openmetrics:
            return partial(openmetrics.generate_latest, escaping=self.escaping, version="1.0.0")
        return partial(text.generate_latest, escaping=self.escaping)


_OPENMETRICS, _TEXT = "application/openmetrics-text", "text/plain"
_VERSIONS = {_OPENMETRICS: ("1.0.0", "0.0.1"), _TEXT: ("0.0.4", "1.0.0")}  # the first one where none is asked for
_WILDCARDS = {"*/*": _TEXT, "text/*": _TEXT, "application/*": _OPENMETRICS}
DEFAULT_FORMAT = Format(_TEXT, "0.0.4")


def negotiate(accept: str) -> Format:
    """The format that an Accept header likes best; the text format where it likes none or cannot be read.

    https://prometheus.io/docs/instrumenting/content_negotiation/ says what may stand there.
    """
    best, best_rank = DEFAULT_FORMAT, (0.0, 0)
    for media_range, parameters, quality in preferences(accept):
        media_type = _WILDCARDS.get(media_range, media_range)
        versions = _VERSIONS.get(media_type, ())
        version = parameters.get("version", versions[0] if versions else "")
        rank = (quality, int(media_range == media_type))
        if version in versions and quality and rank > best_rank:
            escaping = parameters.get("escaping") if version == "1.0.0" else None
            best = Format(media_type, version, escaping if escaping in _ESCAPINGS else openmetrics.UNDERSCORES)
            best_rank = rank
    return best


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether gzip is at least as welcome as no compression."""
    qualities = {coding: quality for coding, _, quality in preferences(accept_encoding)}
    gzip = qualities.get("gzip", qualities.get("x-gzip", qualities.get("*", 0.0)))
    return 0.0 < gzip >= qualities.get("identity", 0.0)


def preferences(header: str) -> Iterable[tuple[str, dict[str, str], float]]:
    """(value, parameters, quality 0 to 1) of each element of an Accept or Accept-Encoding header (RFC 9110, 12.5).

    Names are in lower case; an element whose quality is no such number is left out, and so are those after the
    hundredth.
    """
    for element in header.split(",", _MAX_PREFERENCES)[:_MAX_PREFERENCES]:
        value, *pairs = (part.strip() for part in element.split(";"))
        parameters = {
            name.strip().lower(): text.strip().strip('"') for name, _, text in (p.partition("=") for p in pairs)
        }
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            continue
        if value and 0.0 <= quality <= 1.0:
            yield value.lower(), parameters, quality


@dataclass(frozen=True)
class Body:
    """A body, and what becomes of it for those who accept gzip."""

    plain: bytes

    @cached_property
    def gzipped(self) -> bytes:
        return gzip.compress(self.plain, _GZIP_LEVEL, mtime=0)

    def response(self, accept_encoding: str, *headers: tuple[str, str]) -> Response:
        """200 with this body, encoded as that header wishes."""
        if accepts_gzip(accept_encoding):
            return Response(HTTPStatus.OK, (*headers, ("Content-Encoding", "gzip")), self.gzipped)
        return Response(HTTPStatus.OK, headers, self.plain)


@dataclass(frozen=True)
class _Rendered:
    """A body, the collectors' states that it shows, and when it was rendered (monotonic clock)."""

    body: Body
    states: list[object]
    at: float


class Exposition:
    """Renders collectors, each by itself: one that fails takes nothing but its own metrics with it.

    A collector with a property `state` is rendered once per state (compared by identity) and format.

    Args:
        collectors: by name, the value of the label `collector`, in the order in which they are rendered.
        labels: added to the samples on the collectors themselves.
    """

    def __init__(self, collectors: Mapping[str, Collector], labels: Mapping[str, str]) -> None:
        self._collectors = dict(collectors)
        self._labels = dict(labels)
        self._rendered: dict[tuple[str, Format], tuple[object, bytes]] = {}
        self._bodies: dict[Format, _Rendered] = {}
        self._failing: set[str] = set()

    def render(self, format: Format, names: frozenset[str] = frozenset(), *, will_take_old: bool = False) -> Body:
        """The samples of all collectors, or only those with one of `names`, in `format`.

        `will_take_old`: a whole body may be `OLD_SECONDS` old, whatever has happened since.
        """
        if names:
            return Body(self._rendered_now(format, names))
        states = [getattr(collector, "state", None) for collector in self._collectors.values()]
        rendered = self._bodies.get(format)
        if rendered is not None:
            age = time.monotonic() - rendered.at
            if age < BODY_SECONDS and all(map(operator.is_, rendered.states, states)):
                return rendered.body
            if will_take_old and age < OLD_SECONDS:
                return rendered.body
        body = Body(self._rendered_now(format, names))
        self._bodies[format] = _Rendered(body, states, time.monotonic())
        return body

    def _rendered_now(self, format: Format, names: frozenset[str]) -> bytes:
        parts, runs = [], []
        for name, collector in self._collectors.items():
            started = time.perf_counter()
            try:
                part = self._render(name, collector, format, names)
            except Exception:
                part, is_success = b"", False
                if name not in self._failing:
                    _log.exception("collector %s failed; its metrics are missing until it works again", name)
            else:
                is_success = True
            (self._failing.discard if is_success else self._failing.add)(name)
            parts.append(part)
            runs.append(Collection(name, is_success, time.perf_counter() - started))
        about = (family.collect(runs, self._labels) for family in (COLLECTOR_SUCCESS, COLLECTOR_DURATION))
        parts.append(_encode(about, format, names))
        return b"".join(parts) + (_END if format.is_openmetrics else b"")

    def _render(self, name: str, collector: Collector, format: Format, names: frozenset[str]) -> bytes:
        state = getattr(collector, "state", None)
        if state is None or names:
            return _encode(collector.collect(), format, names)
        known, part = self._rendered.get((name, format), (None, b""))
        if known is not state:
            part = _encode(collector.collect(), format)
            self._rendered[name, format] = state, part
        return part


@dataclass(frozen=True)
class _Families(Collector):
    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _encode(families: Iterable[Metric], format: Format, names: frozenset[str] = frozenset()) -> bytes:
    if names:
        families = filter(None, (_restricted(family, names) for family in families))
    return format.encode(_Families(families)).removesuffix(_END)


def _restricted(family: Metric, names: frozenset[str]) -> Metric | None:
    """The family with the samples that have one of `names`, or with all where it is called so itself."""
    if family.name in names:
        return family
    samples = [sample for sample in family.samples if sample.name in names]
    if not samples:
        return None
    restricted = Metric(family.name, family.documentation, family.type, family.unit)
    restricted.samples = samples
    return restricted
