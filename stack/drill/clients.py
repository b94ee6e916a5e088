"""The drill's clients of Prometheus, Alertmanager and the receiver's file."""

import base64
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALERT = {"alertname": "PPOGradientCVHigh", "severity": "critical"}
# Errors of a request without an answer, or with an unexpected one.
NO_ANSWER = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class DrillError(Exception):
    """The drill cannot start or continue; the message says why."""


class Connection:
    """A server's HTTP API. A request that gets no answer raises one of `NO_ANSWER`.

    Args:
        url: its address.
        config: file with `basic_auth`, `authorization` or `tls_config.ca_file`, in the format of
            `promtool --http.config.file`. No error shows its content, and a redirect gets no credentials.

    Raises:
        DrillError: the file cannot be used.
    """

    def __init__(self, url: str, config: Path | None = None) -> None:
        self.url = url
        self._authorization, context = _http_config(config) if config else (None, None)
        # Ignore proxies from the environment.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def text(self, path: str, **parameters: str | list[str]) -> str:
        request = urllib.request.Request(f"{self.url}{path}?{urllib.parse.urlencode(parameters, doseq=True)}")
        if self._authorization is not None:
            request.add_unredirected_header("Authorization", self._authorization)
        with self._opener.open(request, timeout=10) as answer:
            return answer.read().decode()

    def json(self, path: str, **parameters: str | list[str]) -> Any:
        return json.loads(self.text(path, **parameters))


def _http_config(path: Path) -> tuple[str | None, ssl.SSLContext]:
    """The Authorization header and the TLS context. Relative paths are relative to `path`."""

    def secret(keys: Mapping[str, str], name: str) -> str:
        file = keys.get(f"{name}_file")
        return (path.parent / file).read_text().strip() if file else keys[name]

    header = None
    try:
        config = yaml.safe_load(path.read_text())
        if basic := config.get("basic_auth"):
            user = f"{basic['username']}:{secret(basic, 'password')}"
            header = f"Basic {base64.b64encode(user.encode()).decode()}"
        elif authorization := config.get("authorization"):
            header = f"{authorization.get('type', 'Bearer')} {secret(authorization, 'credentials')}"
        if header and not (header.isascii() and header.isprintable()):
            raise ValueError  # otherwise an error of the HTTP client would show it
        ca_file = (config.get("tls_config") or {}).get("ca_file")
        return header, ssl.create_default_context(cafile=path.parent / ca_file if ca_file else None)
    except OSError as error:
        raise DrillError(f"{path} or a file named in it cannot be used: {reason(error)}") from None
    except (yaml.YAMLError, *NO_ANSWER):
        # Do not show the cause: it may show the file's content.
        raise DrillError(
            f"{path} must be YAML with basic_auth (username, and password or password_file) or authorization "
            "(credentials or credentials_file), and tls_config (ca_file) if needed"
        ) from None


def reason(error: Exception) -> str:
    """Why a request failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        hint = " (--prometheus-http-config and --alertmanager-http-config take credentials)"
        return f"{error.code} {error.reason}{hint if error.code in (401, 403) else ''}"
    cause = getattr(error, "reason", None) or error
    return str(getattr(cause, "strerror", None) or cause) or type(error).__name__


class Prometheus(Connection):
    """A Prometheus. Answers of an unexpected form raise one of `NO_ANSWER`."""

    def get(self, path: str, **parameters: str) -> Any:
        return self.json(f"/api/v1/{path}", **parameters)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def rule(self) -> dict[str, Any] | None:
        """The critical alert as loaded, with its group's `interval`. Durations are in seconds."""
        for group in self.get("rules", type="alert")["groups"]:
            for rule in group["rules"]:
                if {"alertname": rule["name"], "severity": rule["labels"].get("severity")} == ALERT:
                    return {"keepFiringFor": 0, **rule, "interval": group["interval"]}
        return None

    def target(self, run: str) -> dict[str, Any] | None:
        """The target of `run`, in any job and with any relabeling."""
        targets = self.get("targets", state="active")["activeTargets"]
        return next((target for target in targets if target["discoveredLabels"].get("run") == run), None)

    def sample_times(self, selector: str, seconds: float) -> list[float]:
        """Unix times of the samples within the last `seconds`, in order."""
        return sorted(
            float(when) for series in self.query(f"{selector}[{seconds:.0f}s]") for when, _ in series["values"]
        )


class Alertmanager(Connection):
    """An Alertmanager. Answers of an unexpected form raise one of `NO_ANSWER`."""

    def alert(self, labels: Mapping[str, str]) -> dict[str, Any] | None:
        filters = [f"{name}={quoted(value)}" for name, value in labels.items()]
        return next(iter(self.json("/api/v2/alerts", filter=filters)), None)

    def silence(self, identifier: str) -> str:
        silence = self.json(f"/api/v2/silence/{identifier}")
        return f"{identifier} by {silence['createdBy']} until {silence['endsAt']}: {silence['comment']}"

    def failed_notifications(self) -> list[str]:
        """Alertmanager's counters of failed deliveries that are not zero."""
        name = "alertmanager_notification_requests_failed_total{"
        return [line for line in self.text("/metrics").splitlines() if line.startswith(name) and line[-2:] != " 0"]


@dataclass(frozen=True)
class Event:
    """A step that was seen: its Unix time, by the clock of the server that reported it, and a note."""

    time: float
    note: str = ""


class Notifications:
    """Alerts that the receiver appends to its file after this object is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = path.stat().st_size
        self._alerts: list[tuple[float, dict[str, Any]]] = []

    def find(self, status: str, labels: Mapping[str, str]) -> Event | None:
        """The first alert with this status and these labels: when it was written, and its summary."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
            written = self.path.stat().st_mtime
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.splitlines():
            self._alerts += [(written, alert) for alert in json.loads(line)["alerts"]]
        for when, alert in self._alerts:
            if alert.get("status") == status and labels.items() <= alert.get("labels", {}).items():
                return Event(when, f"{status.upper()} {alert.get('annotations', {}).get('summary', '')}")
        return None


def quoted(text: str) -> str:
    """`text` as a string literal of PromQL and of Alertmanager's matchers."""
    return json.dumps(text, ensure_ascii=False)
