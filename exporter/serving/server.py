"""hypercorn with the limits of docs/endpoint.md."""

import asyncio
import asyncio.constants
import asyncio.sslproto
import contextlib
import logging
import socket
import ssl
from typing import Any

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Event, Updated

from exporter.serving.application import CLIENT_SECONDS, Application
from exporter.serving.web_config import WebConfigFile

BACKLOG = 512
_TLS_BUFFER_BYTES = 16 * 1024
_TLS_GOODBYE_SECONDS = 1
_LONGEST_SECONDS = 20  # enough for a slow password comparison and then a slow reader
_KERNEL_BUFFER_BYTES = 64 * 1024  # otherwise the kernel buffers megabytes for a client that does not read
_log = logging.getLogger(__name__)


class _Connection(TCPServer):
    """Closes after _LONGEST_SECONDS without rest: HTTP/2 and WebSocket could keep it open for ever."""

    async def run(self) -> None:
        self._limit = self.loop.call_later(_LONGEST_SECONDS, self.writer.transport.abort)
        try:
            await super().run()
        finally:
            self._limit.cancel()

    async def protocol_send(self, event: Event) -> None:
        await super().protocol_send(event)
        if isinstance(event, Updated) and event.idle:  # all requests are answered
            self._limit.cancel()
            self._limit = self.loop.call_later(_LONGEST_SECONDS, self.writer.transport.abort)

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()  # otherwise it keeps a connection that the client has closed


class _Config(Config):
    backlog = BACKLOG  # hypercorn calls listen() again
    errorlog = None
    include_server_header = False
    keep_alive_timeout = read_timeout = ssl_handshake_timeout = CLIENT_SECONDS
    context: ssl.SSLContext | None = None

    @property
    def ssl_enabled(self) -> bool:
        return self.context is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self.context


def serve(application: Application, listener: socket.socket, file: WebConfigFile | None) -> None:
    """Serve on a listening socket until the process ends."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a client that is gone
    hypercorn.asyncio.run.TCPServer = _Connection  # type: ignore[attr-defined]  # hypercorn has no option for it
    # asyncio reserves 256 KiB per TLS connection: 125 MiB for 500 idle ones.
    asyncio.sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    # asyncio waits half a minute for a client that does not close its side of TLS.
    asyncio.constants.SSL_SHUTDOWN_TIMEOUT = _TLS_GOODBYE_SECONDS
    # Connections inherit these.
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        listener.setsockopt(socket.SOL_SOCKET, buffer, _KERNEL_BUFFER_BYTES)
    with contextlib.suppress(AttributeError, OSError):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * CLIENT_SECONDS)
    config = _Config()
    config.context = None if file is None else file.context
    config.bind = f"fd://{listener.detach()}"

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(_note)
        await hypercorn.asyncio.serve(application, config, shutdown_trigger=asyncio.Event().wait)

    asyncio.run(run())


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log clients that disconnect or send nonsense only for debugging, so that they cannot fill the log."""
    _log.debug("%s: %r", context["message"], context.get("exception"))
