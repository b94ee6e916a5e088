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
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from functools import wraps
from http import HTTPStatus

import h11

REQUEST_SECONDS = 8.0
"""A connection has this long for its TLS handshake and a whole request, and again after each response."""
RESPONSE_SECONDS = 8.0
"""A client has this long to take its response."""
PATIENCE_SECONDS = 10.0
"""A response that is not ready at once may take this long, which is how long Prometheus waits."""
DRAIN_SECONDS = 1.0
"""A client whose request is not read to its end has this long to see that, before the connection is cut."""
MAX_CONNECTIONS = 600
"""Or as many as half of the descriptors that the process may have. One more closes the one that got its last answer,
or was opened, before all others."""
MAX_HEADER_BYTES = 16 * 1024
CPU_SHARE = 0.035
"""Of one core, that the serving thread takes in the long run; what it cannot do with that waits. The training loses
about twice as much, for every answer makes it change threads a few times. What is used at once is made up for by one
pause at most."""
CPU_BURST_SECONDS = 0.2
"""Of CPU time, that the serving thread saves up while it is idle."""
_LONGEST_PAUSE_SECONDS = 5.0  # a garbage collection, say, may fall to the serving thread, and take long
_SPELL_SECONDS = 0.005  # of CPU time between two pauses, so that they are few, and several clients are served
_ACCEPTED_AT_ONCE = 32  # which leaves most of a spell to those who are there
_RECEIVED_BYTES = 16 * 1024  # at a time
_MAX_DRAINED_BYTES = 256 * 1024
_LONGEST_FORK_DELAY_SECONDS = 1.0
_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The head of a request. Header names are in lower case, and a header that came twice is joined by a comma.

    Attributes:
        target: as on the request line.
        client: the client's address.
        will_take_old: the endpoint has used more than its share of the CPU, so that what was said a moment ago must do.
    """

    method: str
    target: str
    headers: dict[str, str]
    client: str = ""
    will_take_old: bool = False


@dataclass(frozen=True)
class Response:
    """A response; `Content-Length`, `Date` and `Connection` are added on the way.

    Attributes:
        ended: called when the client has taken all of it, or never will.
    """

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    ended: Callable[[], None] = lambda: None

    @classmethod
    def text(cls, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> "Response":
        return cls(status, (("Content-Type", "text/plain; charset=utf-8"), *headers), f"{text}\n".encode())


class HttpServer:
    """Serves `respond` from a thread of its own, from construction until `close()`.

    Args:
        respond: turns a request into a response, at once or by a task; runs in the serving thread.
        listener: a bound and listening socket, which the server takes over.
        tls: gives the context for a new connection, or None for plain HTTP.
        admits: says whether an established TLS connection may go on, from the client's certificate.
    """

    def __init__(
        self,
        respond: Callable[[Request], Response | asyncio.Task[Response]],
        listener: socket.socket,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        admits: Callable[[dict | None], bool] = lambda certificate: True,
    ) -> None:
        self.respond = respond
        self.tls = tls
        self.admits = admits
        self.connections: dict[_Connection, None] = {}  # the one that has not been answered for longest first
        self._to_read: deque[_Connection] = deque()
        self._max_connections = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._listener = listener
        self.selector = _PacedSelector(listener.fileno())
        self.loop = asyncio.SelectorEventLoop(self.selector)
        self.loop.set_exception_handler(_log_loop_error)
        self._is_out_of_descriptors = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="metrics-server", daemon=True)
        listener.setblocking(False)
        _servers.add(self)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and close every connection; nothing happens in a forked child, or the second time."""
        if self._pid == os.getpid() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.selector.hurry.set()
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                _log.warning("an answer has not come to its end for %g s; its clients still wait", _CLOSE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._listen()
        with self.selector.working:
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
                self.loop.close()

    def _listen(self) -> None:
        self.loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, (client, *_) = self._listener.accept()
            except OSError as error:  # most often that nobody else is there
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    if not self._is_out_of_descriptors:
                        _log.warning("no connection can be accepted until this works again: %s", error.strerror)
                    self._is_out_of_descriptors = True
                    self.loop.remove_reader(self._listener)
                    self.loop.call_later(1.0, self._listen)
                return
            self._is_out_of_descriptors = False
            if len(self.connections) >= self._max_connections:
                next(iter(self.connections)).abort()
            try:
                sock.setblocking(False)
                _Connection(self, sock, client)
            except Exception:
                sock.close()
                raise

    def read_in_turn(self, connection: "_Connection") -> None:
        """One between two looks at the clock: clients that have sent many requests at once take turns with others."""
        if not self._to_read:
            self.loop.call_soon(self._read_next)
        self._to_read.append(connection)

    def _read_next(self) -> None:
        connection = self._to_read.popleft()
        if self._to_read:
            self.loop.call_soon(self._read_next)
        connection.read()

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent, without a word to its clients."""
        self._listener.close()
        for connection in self.connections:
            connection.sock.close()
        self.selector.close()


def _ends_on_error(method: Callable[..., None]) -> Callable[..., None]:
    """An error of ours must not leave a connection behind that nobody tends any more."""

    @wraps(method)
    def guarded(connection: "_Connection", *args: object) -> None:
        try:
            method(connection, *args)
        except Exception:
            _log.exception("a connection had to be closed")
            connection.abort()

    return guarded


class _Connection:
    """One client: reads a request, writes its response, and so on until somebody has had enough.

    It is on sockets and not on asyncio's transports: opening one of those takes several times as long. Of a request
    that has a body only the head is read, and its connection ends with the answer. No more is received while there
    are whole requests to answer.
    """

    def __init__(self, server: HttpServer, sock: socket.socket, client: str) -> None:
        self.sock = sock
        self._descriptor = sock.fileno()  # by which asyncio finds its handlers faster than by the socket
        self._client = client
        self._tls: _Tls | None = None  # as long as the client has not said a word
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self._request: h11.Request | None = None
        self._response: Response | None = None
        self._unsent = memoryview(b"")
        self._drained_bytes = 0
        self._is_reading = self._is_writing = False
        self._is_answering = False
        self._is_closing = False
        self._must_drain = False
        self._task: asyncio.Task[Response] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._expect_request()

    def abort(self) -> None:
        """End the connection at once, whatever it is doing."""
        self._is_closing = True
        self._read_on(False)
        self._write_on(False)
        self._deadline.cancel()
        self._server.connections.pop(self, None)
        self._answered()
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
        self._server.connections.pop(self, None)
        self._server.connections[self] = None
        self._within(REQUEST_SECONDS)
        rest, is_end = self._http.trailing_data
        self._read_on(not (rest or is_end))
        if rest or is_end:  # which must not wait for more, nor keep others waiting
            self._server.read_in_turn(self)

    @_ends_on_error
    def _receive(self) -> None:
        try:
            data = self.sock.recv(_RECEIVED_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            return self.abort()
        if self._is_closing:
            return self._drain(data)
        is_end = not data
        if data and self._tls is None and (context := self._server.tls()) is not None:
            self._tls = _Tls(context, self._server.admits)
        if data and self._tls is not None:
            try:
                data = self._tls.decrypt(data)
            except (ssl.SSLError, _NotAdmitted):
                self._must_drain = True
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
        self.read()

    @_ends_on_error
    def read(self) -> None:
        """Deal with the next request of what has been received."""
        if self._is_answering or self._is_closing:
            return
        unread = len(self._http.trailing_data[0])
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            error.__traceback__ = None  # or it and its frames hold each other, and this connection, till the GC comes
            return self._refuse(HTTPStatus(error.error_status_hint))
        if event is h11.NEED_DATA:
            return self._read_on(True)
        if not isinstance(event, h11.Request):
            return self._close()
        if unread - len(self._http.trailing_data[0]) > MAX_HEADER_BYTES:
            return self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        self._respond(event, has_body=not self._is_at_end_of_message())

    def _is_at_end_of_message(self) -> bool:
        try:
            return isinstance(self._http.next_event(), h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            error.__traceback__ = None
            return False

    def _begin_answer(self, request: h11.Request | None, is_last: bool) -> None:
        self._request = request
        self._is_answering = True
        self._must_drain = is_last
        self._within(RESPONSE_SECONDS)

    def _refuse(self, status: HTTPStatus) -> None:
        self._begin_answer(None, is_last=True)
        self._send(Response.text(status, status.phrase))

    def _respond(self, head: h11.Request, has_body: bool) -> None:
        self._begin_answer(head, is_last=has_body)
        headers: dict[str, str] = {}
        for name, value in head.headers:
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        request = Request(
            head.method.decode("ascii"),
            head.target.decode("latin-1"),
            headers,
            self._client,
            self._server.selector.is_overdrawn,
        )
        try:
            response = self._server.respond(request)
        except Exception:
            response = _internal_error()
        if isinstance(response, Response):
            return self._send(response)
        self._task = response
        self._within(PATIENCE_SECONDS)
        response.add_done_callback(self._respond_late)

    @_ends_on_error
    def _respond_late(self, done: asyncio.Task[Response]) -> None:
        self._task = None
        if done.cancelled():
            return self.abort()
        try:
            response = done.result()
        except Exception:
            response = _internal_error()
        if self._is_closing:
            return response.ended()
        self._within(RESPONSE_SECONDS)
        self._send(response)

    def _send(self, response: Response) -> None:
        self._response = response
        headers = [
            *response.headers,
            ("Content-Length", str(len(response.body))),
            ("Date", formatdate(usegmt=True)),
        ]
        if self._must_drain or self._http.their_state not in (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL):
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

    def _answered(self) -> None:
        self._is_answering = False
        if self._response is not None:
            response, self._response = self._response, None
            response.ended()

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
            return self._end()
        # TLS has messages of its own to flush before a response.
        if self._is_answering and self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY):
            self._answered()
            if self._http.our_state is not h11.DONE:
                return self._close()
            self._http.start_next_cycle()
            self._expect_request()

    def _end(self) -> None:
        """All is sent. Closing a socket on what was not read cuts the connection before the answer has arrived."""
        if not self._must_drain:
            return self.abort()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.abort()
        self._within(DRAIN_SECONDS)
        self._read_on(True)

    def _drain(self, data: bytes) -> None:
        self._drained_bytes += len(data)
        if not data or self._drained_bytes > _MAX_DRAINED_BYTES:
            self.abort()


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
            while part := self._object.read(_RECEIVED_BYTES):
                plain += part
            self.is_end = True
        except ssl.SSLWantReadError:
            pass
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

    It gives the loop one event at a time, and looks at the clock between two. A client can therefore make others wait,
    but not the training in whose process this runs.

    Args:
        first: a descriptor that is looked at after every pause, whoever else has waited.

    Attributes:
        saved_up: seconds of CPU time that may be used at once; below 0 the loop has used more than its share.
        hurry: once it is set there are no pauses any more.
        working: held while the loop does something, and not while it waits.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first
        self.saved_up = CPU_BURST_SECONDS
        self.hurry = threading.Event()
        self.working = threading.RLock()
        self._at: tuple[float, float] | None = None
        self._paused_at = 0.0
        self._ready: deque[tuple[selectors.SelectorKey, int]] = deque()

    @property
    def is_overdrawn(self) -> bool:
        """Whether more than the share has been used."""
        return self.saved_up < 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        now, used = time.monotonic(), time.thread_time()
        if self._at is not None:
            earned = CPU_SHARE * (now - self._at[0]) - (used - self._at[1])
            self.saved_up = min(self.saved_up + earned, CPU_BURST_SECONDS)
            self.saved_up = max(self.saved_up, -_LONGEST_PAUSE_SECONDS * CPU_SHARE)
        self._at = now, used
        self.working.release()
        try:
            if self.is_overdrawn and used - self._paused_at > _SPELL_SECONDS:
                self._paused_at = used
                self.hurry.wait(-self.saved_up / CPU_SHARE)
                if (key := self.get_map().get(self._first)) is not None:
                    self._ready.appendleft((key, selectors.EVENT_READ))
            if not self._ready:
                self._ready.extend(super().select(timeout))
        finally:
            self.working.acquire()
        while self._ready:
            key, events = self._ready.popleft()
            # Meanwhile somebody may have lost interest.
            key = self.get_map().get(key.fd)
            if key is not None and (events := events & key.events):
                return [(key, events)]
        return []


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    error = context.get("exception")
    if not isinstance(error, OSError):  # a client that breaks off, or fails a handshake, is none of our errors
        _log.error("%s", context["message"], exc_info=error)


_servers: weakref.WeakSet[HttpServer] = weakref.WeakSet()
_fork = threading.local()


def _await_rest() -> None:
    """Before a fork, so that the child knows of every socket, and of none that is being closed."""
    waits = [(each.selector, each.selector.working.acquire(timeout=_LONGEST_FORK_DELAY_SECONDS)) for each in _servers]
    _fork.held = [selector for selector, is_held in waits if is_held]


def _go_on() -> None:
    for selector in _fork.held:
        selector.working.release()


def _abandon_all() -> None:
    for server in _servers:
        server.abandon()
    _servers.clear()


os.register_at_fork(before=_await_rest, after_in_parent=_go_on, after_in_child=_abandon_all)
