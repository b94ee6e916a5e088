"""One endpoint for all runs of a process with the same port, and the endpoints of a run."""

import errno
import logging
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from exporter.aggregator import RunAggregator
from exporter.link import DEFAULT_PORT, MetricsServer, Registry, check_pushgateway_url
from exporter.metrics import RANK_LABEL

_log = logging.getLogger(__name__)


class SharedEndpoint:
    """A server and its runs; it closes with the last run.

    If a run crashes and others continue, its series stay, so that people see it stall.
    """

    _open: dict[tuple[RunAggregator, str, int], "SharedEndpoint"] = {}
    _lock = threading.Lock()

    def __init__(self, server: MetricsServer, key: tuple[RunAggregator, str, int]) -> None:
        self.server = server
        self._key = key
        self._is_default = False
        self._runs: set[str] = set()
        self._abandoned: set[str] = set()

    @classmethod
    def join(
        cls,
        aggregator: RunAggregator,
        run: str,
        address: str,
        port: int | None,
        preferred_port: int,
        labels: Mapping[str, str],
        web_config_file: str | Path | None,
        registry: Registry | None,
    ) -> "SharedEndpoint":
        """Add `run` to this process' endpoint at that port, and start the endpoint if needed.

        Runs without a port share one endpoint, at the preferred port, or at a free one if that is 0 or in use.

        Raises:
            OSError: the address cannot be bound.
            ValueError: the web configuration file is wrong, or the endpoint has another file or another registry.
        """
        with cls._lock:
            endpoint = cls._open.get((aggregator, address, preferred_port if port is None else port))
            if endpoint is None and port is None:
                endpoint = next(
                    (e for key, e in cls._open.items() if key[:2] == (aggregator, address) and e._is_default), None
                )
            if endpoint is None:
                free = port is None and preferred_port and _is_taken(address, preferred_port)
                number = (0 if free else preferred_port) if port is None else port
                server = MetricsServer(
                    aggregator, address, number, labels, web_config_file=web_config_file, registry=registry
                )
                if free:
                    _log.warning("port %d is in use; run %s is served at %s", preferred_port, run, server.url)
                endpoint = cls(server, (aggregator, address, server.port))
                endpoint._is_default = port is None
                cls._open[endpoint._key] = endpoint
            elif web_config_file is not None and Path(web_config_file).absolute() != endpoint.server.web_config_file:
                raise ValueError(f"{endpoint.server.url} already has another web_config_file or none")
            elif registry is not None and registry is not endpoint.server.registry:
                raise ValueError(f"{endpoint.server.url} already has another registry or none")
            endpoint._runs.add(run)
            endpoint._abandoned.discard(run)
            return endpoint

    def leave(self, run: str, crashed: bool) -> None:
        """Remove a run that has ended, and close the server after its last run."""
        with self._lock, ExitStack() as last_first:
            self._runs.discard(run)
            if not self._runs:
                del self._open[self._key]
                for abandoned in self._abandoned:
                    last_first.callback(self._key[0].remove_run, abandoned)
                last_first.callback(self.server.close, crashed=crashed)
            elif crashed:
                self._abandoned.add(run)

    @classmethod
    def has_abandoned(cls, aggregator: RunAggregator, run: str) -> bool:
        """Whether a run has crashed while others of its endpoint continue: its series must stay, because `up` is 1."""
        with cls._lock:
            return any(each._key[0] is aggregator and run in each._abandoned for each in cls._open.values())


class RunEndpoints:
    """The endpoints that serve a run, and the Pushgateways for its final state."""

    def __init__(self, aggregator: RunAggregator, run: str) -> None:
        self._aggregator = aggregator
        self._run = run
        self._endpoints: list[SharedEndpoint] = []
        self._pushgateways: list[tuple[MetricsServer, str]] = []

    def serve(
        self,
        port: int | None,
        address: str,
        *,
        targets_dir: str | Path | None,
        textfile_dir: str | Path | None,
        pushgateway: str | None,
        web_config_file: str | Path | None,
        registry: Registry | None,
        every_rank: bool,
    ) -> str | None:
        """As `GradientMonitor.serve`."""
        if pushgateway is not None:
            check_pushgateway_url(pushgateway)
        labels: dict[str, str] = {}
        preferred_port = DEFAULT_PORT if targets_dir is None else 0
        if (rank := _rank()) is not None:
            if every_rank:
                local_rank = int(os.environ.get("LOCAL_RANK", rank))
                port = port + local_rank if port else port
                preferred_port += local_rank if preferred_port else 0
                labels = {RANK_LABEL: str(rank)}
            elif rank != 0:
                return None
        endpoint = SharedEndpoint.join(
            self._aggregator, self._run, address, port, preferred_port, labels, web_config_file, registry
        )
        server, is_new = endpoint.server, endpoint not in self._endpoints
        try:
            if targets_dir is not None or textfile_dir is not None:
                if not is_new:
                    server.end(self._run)
                server.deliver(self._run, targets_dir=targets_dir, textfile_dir=textfile_dir)
        except BaseException:
            if is_new:
                endpoint.leave(self._run, crashed=False)
            raise
        if is_new:
            self._endpoints.append(endpoint)
        if pushgateway is not None and (server, pushgateway) not in self._pushgateways:
            self._pushgateways.append((server, pushgateway))
        return server.url

    @property
    def url(self) -> str | None:
        """URL of the newest endpoint; None without one."""
        return self._endpoints[-1].server.url if self._endpoints else None

    def leave(self, last_first: ExitStack, crashed: bool) -> None:
        """Add to `last_first`: end the run's files, push its final state, leave the endpoints."""
        servers = [endpoint.server for endpoint in self._endpoints]
        while self._endpoints:
            last_first.callback(self._endpoints.pop().leave, self._run, crashed)
        while self._pushgateways:
            server, url = self._pushgateways.pop()
            if not crashed:
                last_first.callback(server.push, self._run, url)
        # Runs before a push, which a second Ctrl-C may interrupt.
        for server in servers:
            last_first.callback(server.end, self._run, crashed=crashed)


def _rank() -> int | None:
    """This process' rank in torch.distributed's group; None if there is no group."""
    import torch.distributed as distributed  # the exporter process has no torch

    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else None


def _is_taken(address: str, port: int) -> bool:
    """Whether the port is in use; any other problem shows when it is bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _reset_in_child() -> None:
    """Forget the parent's endpoints in a forked child."""
    SharedEndpoint._open = {}
    SharedEndpoint._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
