"""The text that people read, rendered by a real Alertmanager and read where it arrives: Slack and e-mail."""

import email
import email.policy
import json
import queue
import socketserver
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import free_ports

from stack import configuration
from stack.servers import ROOT


class _Slack(BaseHTTPRequestHandler):
    received: queue.Queue

    def do_POST(self) -> None:
        self.received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


class _Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP as it takes to receive a mail."""

    received: queue.Queue

    def handle(self) -> None:
        self.wfile.write(b"220 mailbox\r\n")
        while command := self.rfile.readline().strip().upper():
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                content = b"".join(line.removeprefix(b".") for line in lines)
                self.received.put(email.message_from_bytes(content, policy=email.policy.default))
            self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 fine\r\n")


@contextmanager
def listening(server_class: type, handler: type) -> Iterator[tuple[int, queue.Queue]]:
    """Port of a server, and what it receives."""
    received: queue.Queue = queue.Queue()
    with server_class(("127.0.0.1", 0), type("Handler", (handler,), {"received": received})) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server.server_address[1], received
        server.shutdown()


@pytest.fixture
def channels(start_alertmanager: Callable) -> Iterator[tuple[Callable, queue.Queue, queue.Queue]]:
    """Sends alerts to an Alertmanager; what Slack gets, and what arrives as mail, both from the commented receivers."""
    text = (ROOT / "alerts/alertmanager.yml").read_text()
    receivers = yaml.safe_load(text.replace("\n  # - ", "\n  - ").replace("\n  #   ", "\n    "))["receivers"]
    (slack,) = next(each for each in receivers if each["name"] == "slack")["slack_configs"]
    (mail,) = next(each for each in receivers if each["name"] == "e-mail")["email_configs"]
    ports = free_ports()
    with (
        listening(ThreadingHTTPServer, _Slack) as (slack_port, in_slack),
        listening(socketserver.ThreadingTCPServer, _Mailbox) as (mail_port, in_mailbox),
    ):
        del slack["api_url_file"], mail["auth_username"], mail["auth_password_file"]
        slack["api_url"] = f"http://127.0.0.1:{slack_port}/"
        mail.update(smarthost=f"127.0.0.1:{mail_port}", require_tls=False)
        content = configuration.alertmanager_configuration(ports)
        content["receivers"] = [{"name": "both", "slack_configs": [slack], "email_configs": [mail]}]
        content["route"] = {**content["route"], "receiver": "both", "group_wait": "1s", "group_interval": "1s"}
        del content["route"]["routes"]
        start_alertmanager(ports.alertmanager, content)

        def send(*alerts: dict) -> None:
            headers = {"Content-Type": "application/json"}
            url = f"{ports.url('alertmanager')}/api/v2/alerts"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(alerts).encode(), headers), timeout=10):
                pass

        yield send, in_slack, in_mailbox


def alert(head: str) -> dict:
    return {
        "labels": {
            "alertname": "PPOHeadStarved",
            "severity": "warning",
            "evaluator": "prometheus",
            "job": "ppo",
            "instance": "127.0.0.1:9842",
            "run": "a & b",
            "head": head,
        },
        "annotations": {
            "summary": f"Head {head} of run a & b is starved of gradient",
            "description": f"For 15m head {head} of run a & b has received 0.060 of an equal part.",
            "dashboard_url": "http://127.0.0.1:3000/d/ppo-gradient-health?var-run=a+%26+b",
            "runbook_url": "docs/runbooks/PPOHeadStarved.md",
        },
    }


def line(head: str, state: str = "warning") -> str:
    return (
        f"{state}: For 15m head {head} of run a & b has received 0.060 of an equal part. Instance: 127.0.0.1:9842. "
        "Dashboard: http://127.0.0.1:3000/d/ppo-gradient-health?var-run=a+%26+b "
        "Runbook: docs/runbooks/PPOHeadStarved.md"
    )


def test_slack_and_mail_have_a_title_and_a_line_for_each_alert(channels):
    send, in_slack, in_mailbox = channels
    send(alert("curve"), alert("slot"))
    title, lines = "[FIRING:2] PPOHeadStarved in run a & b", [line("curve"), line("slot")]
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert message["title"] == title
    assert message["text"].splitlines() == lines
    mail = in_mailbox.get(timeout=30)
    assert mail["Subject"] == title
    (part,) = mail.iter_parts()
    assert part.get_content_type() == "text/plain"
    assert part.get_content().splitlines() == lines

    send({**alert("curve"), "endsAt": datetime.now(UTC).isoformat()})
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert message["title"] == "[FIRING:1] PPOHeadStarved in run a & b"
    assert message["text"].splitlines() == [line("slot"), line("curve", "resolved, was warning")]


def test_an_alert_of_another_system_has_no_empty_links(channels):
    send, in_slack, _ = channels
    send({"labels": {"alertname": "Disk", "severity": "critical"}, "annotations": {"description": "Full."}})
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert (message["title"], message["text"].strip()) == ("[FIRING:1] Disk", "critical: Full.")
