"""The web configuration file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md describes the format. Each key is
applied or refused: a file that is only partly understood must not protect an endpoint.
"""

import difflib
import ipaddress
import logging
import re
import ssl
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from exporter.child import WebConfigError

_RECHECK_SECONDS = 1.0
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_HEADERS = (
    *("Content-Security-Policy", "Strict-Transport-Security"),
    *("X-Content-Type-Options", "X-Frame-Options", "X-XSS-Protection"),
)
_NOT_SUPPORTED = ("cert", "key", "client_ca", "cipher_suites", "curve_preferences", "prefer_server_cipher_suites")
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us|µs|ns)")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)

FileState = tuple[int, int, int] | None
"""Modification time, size and inode of a file; None if it does not exist."""


@dataclass(frozen=True)
class TLSConfig:
    """The keys of `tls_server_config`, with complete paths."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None
    client_auth_type: ssl.VerifyMode
    client_allowed_sans: frozenset[str]
    min_version: ssl.TLSVersion
    max_version: ssl.TLSVersion

    @property
    def fixed(self) -> object:
        """The part that cannot change while the endpoint serves."""
        return self.client_ca_file, self.client_auth_type, self.min_version, self.max_version


@dataclass(frozen=True)
class WebConfig:
    """The content of the file.

    Attributes:
        tls: None for plain HTTP.
        users: name -> bcrypt hash.
        rate_limit: (seconds between two requests, requests at once); None for no limit.
        files: the file and those that it names, each with its state before reading.
    """

    tls: TLSConfig | None = None
    http2: bool = True
    users: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    rate_limit: tuple[float, int] | None = None
    files: Mapping[Path, FileState] = field(default_factory=dict)

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a client with this certificate, from `SSLObject.getpeercert()`, is admitted."""
        allowed = self.tls.client_allowed_sans if self.tls else frozenset()
        names = {_san(value) for _, value in (certificate or {}).get("subjectAltName", ())}
        return not allowed or not names.isdisjoint(allowed)

    @property
    def fixed(self) -> object:
        """The part that cannot change while the endpoint serves."""
        tls = self.tls and (self.tls.fixed, self.tls.client_ca_file and self.files[self.tls.client_ca_file])
        return tls, self.http2, bool(self.users)


class WebConfigFile:
    """A web configuration file; a thread reads it again when it or a file that it names has changed.

    A version that cannot be used is logged, and the previous version stays in use.

    Attributes:
        current: the newest usable version.
        context: TLS context of the server, with the newest certificate; None for plain HTTP.

    Raises:
        WebConfigError: the file cannot be used; the message names it and the key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.current, self.context = _read(path)
        if self.context is not None:
            file = self

            class Admitting(ssl.SSLObject):
                def do_handshake(self) -> None:
                    super().do_handshake()
                    if not file.current.admits(self.getpeercert()):
                        raise ssl.SSLError("the client's certificate has none of client_allowed_sans")

            self.context.sslobject_class = Admitting
        threading.Thread(target=self._watch, name="web-config", daemon=True).start()

    def _watch(self) -> None:
        complaint = ""
        while True:
            time.sleep(_RECHECK_SECONDS)
            try:
                if any(_state(path) != state for path, state in self.current.files.items()):
                    self._take_over(_read(self._path)[0])
                    _log.warning("%s: read again", self._path)
                complaint = ""
            except Exception as error:
                if str(error) != complaint:
                    _log.error("%s; the previous configuration stays in use", error)
                complaint = str(error)

    def _take_over(self, new: WebConfig) -> None:
        if new.fixed != self.current.fixed:
            raise WebConfigError(
                f"{self._path}: restart to switch TLS or users on or off, or to change anything in tls_server_config "
                "except the certificate, its key and client_allowed_sans"
            )
        if self.context is not None and new.tls is not None:
            self.context.load_cert_chain(new.tls.cert_file, new.tls.key_file)
        self.current = new


def _state(path: Path) -> FileState:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class _Loader(yaml.SafeLoader):
    """Refuses a duplicate key; YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key is set twice", problem_mark=node.start_mark)
        return mapping


def _read(path: Path) -> tuple[WebConfig, ssl.SSLContext | None]:
    files: dict[Path, FileState] = {path: _state(path)}
    try:
        root = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        config = _config(path, root, files)
        return config, None if config.tls is None else _context(config.tls, config.http2)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise WebConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeError, RecursionError) as error:
        raise WebConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise WebConfigError(f"{path}: {error}") from error


def _config(path: Path, root: Any, files: dict[Path, FileState]) -> WebConfig:
    root = _section("", root, ("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit"))
    tls = _section("tls_server_config", root.get("tls_server_config"), [f.name for f in fields(TLSConfig)])
    http = _section("http_server_config", root.get("http_server_config"), ("http2", "headers"))
    headers = _section("http_server_config.headers", http.get("headers"), _HEADERS)
    users = _section("basic_auth_users", root.get("basic_auth_users"))
    for name, value in headers.items():
        text = str(value)
        _require(text.isascii() and text.isprintable(), f"http_server_config.headers.{name}", "a header's value", value)
    for name, hashed in users.items():
        is_hash = _BCRYPT.fullmatch(str(hashed)) is not None
        _require(is_hash, f"basic_auth_users.{name}", f"a bcrypt hash, such as `htpasswd -nBC 10 {name}` prints")
    http2 = http.get("http2", True)
    _require(isinstance(http2, bool), "http_server_config.http2", "true or false", http2)
    return WebConfig(
        tls=_tls(path, tls, files) if "tls_server_config" in root else None,
        http2=http2,
        users={str(name): hashed for name, hashed in users.items()},
        headers={name: str(value) for name, value in headers.items() if value != ""},
        rate_limit=_rate_limit(_section("rate_limit", root.get("rate_limit"), ("interval", "burst"))),
        files=files,
    )


def _require(condition: bool, name: str, what: str, *got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: must be {what}" + (f", got {got[0]!r}" if got else ""))


def _section(name: str, value: Any, known: Collection[str] | None = None) -> dict[str, Any]:
    """The keys of a mapping. With `known`, other keys are refused and keys without a value are left out."""
    _require(value is None or isinstance(value, dict), name or "the file", "`key: value` lines")
    keys: dict[str, Any] = value or {}
    if known is None:
        return keys
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = "is not supported here" if key in _NOT_SUPPORTED else "unknown key"
            raise ValueError(f"{name}.{key}: {hint}{f'; did you mean {nearest[0]}?' if nearest else ''}".lstrip("."))
    return {key: item for key, item in keys.items() if item is not None}


def _rate_limit(keys: Mapping[str, Any]) -> tuple[float, int] | None:
    interval, burst = str(keys.get("interval", "0")), keys.get("burst")
    if interval in ("0", "0s") and not burst:
        return None  # the format's way to switch it off
    parts = _DURATION_PART.findall(interval)
    is_duration = "".join(map("".join, parts)) == interval != ""
    _require(is_duration, "rate_limit.interval", "a duration such as 1m30s or 100ms", interval)
    if type(burst) is not int or burst < 1:
        raise ValueError(f"rate_limit.burst: must be a whole number of at least 1, got {burst!r}")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts), burst


def _tls(path: Path, given: Mapping[str, Any], files: dict[Path, FileState]) -> TLSConfig:
    def file(name: str) -> Path:
        _require(name in given, f"tls_server_config.{name}", "given")
        file = path.parent / str(given[name])
        files[file] = _state(file)
        _require(files[file] is not None, f"tls_server_config.{name}", "a file that is there", str(file))
        return file

    def choice(name: str, choices: Mapping[str, _T], default: str) -> _T:
        value = given.get(name, default)
        is_known = isinstance(value, str) and value in choices
        _require(is_known, f"tls_server_config.{name}", f"one of {', '.join(choices)}", value)
        return choices[value]

    sans = given.get("client_allowed_sans", [])
    tls = TLSConfig(
        cert_file=file("cert_file"),
        key_file=file("key_file"),
        client_ca_file=file("client_ca_file") if "client_ca_file" in given else None,
        client_auth_type=choice("client_auth_type", _CLIENT_AUTH, "NoClientCert"),
        client_allowed_sans=frozenset(map(_san, sans if isinstance(sans, list) else ())),
        min_version=choice("min_version", _VERSIONS, "TLS12"),
        max_version=choice("max_version", _VERSIONS, "TLS13"),
    )
    _require(tls.min_version <= tls.max_version, "tls_server_config.min_version", "at most max_version")
    is_verifying = tls.client_auth_type is not ssl.CERT_NONE
    rule = "given if, and only if, client_auth_type verifies"
    _require((tls.client_ca_file is not None) == is_verifying, "tls_server_config.client_ca_file", rule)
    rule = "a list of names, with client_auth_type RequireAndVerifyClientCert"
    is_required = tls.client_auth_type is ssl.CERT_REQUIRED
    is_right = is_required if tls.client_allowed_sans else "client_allowed_sans" not in given
    _require(is_right, "tls_server_config.client_allowed_sans", rule)
    return tls


def _context(tls: TLSConfig, http2: bool) -> ssl.SSLContext:
    def refuse_to_prompt() -> str:
        raise ValueError("tls_server_config.key_file: is encrypted, which is not supported here")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0  # scrapers do not resume sessions
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # like Go, accept an authority that is not a root
    context.minimum_version, context.maximum_version = tls.min_version, tls.max_version
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, refuse_to_prompt)
        context.verify_mode = tls.client_auth_type
        if tls.client_ca_file is not None:
            context.load_verify_locations(cafile=tls.client_ca_file)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ValueError(f"tls_server_config: certificate, key or client_ca_file cannot be used: {reason}") from error
    return context


def _san(value: object) -> str:
    """An alternative name for comparison: addresses in a canonical form."""
    try:
        return str(ipaddress.ip_address(str(value)))
    except ValueError:
        return str(value)
