"""The texts for people, rendered by a real Alertmanager and read as they arrive at Slack and by e-mail."""

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
        content["route"] = {"receiver": "both", "group_by": ["alertname"], "group_wait": "1s", "group_interval": "1s"}
        start_alertmanager(ports.alertmanager, content)

        def send(*alerts: dict) -> None:
            headers = {"Content-Type": "application/json"}
            url = f"{ports.url('alertmanager')}/api/v2/alerts"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(alerts).encode(), headers), timeout=10):
                pass

        yield send, in_slack, in_mailbox


def alert(number: int) -> dict:
    return {
        "labels": {
            "alertname": "PPOTrainerDown",
            "severity": "critical",
            "instance": f"a:{number}",
            "run": f"r & {number}",
        },
        "annotations": {
            "summary": f"Trainer of run r & {number} is down",
            "description": f"Prometheus cannot scrape a:{number}.",
            "dashboard_url": f"http://127.0.0.1:3000/d/ppo-gradient-health?var-run=r+%26+{number}",
            "runbook_url": "docs/runbooks/PPOTrainerDown.md",
        },
    }


def line(number: int) -> str:
    return (
        f"critical: Prometheus cannot scrape a:{number}. Instance: a:{number}. "
        f"Dashboard: http://127.0.0.1:3000/d/ppo-gradient-health?var-run=r+%26+{number} "
        "Runbook: docs/runbooks/PPOTrainerDown.md"
    )


def test_slack_and_mail_have_a_title_a_line_for_each_of_ten_alerts_and_the_number(channels):
    send, in_slack, in_mailbox = channels
    send(*map(alert, range(10, 22)))
    title, lines = "[FIRING:12] PPOTrainerDown", [*map(line, range(10, 20)), "... 12 alerts fire."]
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert message["title"] == title
    assert message["text"].splitlines() == lines
    mail = in_mailbox.get(timeout=30)
    assert mail["Subject"] == title
    (part,) = mail.iter_parts()
    assert part.get_content_type() == "text/plain"
    assert part.get_content().splitlines() == lines

    send(*({**alert(number), "endsAt": datetime.now(UTC).isoformat()} for number in range(11, 22)))
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert message["title"] == "[FIRING:1] PPOTrainerDown"
    resolved = [f"resolved: Trainer of run r & {number} is down" for number in range(11, 21)]
    assert message["text"].splitlines() == [line(10), *resolved, "... 11 alerts have resolved."]


def test_an_alert_of_another_system_has_no_empty_links(channels):
    send, in_slack, _ = channels
    send({"labels": {"alertname": "Disk", "severity": "critical"}, "annotations": {"description": "Full."}})
    (message,) = in_slack.get(timeout=30)["attachments"]
    assert (message["title"], message["text"].strip()) == ("[FIRING:1] Disk", "critical: Full.")
