"""The endpoint of a training process: `/metrics` and the rest, over HTTP or HTTPS, in a thread."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from exporter.aggregator import RunAggregator
from exporter.metrics import build_collectors
from exporter.web.access import Access
from exporter.web.application import DEFAULT_MAX_REQUESTS, Application, Handler
from exporter.web.config import WebConfigError, WebConfigFile
from exporter.web.connections import HttpServer
from exporter.web.exposition import Exposition

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_MAX_REQUESTS",
    "DEFAULT_PORT",
    "MetricsServer",
    "WebConfigError",
    "host_and_port",
]

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 9842
_BACKLOG = 512


class MetricsServer:
    """Serves the runs of an aggregator until `close()`; also a context manager.

    A forked child does not serve: it lets go of the socket, and closing the server there does nothing.

    Args:
        aggregator: whose snapshot every scrape reads.
        address: IP address or host name to bind; the default is reachable from this machine only.
        port: TCP port; 0 takes any free one, which `port` then names.
        process_labels: added to every sample of a run, such as a rank.
        web_config_file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.
        max_requests: scrapes at a time, above which they get 503; 0 for no limit.
        handlers: further paths, each with what answers it.

    Raises:
        OSError: the address cannot be bound; the message names it and the reason.
        WebConfigError: the web configuration file cannot be used.
    """

    def __init__(
        self,
        aggregator: RunAggregator,
        address: str = DEFAULT_ADDRESS,
        port: int = DEFAULT_PORT,
        process_labels: Mapping[str, str] = MappingProxyType({}),
        *,
        web_config_file: str | Path | None = None,
        max_requests: int = DEFAULT_MAX_REQUESTS,
        handlers: Mapping[str, Handler] = MappingProxyType({}),
    ) -> None:
        self.address = address
        file = WebConfigFile(web_config_file) if web_config_file is not None else None
        self.scheme = "https" if file is not None and file.is_tls else "http"
        exposition = Exposition(build_collectors(aggregator, process_labels), process_labels)
        application = Application(aggregator, exposition, Access(file), max_requests)
        application.handlers.update(handlers)
        if not address:
            raise OSError("cannot serve /metrics on no address; every address of this machine is 0.0.0.0, or ::")
        try:
            listener = _listen(address, port)
        except (OSError, OverflowError, UnicodeError) as error:
            # The standard library adds the address to strerror, which is there already.
            reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
            raise OSError(f"cannot serve /metrics on {host_and_port(address, port)}: {reason}") from error
        self.port: int = listener.getsockname()[1]
        if self.scheme == "https":
            self._server = HttpServer(
                application,
                listener,
                lambda: file.current().tls,
                lambda certificate: file.current().admits(certificate),
            )
        else:
            self._server = HttpServer(application, listener)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{host_and_port(self.address, self.port)}/metrics"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.close()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def host_and_port(address: str, port: int) -> str:
    """`address:port`, with the brackets that an IPv6 address needs."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _listen(address: str, port: int) -> socket.socket:
    family, *_, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(name, family=family, backlog=_BACKLOG)
