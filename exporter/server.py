"""`/metrics` over HTTP, in a thread of the training process."""

from collections.abc import Mapping
from types import MappingProxyType

from prometheus_client import start_http_server

from exporter.aggregator import RunAggregator
from exporter.metrics import build_registry

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 9842


class MetricsServer:
    """Serves the runs of an aggregator until `close()`; also a context manager.

    Args:
        aggregator: whose snapshot every scrape reads.
        address: IP address or host name to bind; the default is reachable from this machine only.
        port: TCP port; 0 takes any free one, which `port` then names.
        process_labels: added to every sample of a run, such as a rank.

    Raises:
        OSError: the address cannot be bound; the message names it and the reason.
    """

    def __init__(
        self,
        aggregator: RunAggregator,
        address: str = DEFAULT_ADDRESS,
        port: int = DEFAULT_PORT,
        process_labels: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.address = address
        try:
            self._server, self._thread = start_http_server(
                port, address, registry=build_registry(aggregator, process_labels)
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cannot serve /metrics on {host_and_port(address, port)}: {reason}") from error
        self.port: int = self._server.server_port

    @property
    def url(self) -> str:
        return f"http://{host_and_port(self.address, self.port)}/metrics"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def host_and_port(address: str, port: int) -> str:
    """`address:port`, with the brackets that an IPv6 address needs."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
