"""The web configuration file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md describes the format. Each key is
honoured or refused: a file that is not wholly understood must not protect an endpoint.
"""

import difflib
import ipaddress
import logging
import re
import ssl
import threading
import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exporter.link import WebConfigError

_RECHECK_SECONDS = 1.0
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_KEYS = {
    "tls_server_config": ("cert_file", "key_file", "client_ca_file", "client_auth_type", "client_allowed_sans")
    + ("min_version", "max_version"),
    "http_server_config": ("http2", "headers"),
    "http_server_config.headers": ("Content-Security-Policy", "X-Frame-Options", "X-Content-Type-Options")
    + ("X-XSS-Protection", "Strict-Transport-Security"),
    "rate_limit": ("interval", "burst"),
}
_NOT_SUPPORTED = ("cert", "key", "client_ca", "cipher_suites", "curve_preferences", "prefer_server_cipher_suites")
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us|µs|ns)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WebConfig:
    """What the file says.

    Attributes:
        tls: the keys of `tls_server_config`, with absolute paths; None for plain HTTP.
        users: name -> bcrypt hash.
        rate_limit: (seconds between two requests, requests at once), None for no limit.
        files: the file and those that it names, each with its state before it was read.
    """

    tls: Mapping[str, Any] | None = None
    http2: bool = True
    users: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    rate_limit: tuple[float, int] | None = None
    files: Mapping[Path, Any] = field(default_factory=dict)

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a client with this certificate, as `SSLObject.getpeercert()` gives it, may go on."""
        allowed = {_san(name) for name in (self.tls or {}).get("client_allowed_sans", ())}
        names = {_san(value) for _, value in (certificate or {}).get("subjectAltName", ())}
        return not allowed or not names.isdisjoint(allowed)


class WebConfigFile:
    """A web configuration file; a thread reads it again when it, or a file that it names, has changed.

    A version that cannot be used is logged, and the last good one stays in force. Certificates, users, headers, rate
    limit and `client_allowed_sans` are taken over; the rest, and switching TLS or users on or off, takes a restart.

    Attributes:
        current: the newest version that can be used.
        context: for the server, with the newest certificate; None for plain HTTP.

    Raises:
        WebConfigError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.current = _read(path)
        self.context = None if self.current.tls is None else _context(self.current)
        if self.context is not None:
            self.context.sslobject_class = self._ssl_object_class()
        threading.Thread(target=self._watch, name="web-config", daemon=True).start()

    @property
    def is_tls(self) -> bool:
        return self.context is not None

    def _ssl_object_class(self) -> type[ssl.SSLObject]:
        file = self

        class Admitting(ssl.SSLObject):
            def do_handshake(self) -> None:
                super().do_handshake()
                if not file.current.admits(self.getpeercert()):
                    raise ssl.SSLError("the client's certificate has none of client_allowed_sans")

        return Admitting

    def _watch(self) -> None:
        complaint = ""
        while True:
            time.sleep(_RECHECK_SECONDS)
            try:
                if all(_state(path) == state for path, state in self.current.files.items()):
                    continue
                self._take_over(_read(self._path))
                _log.warning("%s: read again", self._path)
                complaint = ""
            except Exception as error:
                if str(error) != complaint:
                    _log.error("%s; the configuration before stays in force", error)
                complaint = str(error)

    def _take_over(self, new: WebConfig) -> None:
        old = self.current
        if _fixed(new) != _fixed(old):
            raise WebConfigError(
                f"{self._path}: TLS and users are switched on or off, and everything in tls_server_config but "
                "certificates and client_allowed_sans is changed, by a restart only"
            )
        if self.context is not None:
            _context(new)  # a certificate without its key must not spoil the context in use
            self.context.load_cert_chain(new.tls["cert_file"], new.tls["key_file"])
        self.current = new


def _fixed(config: WebConfig) -> Any:
    tls = dict(config.tls or {})
    authority = tls.get("client_ca_file")
    free = ("cert_file", "key_file", "client_allowed_sans")
    kept = {key: value for key, value in tls.items() if key not in free}
    return bool(config.users), config.tls is None, config.http2, kept, config.files.get(authority)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> WebConfig:
    files = {path: _state(path)}
    try:
        root = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise WebConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WebConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        root = _section("", root, (*(name for name in _KEYS if "." not in name), "basic_auth_users"))
        tls, http, limit = (
            _section(name, root.get(name), _KEYS[name])
            for name in ("tls_server_config", "http_server_config", "rate_limit")
        )
        headers = _section("http_server_config.headers", http.get("headers"), _KEYS["http_server_config.headers"])
        for name, value in headers.items():
            if not isinstance(value, str) or not value.isascii() or not value.isprintable():
                raise WebConfigError(f"http_server_config.headers.{name}: cannot be a header's value: {value!r}")
        users = _section("basic_auth_users", root.get("basic_auth_users"), None)
        for name, hashed in users.items():
            if not isinstance(hashed, str) or not _BCRYPT.fullmatch(hashed):
                raise WebConfigError(
                    f"basic_auth_users.{name}: must be a bcrypt hash, such as `htpasswd -nBC 10 {name}` prints"
                )
        config = WebConfig(
            tls=_tls(path, tls, files) if root.get("tls_server_config") is not None else None,
            http2=_one_of("http_server_config.http2", http.get("http2", True), (True, False)),
            users={str(name): hashed for name, hashed in users.items()},
            headers=headers,
            rate_limit=_rate_limit(limit) if limit else None,
            files=files,
        )
        if config.tls is not None:
            _context(config)
    except WebConfigError as error:
        raise WebConfigError(f"{path}: {error}") from error.__cause__
    return config


def _section(name: str, value: Any, known: Iterable[str] | None) -> dict[str, Any]:
    """The keys of a mapping, all of them among `known`; those without a value are left out."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WebConfigError(f"{name or 'the file'}: expected `key: value` lines")
    for key in value if known is not None else ():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = "is not supported here" if key in _NOT_SUPPORTED else "unknown key"
            hint += f"; did you mean {nearest[0]}?" if nearest else ""
            raise WebConfigError(f"{name + '.' if name else ''}{key}: {hint}")
    return {key: item for key, item in value.items() if item is not None}


def _one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise WebConfigError(f"{name}: must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def _rate_limit(keys: Mapping[str, Any]) -> tuple[float, int] | None:
    text = str(keys.get("interval", ""))
    parts = _DURATION_PART.findall(text)
    if text in ("0", "0s"):
        return None  # which is how the format switches it off
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise WebConfigError(f"rate_limit.interval: must be a duration such as 1s or 100ms, got {text!r}")
    burst = keys.get("burst")
    if type(burst) is not int or burst < 1:
        raise WebConfigError(f"rate_limit.burst: must be a whole number of at least 1, got {burst!r}")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts), burst


def _tls(path: Path, keys: dict[str, Any], files: dict[Path, Any]) -> dict[str, Any]:
    for name in ("cert_file", "key_file", "client_ca_file"):
        if name in keys:
            keys[name] = path.parent / str(keys[name])
            files[keys[name]] = _state(keys[name])
            try:
                keys[name].read_bytes()
            except (OSError, ValueError) as error:
                raise WebConfigError(f"tls_server_config.{name}: cannot read {keys[name]}: {error}") from error
        elif name != "client_ca_file":
            raise WebConfigError(f"tls_server_config: needs {name}")
    for name in ("min_version", "max_version"):
        _one_of(f"tls_server_config.{name}", keys.setdefault(name, "TLS12" if name[1] == "i" else "TLS13"), _VERSIONS)
    auth = _one_of("tls_server_config.client_auth_type", keys.setdefault("client_auth_type", "NoClientCert"), _CLIENT_AUTH)
    if (auth == "NoClientCert") == ("client_ca_file" in keys):
        raise WebConfigError("tls_server_config: client_ca_file and a client_auth_type that verifies need each other")
    sans = keys.setdefault("client_allowed_sans", [])
    if not isinstance(sans, list) or (sans and auth != "RequireAndVerifyClientCert"):
        raise WebConfigError(
            "tls_server_config.client_allowed_sans: must be a list, and needs client_auth_type RequireAndVerifyClientCert"
        )
    return keys


def _context(config: WebConfig) -> ssl.SSLContext:
    def refuse_to_prompt() -> str:
        raise WebConfigError("tls_server_config.key_file: is encrypted, which is not supported here")

    tls = config.tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"] if config.http2 else ["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0  # scrapers do not resume sessions
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # any certificate in client_ca_file is trusted, not only a root
    try:
        context.minimum_version, context.maximum_version = _VERSIONS[tls["min_version"]], _VERSIONS[tls["max_version"]]
        context.load_cert_chain(tls["cert_file"], tls["key_file"], refuse_to_prompt)
        context.verify_mode = _CLIENT_AUTH[tls["client_auth_type"]]
        if "client_ca_file" in tls:
            context.load_verify_locations(cafile=tls["client_ca_file"])
    except (ssl.SSLError, ValueError) as error:
        if isinstance(error, WebConfigError):
            raise
        raise WebConfigError(f"tls_server_config: cannot be used: {getattr(error, 'reason', None) or error}") from error
    return context


def _san(value: str) -> str:
    """An alternative name as it is compared: addresses in one spelling."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return str(value)
