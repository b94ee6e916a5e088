import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fetch, free_ports, wait_until

from stack.receiver import NotificationLog, alert_lines


def webhook(**labels: str) -> dict:
    alert = {
        "status": "firing",
        "labels": {"alertname": "PPOGradientCVHigh", "severity": "critical", "run": "demo", **labels},
        "annotations": {"summary": "gradient CV is 2.100", "description": "op dominates with 97 %"},
    }
    return {"version": "4", "status": "firing", "alerts": [alert, {**alert, "status": "resolved"}]}


@pytest.fixture
def receiver(start_receiver):
    port = free_ports().receiver
    process, jsonl = start_receiver(port)
    return process, jsonl, f"http://127.0.0.1:{port}"


def test_a_notification_is_printed_per_alert_and_appended_as_one_line(receiver):
    process, jsonl, url = receiver
    first, second = webhook(), webhook(run="other\nrun")
    assert fetch(url + "/", json.dumps(first).encode())[0] == 200
    assert fetch(url + "/", json.dumps(second, indent=2).encode())[0] == 200
    assert [json.loads(line) for line in jsonl.read_text().splitlines()] == [first, second]
    printed = process.log.read_text().splitlines()
    printed = [line for line in printed if not line.startswith("listening")]
    assert len(printed) == 6  # two notifications of a firing alert with its description and a resolved one without
    headline = printed[0].split(maxsplit=1)[1].split("  ")
    assert [part.strip() for part in headline if part] == [
        "FIRING", "PPOGradientCVHigh", "severity=critical", "run=demo", "gradient CV is 2.100",
    ]  # fmt: skip
    assert printed[1].strip() == "op dominates with 97 %"
    assert "RESOLVED" in printed[2]


def test_several_notifications_arrive_over_one_connection(receiver):
    _, jsonl, url = receiver
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.connect()
    sock = connection.sock
    for body in (json.dumps(webhook()), "{", json.dumps(webhook())):
        connection.request("POST", "/", body)
        connection.getresponse().read()
        assert connection.sock is sock, "the receiver closed a connection that Alertmanager would use again"
    connection.close()
    assert len(jsonl.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe", b"[]", b'{"alerts": 1}', b'{"alerts": [1]}', b'{"alerts": [{"labels": []}]}', b"[" * 99999],
)
def test_what_is_no_notification_is_refused_and_not_kept(receiver, body):
    _, jsonl, url = receiver
    assert fetch(url + "/", body)[0] == 400
    assert jsonl.read_bytes() == b""
    assert fetch(url + "/-/healthy")[0] == 200


def test_only_its_own_addresses_are_served(receiver):
    _, jsonl, url = receiver
    assert fetch(url + "/other", json.dumps(webhook()).encode())[0] == 404
    assert fetch(url + "/other")[0] == 404
    assert fetch(url + "/")[0] == 405
    assert jsonl.read_bytes() == b""


def test_what_was_acknowledged_survives_a_kill_and_a_torn_line_is_cut_off(receiver, start_receiver):
    process, jsonl, url = receiver
    fetch(url + "/", json.dumps(webhook()).encode())
    process.stop(9)
    assert json.loads(jsonl.read_text()) == webhook()
    with jsonl.open("a") as file:
        file.write('{"alerts": [')
    NotificationLog(jsonl).append(webhook(run="after"))
    assert [json.loads(line)["alerts"][0]["labels"]["run"] for line in jsonl.read_text().splitlines()] == [
        "demo",
        "after",
    ]


def test_labels_cannot_steer_the_terminal():
    alert = webhook(run="\x1b[2J\x07evil\r\u202e\x9b31m")["alerts"][0]
    alert["annotations"]["description"] = "two\nlines\x1b]0;title\x07"
    lines = alert_lines(alert, color=False)
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines), lines
    assert "evil" in lines[0] and "two lines" in lines[1]


def test_color_only_on_a_terminal_or_when_asked():
    alert = webhook()["alerts"][0]
    assert "\x1b" in alert_lines(alert, color=True)[0]
    assert "\x1b" not in alert_lines(alert, color=False)[0]


def test_a_taken_port_is_an_error_that_names_it(receiver, tmp_path: Path):
    _, _, url = receiver
    port = url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "stack.receiver", "--port", port, "--output", str(tmp_path / "x.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert port in done.stderr and "--port" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_ends_it_cleanly(receiver):
    process, _, _ = receiver
    os.kill(process.pid, 15)
    wait_until(lambda: process.exit_code is not None, "the receiver ends")
    assert process.exit_code == 0
    assert "Traceback" not in process.log.read_text()
