"""Who may read the endpoint, how often, and the headers of every response."""

import asyncio
import hashlib
import secrets
import threading
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import bcrypt

from exporter.web.config import RateLimit, WebConfig, WebConfigFile
from exporter.web.connections import Request, Response

MAX_PASSWORD_CHECKS = 8
"""Password checks that may wait; each takes tens of milliseconds of CPU, which is what bcrypt is for."""
CHECKING_SHARE = 0.1
"""Of one core, that password checks take in the long run."""
_REMEMBERED_CHECKS = 1024
_BCRYPT_BYTES = 72  # bcrypt knows no more of a password


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

    def refusal(self, request: Request) -> Response | None | Awaitable[Response | None]:
        """Why the request is turned away: 429 too many, 401 not authenticated, 503 too many to authenticate.

        None where it is not. It takes time only to compare a password that was not compared before.
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
            return asyncio.get_running_loop().create_task(self._refusal_by_password(config.users, *credentials))
        return None if is_right else _unauthorized()

    async def _refusal_by_password(self, users: Mapping[str, str], user: str, password: bytes) -> Response | None:
        try:
            is_right = await self._passwords.are_right(users, user, password)
        except _Busy:
            return Response.text(HTTPStatus.SERVICE_UNAVAILABLE, "Too many passwords to check.", ("Retry-After", "1"))
        return None if is_right else _unauthorized()

    def close(self) -> None:
        """End the thread that checks passwords."""
        self._passwords.close()


def _unauthorized() -> Response:
    return Response.text(HTTPStatus.UNAUTHORIZED, "Unauthorized.", ("WWW-Authenticate", 'Basic realm="metrics"'))


class _Busy(Exception):
    """More password checks are waiting than may wait."""


class _Passwords:
    """Compares passwords with bcrypt hashes, one at a time, beside the serving thread and paced.

    Results are remembered, right and wrong ones, under a keyed hash of user, password and bcrypt hash, so that
    memory holds no password and a changed hash is a new question.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._waiting: dict[bytes, asyncio.Future[bool]] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._closed = threading.Event()
        self._free_at = 0.0

    def known(self, users: Mapping[str, str], user: str, password: bytes) -> bool | None:
        """What was found before; None where nothing was."""
        digest, _ = self._question(users, user, password)
        if digest not in self._known:
            return None
        self._known.move_to_end(digest)
        return self._known[digest] and user in users

    async def are_right(self, users: Mapping[str, str], user: str, password: bytes) -> bool:
        digest, hashed = self._question(users, user, password)
        if digest not in self._waiting:
            if len(self._waiting) >= MAX_PASSWORD_CHECKS:
                raise _Busy
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="metrics-passwords")
            checking = asyncio.get_running_loop().run_in_executor(self._worker, self._check, password, hashed)
            self._waiting[digest] = checking
            checking.add_done_callback(lambda done: self._checked(digest, done))
        return await asyncio.shield(self._waiting[digest]) and user in users

    def close(self) -> None:
        self._closed.set()
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

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

    def _check(self, password: bytes, hashed: str) -> bool:
        self._closed.wait(max(0.0, self._free_at - time.monotonic()))
        started = time.thread_time()
        try:
            return bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed.encode())
        finally:  # the answer goes out at once; it is the next check that waits
            self._free_at = time.monotonic() + (time.thread_time() - started) * (1 / CHECKING_SHARE - 1)

    def _checked(self, digest: bytes, done: asyncio.Future) -> None:
        del self._waiting[digest]
        if not done.cancelled() and done.exception() is None:
            self._known[digest] = done.result()
            while len(self._known) > _REMEMBERED_CHECKS:
                self._known.popitem(last=False)


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
