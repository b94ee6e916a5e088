"""Who may read the endpoint, how often, and the headers of every response."""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import threading
import time
from base64 import b64decode
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

import bcrypt

from exporter.web.config import RateLimit, WebConfig, WebConfigFile
from exporter.web.connections import Request, Response

CHECKING_SHARE = 0.1
"""Of one core, that password checks take in the long run."""
_REMEMBERED_CHECKS = 1024
_BCRYPT_BYTES = 72  # bcrypt knows no more of a password
_log = logging.getLogger(__name__)


class Access:
    """Applies a web configuration file, in its newest valid version, to requests. Without a file all are let in."""

    def __init__(self, file: WebConfigFile | None = None) -> None:
        self._file = file
        self._passwords = _Passwords()
        self._bucket = _TokenBucket(None)

    @property
    def _config(self) -> WebConfig:
        return self._file.current() if self._file is not None else WebConfig()

    def headers(self, response: Response) -> tuple[tuple[str, str], ...]:
        """Configured headers, without those that the response has of its own."""
        own = {name.lower() for name, _ in response.headers}
        return tuple((name, value) for name, value in self._config.headers.items() if name.lower() not in own)

    def refusal(self, request: Request) -> Response | None | Callable[[], Awaitable[Response | None]]:
        """Why the request is turned away, 429 too many or 401 not authenticated; None where it is not.

        It takes time to compare a password that was not compared before: then what to call for the answer.
        """
        config = self._config
        if config.rate_limit != self._bucket.limit:
            self._bucket = _TokenBucket(config.rate_limit)
        if not self._bucket.take():
            return Response.text(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests.", ("Retry-After", "1"))
        if not config.users:
            return None
        credentials = _credentials(request.headers.get("authorization", ""))
        if credentials is None:
            return _unauthorized()
        is_right = self._passwords.known(config.users, *credentials)
        if is_right is None:
            return partial(self._refusal_by_password, config.users, *credentials, request.client)
        return None if is_right else _unauthorized()

    async def _refusal_by_password(
        self, users: Mapping[str, str], user: str, password: bytes, client: str
    ) -> Response | None:
        is_right = await self._passwords.are_right(users, user, password, client)
        if is_right is None:
            return Response.text(HTTPStatus.SERVICE_UNAVAILABLE, "Passwords cannot be compared now; see the log.")
        return None if is_right else _unauthorized()


def _unauthorized() -> Response:
    return Response.text(HTTPStatus.UNAUTHORIZED, "Unauthorized.", ("WWW-Authenticate", 'Basic realm="metrics"'))


@dataclass(eq=False)
class _Question:
    """Whether a password is that of a bcrypt hash, which a client at this address was the first to ask."""

    client: str
    digest: bytes
    password: bytes
    hashed: str
    answer: asyncio.Future[bool | None]
    askers: int = 0


class _Passwords:
    """Compares passwords with bcrypt hashes, one at a time, beside the serving thread and paced.

    Clients take turns by their addresses, so that who guesses waits for itself. Results are remembered, right and
    wrong ones, under a keyed hash of user, password and bcrypt hash, so that memory holds no password for long and a
    changed hash is a new question.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._asked: dict[bytes, _Question] = {}
        self._turns: OrderedDict[str, deque[_Question]] = OrderedDict()  # by client, the next one first
        self._checking: asyncio.Task[None] | None = None
        self._is_failing = False

    def known(self, users: Mapping[str, str], user: str, password: bytes) -> bool | None:
        """What was found before; None where nothing was."""
        digest, _ = self._question(users, user, password)
        if digest not in self._known:
            return None
        self._known.move_to_end(digest)
        return self._known[digest] and user in users

    async def are_right(self, users: Mapping[str, str], user: str, password: bytes, client: str) -> bool | None:
        """Whether `user` has this password, found out when it is the turn of `client`; None where it cannot be."""
        loop = asyncio.get_running_loop()
        digest, hashed = self._question(users, user, password)
        question = self._asked.get(digest)
        if question is None:
            question = self._asked[digest] = _Question(client, digest, password, hashed, loop.create_future())
            self._turns.setdefault(client, deque()).append(question)
            if self._checking is None or self._checking.done():
                self._checking = loop.create_task(self._check_all())
        question.askers += 1
        try:
            is_right = await asyncio.shield(question.answer)
            return is_right and user in users
        finally:
            question.askers -= 1
            questions = self._turns.get(question.client, ())
            if not question.askers and question in questions:  # nobody waits for the answer any more
                questions.remove(question)
                del self._asked[digest]

    async def _check_all(self) -> None:
        while self._turns:
            client, questions = self._turns.popitem(last=False)
            if not questions:
                continue
            question = questions.popleft()
            self._turns[client] = questions  # at the end
            try:
                is_right, seconds = await _compare(question.password, question.hashed)
            except Exception as error:  # no thread is to be had, say
                is_right, seconds = None, CHECKING_SHARE
                if not self._is_failing:
                    _log.error("passwords cannot be compared until this works again: %s", error)
            else:
                self._known[question.digest] = is_right
                while len(self._known) > _REMEMBERED_CHECKS:
                    self._known.popitem(last=False)
            self._is_failing = is_right is None
            del self._asked[question.digest]
            question.answer.set_result(is_right)
            # The answer goes out at once; it is the next question that waits.
            await asyncio.sleep(seconds * (1 / CHECKING_SHARE - 1))

    def _question(self, users: Mapping[str, str], user: str, password: bytes) -> tuple[bytes, str]:
        """What is asked, as a digest, and the hash to compare with.

        An unknown user's password is compared with somebody's hash, the same one each time, so that neither time nor
        its spread over users with hashes of different cost tells who is known.
        """
        pick = int.from_bytes(self._digest(user.encode())) % len(users)
        hashed = users.get(user) or list(users.values())[pick]
        return self._digest(user.encode(), password, hashed.encode()), hashed

    def _digest(self, *parts: bytes) -> bytes:
        message = b"".join(len(part).to_bytes(4) + part for part in parts)
        return hashlib.blake2b(message, key=self._key, digest_size=32).digest()


def _compare(password: bytes, hashed: str) -> asyncio.Future[tuple[bool, float]]:
    """Whether they belong together, and the seconds of CPU time that it took, from a thread that nobody waits for.

    Raises:
        RuntimeError: no thread can be started, or bcrypt fails.
    """
    loop = asyncio.get_running_loop()
    compared: asyncio.Future[tuple[bool, float]] = loop.create_future()

    def settle(result: tuple[bool, float] | Exception) -> None:
        if compared.done():
            return
        if isinstance(result, Exception):
            compared.set_exception(result)
        else:
            compared.set_result(result)

    def compare() -> None:
        started = time.thread_time()
        try:
            is_right = bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed.encode())
            result = is_right, time.thread_time() - started
        except BaseException as error:  # a panic in Rust is no Exception
            result = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the server is closed
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=compare, name="metrics-passwords", daemon=True).start()
    return compared


class _TokenBucket:
    def __init__(self, limit: RateLimit | None) -> None:
        self.limit = limit
        self._tokens = float(limit.burst) if limit is not None else 0.0
        self._at = time.monotonic()

    def take(self) -> bool:
        if self.limit is None:
            return True
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._at) / self.limit.interval_seconds, self.limit.burst)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def _credentials(authorization: str) -> tuple[str, bytes] | None:
    """User and password of an Authorization header (RFC 7617), or None where it holds none."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
    except ValueError:
        return None
    return (user.decode(errors="replace"), password) if colon else None
