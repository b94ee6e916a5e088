"""The web configuration file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.

https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md describes the format. Here every
key is either honoured or refused, and a file that is not wholly understood is no file to protect an endpoint with.
"""

import contextlib
import difflib
import ipaddress
import logging
import math
import re
import ssl
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import yaml

_RECHECK_SECONDS = 1.0
_PATIENCE_SECONDS = 0.2
_log = logging.getLogger(__name__)

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_UNVERIFIED_CLIENT_AUTH = ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert")
_CURVES = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
# What Go calls them, and OpenSSL. Those of TLS 1.3 are always on, in both.
_TLS13_CIPHERS = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
_CIPHERS = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_RSA_WITH_AES_128_CBC_SHA": "AES128-SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA": "AES256-SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384": "AES256-GCM-SHA384",
}
_HEADERS = {
    "Content-Security-Policy": None,
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-Content-Type-Options": ("nosniff",),
    "X-XSS-Protection": None,
    "Strict-Transport-Security": None,
}
# The last character of the 16 bytes of salt carries two bits.
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_MAX_BURST = 1_000_000
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|s|us|µs|ns)")


class WebConfigError(ValueError):
    """The file cannot be used; the message names it, the line and the key."""


FileState = tuple[int, int, int]
"""Time of the last change in nanoseconds, size and inode: what tells one version of a file from another."""


@dataclass(frozen=True)
class RateLimit:
    """A token bucket: a request every `interval_seconds` (> 0), and up to `burst` (>= 1) at once."""

    interval_seconds: float
    burst: int


@dataclass(frozen=True)
class WebConfig:
    """What the file says. `tls` is None for plain HTTP; `users` maps names to bcrypt hashes."""

    tls: ssl.SSLContext | None = None
    client_sans: frozenset[str] = frozenset()
    users: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    rate_limit: RateLimit | None = None
    files: Mapping[Path, "FileState | None"] = field(default_factory=lambda: MappingProxyType({}))
    """The file and those that it names, as they were before they were read."""

    def admits(self, certificate: dict | None) -> bool:
        """Whether a client with this certificate, as `SSLSocket.getpeercert()` gives it, may go on."""
        if not self.client_sans:
            return True
        names = {_san(value) for _, value in (certificate or {}).get("subjectAltName", ())}
        return not names.isdisjoint(self.client_sans)


class WebConfigFile:
    """A web configuration file that is read again when it, or a file that it names, has changed.

    A new version that cannot be used is logged, and the last good one stays in force. Whether there is TLS, and
    whether there are users, is settled at the start: a file that is half written must not open the endpoint.

    Raises:
        WebConfigError: the file cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._config = read_web_config(self._path)
        self._checked_at = time.monotonic()
        self._complaint = ""
        self._check: threading.Thread | None = None

    @property
    def is_tls(self) -> bool:
        return self._config.tls is not None

    def current(self) -> WebConfig:
        """The newest version that can be used; the files are looked at once a second at most.

        That happens in a thread, for a file system that does not answer must not keep the endpoint from answering.
        Meanwhile the version before is in force.
        """
        is_due = time.monotonic() - self._checked_at >= _RECHECK_SECONDS
        if is_due and (self._check is None or not self._check.is_alive()):
            self._checked_at = time.monotonic()
            self._check = threading.Thread(target=self._look, name="metrics-config", daemon=True)
            try:
                self._check.start()
            except RuntimeError:  # there are too many already
                self._look()
            else:
                self._check.join(_PATIENCE_SECONDS)
        return self._config

    def _look(self) -> None:
        try:
            if any(_state(path) != state for path, state in self._config.files.items()):
                self._reload()
        except Exception as error:
            self._complain(f"{self._path}: {error!r}")

    def _reload(self) -> None:
        """As often as it takes: what fails now may be on its way."""
        try:
            config = read_web_config(self._path)
            for what, is_on, was_on in (
                ("TLS is", config.tls is not None, self._config.tls is not None),
                ("users are", bool(config.users), bool(self._config.users)),
            ):
                if is_on != was_on:
                    raise WebConfigError(f"{self._path}: {what} switched on or off by a restart only")
        except WebConfigError as error:
            self._complain(str(error))
        else:
            self._config, self._complaint = config, ""
            _log.info("%s: read again", self._path)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            _log.error("%s; the configuration before stays in force", complaint)
        self._complaint = complaint


def _state(path: Path) -> FileState | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_web_config(path: Path) -> WebConfig:
    """The configuration in the file at `path`.

    Raises:
        WebConfigError: the file, or one that it names, cannot be read or used.
    """
    files = {path: _state(path)}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WebConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise WebConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError:
        raise WebConfigError(f"{path}: nested too deeply") from None
    settings: dict[str, object] = {}
    if node is not None:
        root = _Key(path, "", node, node.start_mark.line + 1, files).section(
            "tls_server_config", "http_server_config", "basic_auth_users", "rate_limit"
        )
        if "tls_server_config" in root:
            settings |= _tls(root["tls_server_config"])
        if "http_server_config" in root:
            settings |= _http(root["http_server_config"])
        if "basic_auth_users" in root:
            settings["users"] = MappingProxyType(
                {name: key.bcrypt_hash() for name, key in dict(root["basic_auth_users"].items()).items()}
            )
        if "rate_limit" in root:
            settings["rate_limit"] = _rate_limit(root["rate_limit"])
    return WebConfig(**settings, files=MappingProxyType(files))


@dataclass(frozen=True)
class _Key:
    """A key of the file, the node behind it, and where it stands; what is read on the way is noted in `files`."""

    path: Path
    name: str
    node: yaml.Node
    line: int
    files: dict[Path, FileState | None]

    def error(self, message: str) -> WebConfigError:
        return WebConfigError(f"{self.path}:{self.line}: {self.name + ': ' if self.name else ''}{message}")

    def items(self) -> Iterable[tuple[str, "_Key"]]:
        """The keys below this one; a key without a value has none."""
        if self._is_null(self.node):
            return
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("expected `key: value` lines")
        seen: dict[str, int] = {}
        for key_node, value in self.node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise WebConfigError(f"{self.path}:{line}: a key must be a word")
            key = _Key(self.path, f"{self.name}.{key_node.value}".lstrip("."), value, line, self.files)
            if key_node.value in seen:
                raise key.error(f"is there twice, before in line {seen[key_node.value]}")
            seen[key_node.value] = line
            yield key_node.value, key

    def section(self, *known: str) -> dict[str, "_Key"]:
        """The keys below this one, all of which are among `known`; those without a value, or an empty one, are left out."""
        found = {}
        for name, key in self.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                raise key.error("unknown key" + (f"; did you mean {nearest[0]}?" if nearest else ""))
            found[name] = key
        return {name: key for name, key in found.items() if not self._is_null(key.node) and key.node.value != ""}

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or self._is_null(self.node):
            raise self.error("expected a text")
        return self.node.value

    def one_of(self, choices: Iterable[str]) -> str:
        if (text := self.text()) not in choices:
            raise self.error(f"must be one of {', '.join(choices)}, got {text!r}")
        return text

    def texts(self) -> list["_Key"]:
        """The elements of a list, each with its own line."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list")
        return [_Key(self.path, self.name, node, node.start_mark.line + 1, self.files) for node in self.node.value]

    def boolean(self) -> bool:
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != "tag:yaml.org,2002:bool":
            raise self.error("must be true or false")
        return self.node.value.lower() in ("true", "yes", "on")

    def file(self) -> Path:
        """A file that can be read; a relative path begins at the folder of the configuration file."""
        try:
            path = self.path.parent / self.text()
            self.files[path] = _state(path)
            path.read_bytes()
        except (OSError, ValueError) as error:
            raise self.error(f"cannot read {self.text()!r}: {getattr(error, 'strerror', None) or error}") from error
        return path

    @contextlib.contextmanager
    def as_file(self) -> Iterator[Path]:
        """The file that the key names, or one that holds its text: OpenSSL loads from files only."""
        if self.name.endswith("_file"):
            yield self.file()
            return
        with tempfile.TemporaryDirectory() as folder:  # this user's alone
            path = Path(folder, "inline")
            try:
                path.write_text(self.text(), encoding="utf-8")
            except UnicodeEncodeError as error:
                raise self.error(str(error)) from error
            yield path

    def bcrypt_hash(self) -> str:
        if not _BCRYPT.fullmatch(hashed := self.text()):
            raise self.error("must be a bcrypt hash, such as `htpasswd -nBC 10 USER` prints")
        return hashed

    def seconds(self) -> float:
        """A duration as Go writes it, 1m30s say."""
        text = self.text()
        parts = _DURATION_PART.findall(text)
        if text != "0" and (not parts or "".join(number + unit for number, unit in parts) != text):
            raise self.error(f"must be a duration such as 1s or 100ms, got {text!r}")
        if not math.isfinite(seconds := sum(float(number) * _SECONDS[unit] for number, unit in parts)):
            raise self.error(f"is too long: {text[:20]!r}")
        return seconds

    @staticmethod
    def _is_null(node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _http(key: _Key) -> dict[str, object]:
    keys = key.section("http2", "headers")
    if "http2" in keys and keys["http2"].boolean():
        raise keys["http2"].error("HTTP/2 is not supported here; set it to false, or leave it out for HTTP/1.1")
    headers = {}
    for name, header in keys["headers"].section(*_HEADERS).items() if "headers" in keys else ():
        value = header.one_of(_HEADERS[name]) if _HEADERS[name] and header.text() else header.text()
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise header.error(f"cannot be a header's value: {value!r}")
        if value:
            headers[name] = value
    return {"headers": MappingProxyType(headers)}


def _rate_limit(key: _Key) -> RateLimit | None:
    keys = key.section("interval", "burst")
    interval = keys["interval"].seconds() if "interval" in keys else None
    if interval == 0:
        return None  # which is how the format switches it off
    _require_all(key, keys, "interval", "burst")
    burst = keys["burst"].text()
    if not re.fullmatch(r"[1-9]\d{0,6}", burst) or int(burst) > _MAX_BURST:
        raise keys["burst"].error(f"must be a whole number from 1 to {_MAX_BURST}, got {burst[:20]!r}")
    return RateLimit(interval, int(burst))


def _require_all(parent: _Key, keys: Mapping[str, _Key], *names: str) -> None:
    missing = [name for name in names if name not in keys]
    if missing:
        place = next((keys[name] for name in names if name in keys), parent)
        raise place.error(f"needs {' and '.join(missing)} as well")


def _tls(key: _Key) -> dict[str, object]:
    keys = key.section(
        *("cert", "key", "client_ca", "cert_file", "key_file", "client_ca_file"),
        *("client_auth_type", "client_allowed_sans", "min_version", "max_version"),
        *("cipher_suites", "prefer_server_cipher_suites", "curve_preferences"),
    )
    for inline in ("cert", "key", "client_ca"):
        if inline in keys and f"{inline}_file" in keys:
            raise keys[inline].error(f"is there beside {inline}_file; one of them must go")
    certificate, private = (keys.get(name) or keys.get(f"{name}_file") for name in ("cert", "key"))
    if certificate is None or private is None:
        place, missing = (certificate, "key_file or key") if certificate else (private or key, "cert_file or cert")
        raise place.error(f"needs {missing} as well")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # scrapers do not resume sessions
    _set_versions(context, keys)
    _set_ciphers(context, keys)
    _load_certificate(context, certificate, private)
    return {"tls": context, "client_sans": _set_client_auth(context, keys)}


def _set_versions(context: ssl.SSLContext, keys: Mapping[str, _Key]) -> None:
    minimum, maximum = (
        _VERSIONS[keys[name].one_of(_VERSIONS)] if name in keys else default
        for name, default in (("min_version", ssl.TLSVersion.TLSv1_2), ("max_version", ssl.TLSVersion.TLSv1_3))
    )
    if minimum > maximum:
        raise keys.get("min_version", keys.get("max_version")).error("min_version is above max_version")
    context.minimum_version, context.maximum_version = minimum, maximum
    if minimum < ssl.TLSVersion.TLSv1_2:
        # OpenSSL has put the old versions out of reach of its default level.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")


def _set_ciphers(context: ssl.SSLContext, keys: Mapping[str, _Key]) -> None:
    if "cipher_suites" in keys:
        names = [each.one_of((*_CIPHERS, *_TLS13_CIPHERS)) for each in keys["cipher_suites"].texts()]
        level = ":@SECLEVEL=0" if context.minimum_version < ssl.TLSVersion.TLSv1_2 else ""
        if chosen := [_CIPHERS[name] for name in names if name in _CIPHERS]:
            context.set_ciphers(":".join(chosen) + level)
        elif names and context.minimum_version < ssl.TLSVersion.TLSv1_3:
            raise keys["cipher_suites"].error("names suites of TLS 1.3 only, but min_version is below TLS13")
    if "prefer_server_cipher_suites" not in keys or keys["prefer_server_cipher_suites"].boolean():
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if "curve_preferences" in keys:
        curves = [each.one_of(_CURVES) for each in keys["curve_preferences"].texts()]
        if len(curves) > 1:
            raise keys["curve_preferences"].error("only one curve is supported here")
        for curve in curves:
            context.set_ecdh_curve(_CURVES[curve])


def _set_client_auth(context: ssl.SSLContext, keys: Mapping[str, _Key]) -> frozenset[str]:
    """Ask clients for certificates as configured; the names of which a certificate must have one."""
    mode = ssl.CERT_NONE
    if "client_auth_type" in keys:
        kind = keys["client_auth_type"].one_of((*_CLIENT_AUTH, *_UNVERIFIED_CLIENT_AUTH))
        if kind in _UNVERIFIED_CLIENT_AUTH:
            raise keys["client_auth_type"].error(
                f"{kind} is not supported here: certificates that are not verified protect nothing"
            )
        mode = _CLIENT_AUTH[kind]
    authority = keys.get("client_ca") or keys.get("client_ca_file")
    if (authority is None) != (mode is ssl.CERT_NONE):
        if authority is None:
            raise keys["client_auth_type"].error("needs client_ca_file or client_ca as well")
        raise authority.error("needs a client_auth_type that verifies, RequireAndVerifyClientCert say, as well")
    if authority is not None:
        with authority.as_file() as path:
            try:
                context.load_verify_locations(cafile=path)
            except ssl.SSLError as error:
                raise authority.error(f"holds no certificate: {error.reason or error}") from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # any certificate in it is trusted, not only a root
    context.verify_mode = mode
    if "client_allowed_sans" not in keys:
        return frozenset()
    if mode is not ssl.CERT_REQUIRED:
        raise keys["client_allowed_sans"].error("needs client_auth_type RequireAndVerifyClientCert as well")
    if not (sans := keys["client_allowed_sans"].texts()):
        raise keys["client_allowed_sans"].error("must name somebody")
    return frozenset(_san(each.text()) for each in sans)


def _load_certificate(context: ssl.SSLContext, certificate: _Key, private: _Key) -> None:
    def refuse_to_prompt() -> str:
        raise private.error("is encrypted, which is not supported here")

    with certificate.as_file() as certificate_path, private.as_file() as private_path:
        try:
            context.load_cert_chain(certificate_path, private_path, refuse_to_prompt)
        except ssl.SSLError as error:
            reason = error.reason or str(error)
            if reason == "KEY_VALUES_MISMATCH":
                raise private.error("is not the key of the certificate") from error
            raise certificate.error(f"certificate and key cannot be used: {reason}") from error


def _san(value: str) -> str:
    """An alternative name as it is compared: addresses in one spelling."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return value
