"""Who may read the endpoint, and how often."""

import asyncio
import hashlib
import secrets
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping

import bcrypt

from exporter.serving.web_config import WebConfigFile

_REMEMBERED_CHECKS = 1024
_BCRYPT_BYTES = 72  # bcrypt knows no more of a password


class Access:
    """Applies a web configuration file, in its newest version, to requests. Without a file all are let in.

    Passwords are compared one at a time, beside the event loop. Results are remembered under a keyed hash, so that
    memory holds no password for long and a changed bcrypt hash is a new question.
    """

    def __init__(self, file: WebConfigFile | None) -> None:
        self._file = file
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = asyncio.Lock()
        self._tokens, self._filled_at = 0.0, 0.0

    @property
    def headers(self) -> Mapping[str, str]:
        """To be added to every response."""
        return self._file.current.headers if self._file is not None else {}

    async def refusal(self, authorization: str) -> tuple[int, str, dict[str, str]] | None:
        """Status, text and headers for a request that is turned away: 429 too many, 401 not authenticated."""
        if self._file is None:
            return None
        config = self._file.current
        if config.rate_limit is not None and not self._take_token(*config.rate_limit):
            return 429, "Too many requests.", {"Retry-After": "1"}
        if config.users and not await self._is_known(config.users, authorization):
            return 401, "Unauthorized.", {"WWW-Authenticate": 'Basic realm="metrics"'}
        return None

    def _take_token(self, interval: float, burst: int) -> bool:
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._filled_at) / interval, burst)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    async def _is_known(self, users: Mapping[str, str], authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
        except ValueError:
            return False
        if scheme.lower() != "basic" or not colon:
            return False
        name = user.decode(errors="replace")
        # An unknown user costs a comparison too, so that time does not tell who is known.
        hashed = users.get(name) or next(iter(users.values()))
        parts = (user, password, hashed.encode())
        digest = hashlib.blake2b(b"".join(len(p).to_bytes(4) + p for p in parts), key=self._key).digest()
        if digest not in self._known:
            async with self._lock:
                if digest not in self._known:
                    is_right = await asyncio.to_thread(bcrypt.checkpw, password[:_BCRYPT_BYTES], hashed.encode())
                    self._known[digest] = is_right
                    while len(self._known) > _REMEMBERED_CHECKS:
                        self._known.popitem(last=False)
        return self._known.get(digest, False) and name in users
