"""hypercorn with the bounds of docs/endpoint.md."""

import asyncio
import asyncio.sslproto
import contextlib
import logging
import socket
import ssl
from typing import Any

from hypercorn.asyncio import serve as serve_by_hypercorn
from hypercorn.config import Config

from exporter.serving.application import Application
from exporter.serving.web_config import WebConfigFile

CLIENT_SECONDS = 8
"""A connection has this long for its TLS handshake, for a whole request, and to take what it was sent."""
_TLS_BUFFER_BYTES = 16 * 1024
_log = logging.getLogger(__name__)


class _Config(Config):
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
    # asyncio reserves 256 KiB for each TLS connection, which 500 idle ones would make 125 MiB.
    asyncio.sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    with contextlib.suppress(AttributeError, OSError):  # Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * CLIENT_SECONDS)
    config = _Config()
    config.context = None if file is None else file.context
    config.bind = f"fd://{listener.detach()}"

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(_note)
        await serve_by_hypercorn(application, config, shutdown_trigger=asyncio.Event().wait)

    asyncio.run(run())


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Clients that break off are no news."""
    error = context.get("exception")
    _log.log(logging.DEBUG if isinstance(error, OSError) else logging.WARNING, "%s: %r", context["message"], error)
