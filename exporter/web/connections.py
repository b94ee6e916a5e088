"""HTTP/1.1 in one thread, with bounds on everything that a client could use up.

h11 reads the protocol, OpenSSL the encryption, and asyncio tells when there is something to do. What is added here
keeps a process that has better things to do out of the hands of its clients: how long, how many, how large, and how
much of the CPU.
"""

import asyncio
import errno
import logging
import os
import resource
import selectors
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from functools import wraps
from http import HTTPStatus

import h11

REQUEST_SECONDS = 8.0
"""A connection has this long for its TLS handshake and a whole request, and again after each response."""
RESPONSE_SECONDS = 8.0
"""A client has this long to take its response."""
MAX_CONNECTIONS = 600
"""Or as many as half of the descriptors that the process may have. Where there are more, the one that has waited
longest with its request is closed."""
MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 16 * 1024  # of requests, where it is read only to be thrown away
CPU_SHARE = 0.035
"""Of one core, that the serving thread takes in the long run; what it cannot do with that waits. The training loses
about twice as much, for every answer makes it change threads a few times."""
CPU_BURST_SECONDS = 0.2
"""Of CPU time, that the serving thread saves up while it is idle."""
_SPELL_SECONDS = 0.005  # of CPU time between two pauses, so that they are few, and several clients are served
_LONGEST_PAUSE_SECONDS = 0.25
_RECEIVED_BYTES = 64 * 1024  # at a time
_TLS_RECORD_BYTES = 16 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A whole request. Header names are in lower case, and a header that came twice is joined by a comma.

    Attributes:
        target: as on the request line.
        in_flight: requests that have not got all of their response yet, this one among them.
        will_take_old: the endpoint has used more than its share of the CPU, so that what was said a moment ago must do.
    """

    method: str
    target: str
    headers: dict[str, str]
    in_flight: int = 1
    will_take_old: bool = False


@dataclass(frozen=True)
class Response:
    """A response; `Content-Length`, `Date` and `Connection` are added on the way."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @classmethod
    def text(cls, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> "Response":
        return cls(status, (("Content-Type", "text/plain; charset=utf-8"), *headers), f"{text}\n".encode())


class HttpServer:
    """Serves `respond` from a thread of its own, from construction until `close()`.

    Args:
        respond: turns a request into a response, at once or later; runs in the serving thread.
        listener: a bound and listening socket, which the server takes over.
        tls: gives the context for a new connection, or None for plain HTTP.
        admits: says whether an established TLS connection may go on, from the client's certificate.
    """

    def __init__(
        self,
        respond: Callable[[Request], Response | Awaitable[Response]],
        listener: socket.socket,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        admits: Callable[[dict | None], bool] = lambda certificate: True,
    ) -> None:
        self.respond = respond
        self.tls = tls
        self.admits = admits
        self.in_flight = 0
        self.connections: set[_Connection] = set()
        self.waiting: dict[_Connection, None] = {}  # for a request, the longest first
        self._to_answer: deque[_Connection] = deque()
        self._max_connections = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._listener = listener
        self._selector = _PacedSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        self.loop.set_exception_handler(_log_loop_error)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="metrics-server", daemon=True)
        listener.setblocking(False)
        _servers.add(self)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and close every connection; nothing happens in a forked child, or the second time."""
        if self._pid == os.getpid() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._listen()
        try:
            self.loop.run_forever()
        finally:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            for connection in tuple(self.connections):
                connection.abort()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(asyncio.sleep(0))  # transports close in callbacks
            self.loop.close()

    def _listen(self) -> None:
        self.loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # otherwise the client is gone already
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _log.warning("cannot accept a connection: %s", error.strerror)
                self.loop.remove_reader(self._listener)
                self.loop.call_later(1.0, self._listen)
            return
        if len(self.connections) >= self._max_connections:
            if not self.waiting:
                return sock.close()
            next(iter(self.waiting)).abort()
        sock.setblocking(False)
        _Connection(self, sock)

    @property
    def is_overdrawn(self) -> bool:
        """Whether it has used more than its share of the CPU."""
        return self._selector.saved_up < 0

    def answer_in_turn(self, connection: "_Connection") -> None:
        """One request between two looks at the clock: a pile of them must not take more than the share."""
        if not self._to_answer:
            self.loop.call_soon(self._answer_next)
        self._to_answer.append(connection)

    def _answer_next(self) -> None:
        connection = self._to_answer.popleft()
        if self._to_answer:
            self.loop.call_soon(self._answer_next)
        connection.respond()

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent, without a word to its clients."""
        self._listener.close()
        for connection in self.connections:
            connection.sock.close()
        self._selector.close()


def _ends_on_error(method: Callable[..., None]) -> Callable[..., None]:
    """An error of ours must not leave a connection behind that nobody tends any more."""

    @wraps(method)
    def guarded(connection: "_Connection") -> None:
        try:
            method(connection)
        except Exception:
            _log.exception("a connection had to be closed")
            connection.abort()

    return guarded


class _Connection:
    """One client: reads a request, writes its response, and so on until somebody has had enough.

    It is on sockets and not on asyncio's transports: opening one of those takes several times as long.
    """

    def __init__(self, server: HttpServer, sock: socket.socket) -> None:
        self.sock = sock
        self._descriptor = sock.fileno()  # by which asyncio finds its handlers faster than by the socket
        context = server.tls()
        self._tls = _Tls(context, server.admits) if context is not None else None
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self._request: h11.Request | None = None
        self._body_bytes = 0
        self._unsent = memoryview(b"")
        self._is_reading = self._is_writing = False
        self._is_answering = False
        self._is_closing = False
        self._in_flight = 0
        self._task: asyncio.Task | None = None
        self._deadline: asyncio.TimerHandle | None = None
        server.connections.add(self)
        self._expect_request()

    def abort(self) -> None:
        """End the connection at once, whatever it is doing."""
        self._is_closing = True
        self._read_on(False)
        self._write_on(False)
        self._deadline.cancel()
        self._server.connections.discard(self)
        self._server.waiting.pop(self, None)
        if self._is_answering:
            self._is_answering = False
            self._server.in_flight -= 1
        if self._task is not None:
            self._task.cancel()
        self.sock.close()

    def _close(self) -> None:
        """End the connection when all is sent."""
        self._is_closing = True
        self._read_on(False)
        self._write(self._tls.last_words() if self._tls is not None else b"")

    def _read_on(self, is_on: bool) -> None:
        if is_on != self._is_reading:
            self._is_reading = is_on
            if is_on:
                self._server.loop.add_reader(self._descriptor, self._receive)
            else:
                self._server.loop.remove_reader(self._descriptor)

    def _write_on(self, is_on: bool) -> None:
        if is_on != self._is_writing:
            self._is_writing = is_on
            if is_on:
                self._server.loop.add_writer(self._descriptor, self._flush)
            else:
                self._server.loop.remove_writer(self._descriptor)

    def _within(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._server.loop.call_later(seconds, self.abort)

    def _expect_request(self) -> None:
        self._request, self._body_bytes = None, 0
        self._server.waiting[self] = None
        self._within(REQUEST_SECONDS)
        rest, is_end = self._http.trailing_data
        self._read_on(not is_end)
        if rest or is_end:
            # What came meanwhile must not wait for more, nor keep others waiting.
            self._server.loop.call_soon(self._read)

    @_ends_on_error
    def _receive(self) -> None:
        try:
            data = self.sock.recv(_RECEIVED_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            return self.abort()
        is_end = not data
        if self._tls is not None and not is_end:
            try:
                data = self._tls.decrypt(data)
            except (ssl.SSLError, _NotAdmitted):
                return self._close()
            if to_send := self._tls.to_send():
                self._write(to_send)
            is_end = self._tls.is_end
        if data:
            self._http.receive_data(data)
        if is_end:
            self._http.receive_data(b"")
        if is_end or self._is_answering:  # what has come is read when it is its turn
            self._read_on(False)
        self._read()

    @_ends_on_error
    def _read(self) -> None:
        if self._is_answering or self._is_closing:
            return
        try:
            while (event := self._http.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.Data):
                    self._body_bytes += len(event.data)
                    if self._body_bytes > MAX_BODY_BYTES:
                        return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                elif isinstance(event, h11.EndOfMessage):
                    return self._answer()
                else:
                    return self._close()
        except h11.RemoteProtocolError as error:
            return self._answer(HTTPStatus(error.error_status_hint))
        if self._http.they_are_waiting_for_100_continue:
            self._answer()  # whatever would follow, no body is wanted

    def _answer(self, refusal: HTTPStatus | None = None) -> None:
        self._is_answering = True
        self._server.in_flight += 1
        self._server.waiting.pop(self, None)
        self._within(RESPONSE_SECONDS)
        if refusal is None:
            self._in_flight = self._server.in_flight
            self._server.answer_in_turn(self)
        else:
            self._send(Response.text(refusal, refusal.phrase), is_last=True)

    @_ends_on_error
    def respond(self) -> None:
        """Answer the request that has been read."""
        if self._is_closing:
            return
        headers: dict[str, str] = {}
        for name, value in self._request.headers:
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        request = Request(
            self._request.method.decode("ascii"),
            self._request.target.decode("latin-1"),
            headers,
            self._in_flight,
            self._server.is_overdrawn,
        )
        try:
            response = self._server.respond(request)
        except Exception:
            response = _internal_error()
        if isinstance(response, Response):
            self._send(response)
        else:
            self._task = self._server.loop.create_task(self._send_later(response))

    async def _send_later(self, to_come: Awaitable[Response]) -> None:
        try:
            response = await to_come
        except Exception:
            response = _internal_error()
        self._task = None
        if not self._is_closing:
            self._send(response)

    def _send(self, response: Response, is_last: bool = False) -> None:
        headers = [
            *response.headers,
            ("Content-Length", str(len(response.body))),
            ("Date", formatdate(usegmt=True)),
        ]
        if is_last or self._http.their_state not in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL):
            headers.append(("Connection", "close"))
        if self._http.our_state is h11.ERROR:
            return self.abort()
        data = self._http.send(
            h11.Response(status_code=response.status, reason=response.status.phrase.encode(), headers=headers)
        )
        if self._request is None or self._request.method != b"HEAD":
            data += self._http.send(h11.Data(data=response.body))
        data += self._http.send(h11.EndOfMessage())
        if self._tls is not None:
            try:
                data = self._tls.encrypt(data)
            except ssl.SSLError:  # the client has said that it takes nothing any more
                return self.abort()
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._unsent = memoryview(bytes(self._unsent) + data if self._unsent else data)
        self._flush()

    @_ends_on_error
    def _flush(self) -> None:
        if self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                return self.abort()
            self._unsent = self._unsent[sent:]
        self._write_on(bool(self._unsent))
        if self._unsent:
            return
        if self._is_closing:
            return self.abort()
        # TLS has messages of its own to flush before a response.
        is_answered = self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY)
        if self._is_answering and is_answered:
            self._is_answering = False
            self._server.in_flight -= 1
            if self._http.our_state is not h11.DONE:
                return self._close()
            self._http.start_next_cycle()
            self._expect_request()


def _internal_error() -> Response:
    _log.exception("a request could not be answered")
    return Response.text(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; see the log.")


class _NotAdmitted(Exception):
    """The client's certificate is not among those that are let in."""


class _Tls:
    """The server's end of TLS between bytes; asyncio's own takes a quarter of a MiB a connection."""

    def __init__(self, context: ssl.SSLContext, admits: Callable[[dict | None], bool]) -> None:
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._received, self._to_send, server_side=True)
        self._admits = admits
        self._is_established = False
        self.is_end = False
        """Whether the client has said that it will say no more."""

    def decrypt(self, data: bytes) -> bytes:
        """What the client says with `data`; nothing as long as it shakes hands, or speaks of TLS alone.

        Raises:
            ssl.SSLError: it does not speak TLS as it should.
            _NotAdmitted: it may not go on.
        """
        self._received.write(data)
        plain = b""
        try:
            if not self._is_established:
                self._object.do_handshake()
                self._is_established = True
                if not self._admits(self._object.getpeercert()):
                    raise _NotAdmitted
            while part := self._object.read(_TLS_RECORD_BYTES):
                plain += part
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.is_end = True
        return plain

    def encrypt(self, data: bytes) -> bytes:
        self._object.write(data)
        return self.to_send()

    def to_send(self) -> bytes:
        return self._to_send.read()

    def last_words(self) -> bytes:
        """The alert that says why this is the end, or that it is the end."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it wants an answer, for which nobody will wait
        return self.to_send()


class _PacedSelector(selectors.DefaultSelector):
    """Lets the event loop have its share of the CPU, and after a quiet time a burst, and no more.

    A client can therefore make others wait, but not the training in whose process this runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved_up = CPU_BURST_SECONDS
        self._at: tuple[float, float] | None = None
        self._paused_at = 0.0

    def select(self, timeout: float | None = None) -> list:
        now, used = time.monotonic(), time.thread_time()
        if self._at is not None:
            earned = CPU_SHARE * (now - self._at[0]) - (used - self._at[1])
            self.saved_up = min(self.saved_up + earned, CPU_BURST_SECONDS)
        self._at = now, used
        if self.saved_up < 0 and used - self._paused_at > _SPELL_SECONDS:
            self._paused_at = used
            time.sleep(min(-self.saved_up / CPU_SHARE, _LONGEST_PAUSE_SECONDS))
        return super().select(timeout)


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    error = context.get("exception")
    if not isinstance(error, OSError):  # a client that breaks off, or fails a handshake, is none of our errors
        _log.error("%s", context["message"], exc_info=error)


_servers: weakref.WeakSet[HttpServer] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in _servers:
        server.abandon()


os.register_at_fork(after_in_child=_abandon_all)
