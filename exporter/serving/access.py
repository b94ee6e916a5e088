"""Who may read the endpoint, and how often."""

import asyncio
import contextlib
import hashlib
import math
import os
import secrets
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import bcrypt

from exporter.serving.web_config import WebConfig, WebConfigFile

_REMEMBERED_CHECKS = 1024
_NICENESS = 10
_BCRYPT_BYTES = 72  # bcrypt uses no more of a password


class Access:
    """Applies the newest version of a web configuration file to requests. Without a file every request is admitted.

    A thread of `_NICENESS` compares passwords, one at a time. At the lowest priority, with training on every core, a
    comparison would take longer than a scrape may. Results are kept under a keyed hash, so that memory holds no
    password for long, and a changed bcrypt hash is compared anew.
    """

    def __init__(self, file: WebConfigFile | None) -> None:
        self._file = file
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "passwords", getattr(os, "nice", lambda niceness: None), (_NICENESS,))
        if file is not None:
            self._thread.submit(lambda: None)  # start it now, before the process sets its lowest priority
        self._tokens, self._filled_at = math.inf, 0.0

    @property
    def config(self) -> WebConfig:
        return WebConfig() if self._file is None else self._file.current

    async def refusal(self, authorization: str) -> tuple[int, str, dict[str, str]] | None:
        """Status, text and headers if the request is refused: 429 too many, 401 not authenticated; None otherwise."""
        config = self.config
        if config.rate_limit is not None and not self._take_token(*config.rate_limit):
            return 429, "Too many requests.", {"Retry-After": "1"}
        if config.users and not await self._is_known(config.users, authorization):
            return 401, "Unauthorized.", {"WWW-Authenticate": 'Basic realm="metrics"'}
        return None

    def _take_token(self, interval: float, burst: int) -> bool:
        now = time.monotonic()
        tokens = min(self._tokens + (now - self._filled_at) / interval, burst)
        self._tokens, self._filled_at = tokens - (tokens >= 1), now
        return tokens >= 1

    async def _is_known(self, users: Mapping[str, str], authorization: str) -> bool:
        if not authorization:
            return False
        scheme, _, encoded = authorization.partition(" ")
        try:
            name, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
        except ValueError:
            return False
        user = name.decode(errors="replace")
        # An unknown user also costs a comparison, so that the time does not reveal which users exist.
        hashed = (users.get(user) or next(iter(users.values()))).encode()
        digest = hashlib.blake2b(
            b"".join(len(p).to_bytes(4) + p for p in (name, password, hashed)), key=self._key
        ).digest()

        def compare() -> bool:
            # Keep the result even if the client has given up: the next scrape will need it.
            self._known[digest] = bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed)
            return self._known[digest]

        is_right = self._known.get(digest)
        if is_right is None:
            is_right = await asyncio.get_running_loop().run_in_executor(self._thread, compare)
        with contextlib.suppress(KeyError):
            self._known.move_to_end(digest)
        while len(self._known) > _REMEMBERED_CHECKS:
            self._known.popitem(last=False)
        return is_right and user in users and bool(colon) and scheme.lower() == "basic"
