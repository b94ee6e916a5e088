"""`python -m stack.drill` against real servers."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import bcrypt
import pytest
from conftest import GENTLY, every_servers, free_ports, wait_until

from stack.drill.__main__ import main
from stack.drill.clients import Connection, DrillError
from stack.drill.steps import LOOK_BACK
from stack.processes import ChildProcess
from stack.servers import ROOT

STEPS = [
    "drill started",
    "trainer serves its metrics",
    "Prometheus scrapes the run",
    "gradient crossed the threshold",
    "first scrape that saw it",
    "alert pending",
    "alert firing",
    "Alertmanager has it",
    "notification received",
    "gradient fell below the threshold",
    "alert resolved",
    "resolved notification received",
]
RUN = "fire-drill-test"


def flags(observability, *more: str | Path) -> list[str]:
    words = ["--run", RUN, "--patience", "15", "--prometheus-url", observability.prometheus_url]
    words += ["--alertmanager-url", observability.alertmanager_url, "--targets-dir", observability.targets]
    return list(map(str, [*words, "--receiver-log", observability.jsonl, *more]))


@pytest.fixture
def drill(tmp_path):
    """Starts a drill; `output(process)` is what it has said."""
    processes = []

    def start(observability, *more: str) -> subprocess.Popen:
        with (tmp_path / "drill.log").open("w") as output:
            process = subprocess.Popen(
                [*GENTLY, sys.executable, "-m", "stack.drill", *flags(observability, *more)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture
def output(tmp_path) -> Callable[[], str]:
    return lambda: (tmp_path / "drill.log").read_text()


def timeline(text: str) -> dict[str, tuple[float, float]]:
    """Seconds and delta of each row."""
    rows = re.findall(r"^(\S.*?) +\d\d:\d\d:\d\d +(-?[\d.]+) +([+-][\d.]+)", text, re.MULTILINE)
    return {name: (float(at), float(delta)) for name, at, delta in rows}


def nothing_is_left(observability, trainers: set[int]) -> bool:
    return not list(observability.targets.glob("*.json")) and not any(Path(f"/proc/{pid}").exists() for pid in trainers)


def test_a_drill_sees_every_step_in_its_order_and_says_when(start_observability, drill, output):
    observability = start_observability()
    process = drill(observability)
    assert process.wait(180) == 0, output()
    seen = timeline(output())
    assert list(seen) == STEPS, output()
    at = [seconds for seconds, _ in seen.values()]
    # Prometheus stamps a sample with the time at which the scrape began, which may be shortly before what it shows.
    assert all(then <= now + 0.5 for then, now in pairwise(at)), output()
    assert sum(delta for _, delta in seen.values()) == pytest.approx(at[-1], abs=0.05 * len(seen))
    at = dict(zip(seen, at, strict=True))
    assert at["alert firing"] - at["alert pending"] == pytest.approx(2, abs=0.2), "`for` of the rule"
    assert re.search(r"crossed the threshold .* CV 2\.\d{3}\n", output())
    (paged, after), (over, later) = re.findall(rf"([A-Z]+) .* {RUN} .*, ([\d.]+) s after the gradient ", output())
    assert (paged, over) == ("FIRING", "RESOLVED")
    assert float(after) == pytest.approx(at["notification received"] - at["gradient crossed the threshold"], abs=0.11)
    assert float(later) == pytest.approx(
        at["resolved notification received"] - at["gradient fell below the threshold"], abs=0.11
    )
    assert observability.notified("firing", run=RUN, severity="critical")
    assert observability.notified("resolved", run=RUN, severity="critical")
    assert nothing_is_left(observability, set())


def test_a_silence_fails_the_drill_which_names_it_and_leaves_nothing(start_observability, servers, drill, output):
    observability = start_observability()
    url = f"--alertmanager.url={observability.alertmanager_url}"
    words = ["--author=night shift", "--comment=too loud", "--duration=1h", "run=~fire-drill-.*"]
    subprocess.run([servers.amtool, url, "silence", "add", *words], check=True)
    process = drill(observability, "--notification-wait", "1", "--patience", "10")
    assert process.wait(120) == 1, output()
    assert list(timeline(output())) == STEPS[: STEPS.index("notification received")], output()
    assert "did not come within 11 s: notification received" in output()
    assert re.search(r"The alert is silenced: \S+ by night shift until \S+: too loud", output()), output()
    assert nothing_is_left(observability, set())


@pytest.fixture
def handlers():
    """Puts back what handled signals before a drill in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_what_is_missing_is_said_and_ctrl_c_leaves_nothing(
    start_observability, handlers, drill, output, capsys, tmp_path
):
    observability = start_observability()

    def failed_with(*more: str | Path) -> str:
        assert main(flags(observability, *more)) == 1
        assert nothing_is_left(observability, set())
        return capsys.readouterr().err

    nobody = f"http://127.0.0.1:{observability.ports.grafana}"
    text = failed_with("--prometheus-url", nobody)
    assert f"Prometheus does not answer at {nobody}: " in text and "`make run` starts the stack" in text
    assert "there is no folder" in failed_with("--targets-dir", "missing")
    assert "there is no file missing.jsonl" in failed_with("--receiver-log", "missing.jsonl")
    text = failed_with("--", "--num-envs", "0")
    assert "the trainer has ended with exit code 2:" in text and "num-envs" in text
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    others = [elsewhere / "ppo-1.json", elsewhere / "ppo-2.json"]
    others[0].write_text(f'[{{"labels": {{"run": "other", "name": "{RUN}"}}}}]')
    others[1].write_text(f'"{RUN}" and what is no JSON')
    text = failed_with("--targets-dir", elsewhere, "--patience", "1")
    assert f"Prometheus has no target from {elsewhere}/ppo-{RUN}.json: does a scrape job read this folder" in text
    assert sorted(elsewhere.glob("*.json")) == others, "only what is the drill's own may go"

    process = drill(observability)
    wait_until(lambda: "Prometheus scrapes the run" in timeline(output()), "the run is scraped")
    (sample,) = observability.query(f'up{{run="{RUN}"}}')
    assert sample["value"][1] == "1"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, output()
    assert list(timeline(output()))[:3] == STEPS[:3] and "Interrupted" in output()
    assert (
        "Traceback" not in output() and len(children) == 1 and nothing_is_left(observability, set(map(int, children)))
    )

    observability.processes["alertmanager"].stop()
    assert f"Alertmanager does not answer at {observability.alertmanager_url}: " in failed_with()


def test_the_drill_waits_as_long_as_the_rule_looks_back():
    assert f'health="critical"}}[{LOOK_BACK / 60:.0f}m]' in (ROOT / "alerts/ppo.rules.yml").read_text()


@every_servers
def test_a_password_and_a_ca_are_taken_from_a_file_and_never_shown(servers, tmp_path):
    port, password = free_ports().prometheus, "correct horse"
    key = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"]
    key += ["/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out"]
    subprocess.run([*key, tmp_path / "ca.pem"], check=True, capture_output=True)
    (tmp_path / "web.yml").write_text(
        "tls_server_config: {cert_file: ca.pem, key_file: key.pem}\n"
        f"basic_auth_users: {{drill: {bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}}}\n"
    )
    (tmp_path / "prometheus.yml").touch()
    command = [servers.prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.config.file={tmp_path}/web.yml", f"--web.listen-address=127.0.0.1:{port}"]
    config = tmp_path / "http.yml"
    config.write_text("basic_auth: {username: drill, password_file: password}\ntls_config: {ca_file: ca.pem}\n")
    named = ["--prometheus-url", f"https://127.0.0.1:{port}", "--prometheus-http-config", config]
    named += ["--alertmanager-url", f"http://127.0.0.1:{free_ports().alertmanager}"]

    def said(text: str) -> str:
        (tmp_path / "password").write_text(f"{text}\n")
        done = subprocess.run(
            [sys.executable, "-m", "stack.drill", *named], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and text not in done.stderr and done.stdout == ""
        return done.stderr

    process = ChildProcess("prometheus", command + list(servers.prometheus_options), "", output=tmp_path / "log")
    try:
        wait_until(lambda: "Server is ready" in process.log_tail(), "Prometheus is ready")
        assert "Prometheus does not answer" in said("wrong") and "401 Unauthorized (--prometheus-http" in said("wrong")
        assert "Alertmanager does not answer" in said(password)
    finally:
        process.stop()


def test_a_token_goes_to_the_server_that_was_named_and_not_where_it_redirects_to(tmp_path):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(302 if self.path.startswith("/here") else 200)
            self.send_header("Location", f"http://localhost:{server.server_port}/there")
            self.end_headers()

    config = tmp_path / "http.yml"
    config.write_text("authorization: {credentials_file: token}")
    (tmp_path / "token").write_text("abc\n")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Connection(f"http://127.0.0.1:{server.server_port}", config).text("/here")
        server.shutdown()
    assert seen == [("/here?", "Bearer abc"), ("/there", None)]


@pytest.mark.parametrize(
    "text",
    [
        "basic_auth: {password: geheim}",
        "authorization: {credentials: 'geheim\n\n2'}",
        "authorization: {credentials: gehe\u0131m}",
        "password geheim",
        "basic_auth: {geheim",
    ],
)
def test_an_unusable_file_of_credentials_is_refused_without_showing_it(tmp_path, text):
    config = tmp_path / "http.yml"
    config.write_text(text)
    with pytest.raises(DrillError, match="must be YAML with basic_auth") as failure:
        Connection("http://127.0.0.1:1", config)
    assert "gehe" not in str(failure.value) and failure.value.__suppress_context__


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prometheus-url", "http://drill:geheim@127.0.0.1:9090"], "name a file with --...-http-config"),
        (["--prometheus-url", "http://drill:geheim@["], "name a file with --...-http-config"),
        (["--patience", "x"], "'x' is not a number of seconds above 0"),
        (["--", "--run", "other"], "the trainer's --run is set by the drill: use --run before the --"),
    ],
)
def test_flags_that_cannot_be_are_refused_without_showing_a_password(capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert said in (error := capsys.readouterr().err) and "geheim" not in error
