"""`python -m exporter calibrate`: thresholds from healthy runs, and a fault that they detect."""

import csv
import gzip
import json
import lzma
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import free_ports
from prometheus_client import generate_latest
from torch import nn

from exporter import GradientMonitor, HealthLevel, RunAggregator, Thresholds, calibrate
from exporter.collectors import build_registry
from stack.servers import ROOT

CHOICES = {"move": 4, "aim": 3, "fire": 2}
RATE = ("--false-alarm-rate", "0.05")
UPDATES = 100


def train(run: str, aggregator: RunAggregator, updates: int, seed: int, masked: Sequence[str] = (), **options) -> None:
    """A policy of three heads; of `masked` heads one choice is allowed, so that nothing is learnt there."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
    heads = nn.ModuleDict({name: nn.Linear(16, count) for name, count in CHOICES.items()})
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], 1e-3)
    with GradientMonitor(heads, run, window_steps=None, aggregator=aggregator, **options).attach(optimizer) as monitor:
        for _ in range(updates):
            features, advantages, log_probs = trunk(torch.randn(32, 6)), torch.randn(32), 0.0
            for name, head in heads.items():
                logits = head(features)
                if name in masked:
                    logits = logits.masked_fill(torch.arange(CHOICES[name]) > 0, -1e9)
                logits = logits.log_softmax(1)
                log_probs = log_probs + logits.gather(1, logits.exp().multinomial(1)).squeeze(1)
            optimizer.zero_grad()
            (-log_probs * advantages).mean().backward()
            optimizer.step()
            monitor.update_completed()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them make small layers slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A folder of two healthy runs: `files` with a text file after each update, and the same in `table.csv`."""
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "files").mkdir()
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "heads", "gradient_cv"])
        for seed in (1, 2):
            aggregator = RunAggregator()

            def keep(run) -> None:
                text = generate_latest(build_registry(aggregator))
                (folder / "files" / f"{run.run}-{run.updates:04}.prom").write_bytes(text)
                table.writerow([run.run, 3, run.gradient_quality.gradient_cv])

            train(f"seed{seed}", aggregator, UPDATES, seed, on_update=keep)
    return folder


def proposed(output: str) -> tuple[float, float]:
    """Of the lines to paste, which must agree."""
    python = re.search(r"^Python: +thresholds=\((.+), (.+)\)$", output, re.MULTILINE).groups()
    trainer = re.search(
        r"^trainer: +--warning-threshold (.+) --critical-threshold (.+)$", output, re.MULTILINE
    ).groups()
    assert python == trainer
    return float(python[0]), float(python[1])


def without_steps(output: str) -> str:
    """But for single gradient steps, of which a table knows nothing and Prometheus not the first of a run."""
    return re.sub("single gradient steps: .*", "", output)


def write_table(path: Path, runs: dict[str, list], heads: int | str = 3, **columns: str) -> Path:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    is_new = not path.exists()
    with opener(path, "at", newline="") as file:
        table = csv.writer(file)
        if is_new:
            table.writerow(["run", "heads", "gradient_cv", *columns])
        table.writerows([run, heads, cv, *columns.values()] for run, cvs in runs.items() for cv in cvs)
    return path


def failure(capsys, *arguments) -> str:
    """The one line that says why nothing is proposed."""
    assert calibrate.main(list(map(str, arguments))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_three_heads_calibrated_on_healthy_runs_are_told_of_a_fault_that_two_could_never_tell(healthy, capsys):
    assert calibrate.main([*RATE, str(healthy / "files")]) == 0
    output = capsys.readouterr().out
    assert "2 runs of 3 heads, 200 updates; the shortest run has 100\n" in output
    assert "3 heads: CV cannot exceed 1.732; critical at 2.0 can never be reached\n" in output
    thresholds = proposed(output)
    assert thresholds[0] < thresholds[1] < 3**0.5

    seen: list = []
    train("new", RunAggregator(), UPDATES, 3, on_update=seen.append)  # healthy too
    assert sum(run.gradient_quality.gradient_cv >= thresholds[1] for run in seen) <= 0.05 * UPDATES
    levels = {}
    for judged_by in (Thresholds(), Thresholds(*thresholds)):
        train("r", RunAggregator(), 10, 3, ("aim", "fire"), thresholds=judged_by, on_update=seen.append)
        levels[judged_by.critical] = seen[-1].gradient_quality.health
    assert levels == {2.0: HealthLevel.WARNING, thresholds[1]: HealthLevel.CRITICAL}


def test_prometheus_text_files_and_table_give_the_same_thresholds(healthy, tmp_path, servers, start_prometheus, capsys):
    began, lines = time.time() - 3600, []
    for path in sorted((healthy / "files").iterdir()):
        number = int(path.stem[-4:])
        for line in path.read_text().splitlines():
            if line.startswith(("ppo_gradient_cv{", "ppo_gradient_cv_ceiling{", "ppo_gradient_cv_per_step_bucket{")):
                # Each update is scraped twice.
                lines += [f"{line} {began + 10 * number + again:.3f}" for again in (0, 5)]
    dump = tmp_path / "dump.om"
    other = f'ppo_gradient_cv{{health="critical",run="other"}} 1.7 {began:.3f}'
    dump.write_text("\n".join([*lines, other, "# EOF\n"]))
    command = [servers.promtool, "tsdb", "create-blocks-from", "openmetrics", dump, tmp_path / "prometheus"]
    subprocess.run(command, check=True, capture_output=True)
    port = free_ports().prometheus
    start_prometheus(port, {})
    url = f"http://127.0.0.1:{port}"

    command = [sys.executable, "-m", "exporter", "calibrate", *RATE, "--prometheus", url]
    asked = subprocess.run(
        [*command, "--range", "2h", "--selector", '{run=~"seed."}'], cwd=ROOT, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert "200 updates" in asked.stdout and "single gradient steps: at most" in asked.stdout
    for source in (healthy / "files", healthy / "table.csv"):
        assert calibrate.main([*RATE, str(source)]) == 0
        assert without_steps(capsys.readouterr().out) == without_steps(asked.stdout)
    lines = [line for line in dump.read_text().splitlines() if "other" not in line]
    dump.write_text("\n".join(lines))
    assert calibrate.main([*RATE, str(dump)]) == 0
    assert without_steps(capsys.readouterr().out) == without_steps(asked.stdout)

    told = failure(capsys, "--prometheus", url, "--selector", '{run="seed9"}')
    assert told.endswith('no update of ppo_gradient_cv{run="seed9"} in this time; its runs then: other, seed1, seed2')
    assert told.startswith(url)
    assert "parse error" in failure(capsys, "--prometheus", url, "--selector", '{run="')
    long_ago = ("--start", "2020-01-01", "--end", "2020-01-02")
    assert failure(capsys, "--prometheus", url, *long_ago).endswith("its runs then: none")


def test_thresholds_are_passed_as_often_as_chosen(tmp_path, capsys):
    # 1,000 updates: ten may reach the warning threshold, one the critical one, and one more is still to come.
    path = write_table(
        tmp_path / "t.csv", {run: [k / 1000 for k in range(first, 1000, 2)] for run, first in (("a", 0), ("b", 1))}
    )
    assert calibrate.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert proposed(output) == (0.991, 1.0)
    assert re.search(r"^proposed warning +0\.991 +0\.90%; 1\.00% \(b\)$", output, re.MULTILINE)
    assert re.search(r"^usual warning +0\.500 +50\.00%$", output, re.MULTILINE)
    assert re.search(r"^ +0\.950 +50 #+ <- warning 0\.991$", output, re.MULTILINE)


def test_single_gradient_steps_do_not_reach_critical_as_often_as_their_alert_allows(tmp_path, capsys):
    (allowed,) = re.findall(r"ratio_increase5m >= ([\d.]+)\n.*?for: 2m", (ROOT / "alerts/ppo.rules.yml").read_text())
    lines = []
    for run in "ab":
        lines += [f'ppo_gradient_cv_ceiling{{run="{run}"}} 2.6457513']
        lines += [f'ppo_gradient_cv{{run="{run}"}} 0.{300 + number} {number}' for number in range(100)]
        # Of 1,000 steps 80 are above 0.5 and 20 above 0.6.
        for bound, count in {"0.4": 900, "0.5": 920, "0.6": 980, "+Inf": 1000}.items():
            lines += [f'ppo_gradient_cv_per_step_bucket{{le="{bound}",run="{run}"}} {count}']
    dump = tmp_path / "dump.om"
    dump.write_text("\n".join(lines))
    assert calibrate.main([*RATE, str(dump)]) == 0
    output = capsys.readouterr().out
    assert proposed(output) == (0.396, 0.6)  # of updates alone 0.4
    (share,) = re.findall(r"single gradient steps: at most (.+)% reach the proposed critical", output)
    assert float(share) == 2.0 <= 100 * float(allowed) / 2


def test_a_run_unlike_the_others_is_named(tmp_path, capsys):
    path = write_table(tmp_path / "t.csv", {"a": [0.3] * 500, "b": [0.3] * 500, "odd": [0.3] * 400 + [0.6] * 100})
    assert calibrate.main([str(path)]) == 0
    assert re.search(r"^proposed critical .*; 20\.00% \(odd\)$", capsys.readouterr().out, re.MULTILINE)


def test_too_little_data_is_refused_with_what_is_missing(tmp_path, capsys):
    path = write_table(tmp_path / "t.csv", {"a": [0.3] * 400})
    assert failure(capsys, path) == (
        "too little data, 400 updates of 1 run: 2 runs are needed, 1 more; a false alarm rate of 0.01 needs 1000 "
        "updates of healthy runs, 600 more, or --false-alarm-rate 0.025 with these"
    )
    write_table(path, {"b": [0.3] * 400})
    assert "800 updates of 2 runs: a false alarm" in failure(capsys, path)
    assert calibrate.main(["--false-alarm-rate", "0.0125", str(path)]) == 0


def test_updates_that_are_not_finite_are_left_out_and_counted(tmp_path, capsys):
    runs = {run: [0.3] * 100 + ["inf", "nan", ""] for run in "ab"}
    assert calibrate.main([*RATE, str(write_table(tmp_path / "t.csv.xz", runs))]) == 0
    output = capsys.readouterr().out
    assert "left out: 6 updates whose gradient was not finite\n" in output and proposed(output) == (0.301, 0.302)
    none = write_table(tmp_path / "n.csv", {run: ["nan"] * 1000 for run in "ab"})
    assert "0 updates of 0 runs" in failure(capsys, none)


def test_no_critical_threshold_at_or_above_the_ceiling(tmp_path, capsys):
    path = write_table(tmp_path / "t.csv", {run: [0.3] * 1000 + [1.4142] * 200 for run in "ab"}, heads=2)
    assert failure(capsys, path).startswith(
        "the critical threshold of these runs would be 1.416, and 2 heads reach a CV of 1.414 at most: "
    )


def test_runs_of_different_numbers_of_heads_are_not_mixed(tmp_path, capsys):
    path = write_table(tmp_path / "t.csv.gz", {"a": [0.3] * 100, "b": [0.4] * 100})
    write_table(tmp_path / "seven.csv", {"c": [0.6] * 1000}, heads=7)
    told = failure(capsys, *RATE, tmp_path)
    assert "choose with --heads N (3: a, b; 7: c)" in told
    assert calibrate.main([*RATE, "--heads", "3", str(tmp_path)]) == 0
    assert proposed(capsys.readouterr().out)[1] == 0.402
    assert failure(capsys, *RATE, "--heads", "4", path) == "no run has 4 heads, but 3"
    bare = write_table(tmp_path / "bare.csv", {"a": [0.0] * 100, "b": [0.0] * 100}, heads="")
    assert failure(capsys, *RATE, bare) == "the source does not say how many heads the runs have: give --heads N"
    assert "is 0 with 1: there is nothing to calibrate" in failure(capsys, *RATE, "--heads", 1, bare)


def test_rows_with_a_fault_are_left_out_only_when_somebody_says_so(tmp_path, capsys):
    path, lines = tmp_path / "t.csv", ["task,fault,seed,heads,update,gradient_cv"]
    for seed in (1, 2):
        lines += [
            f"drone,{fault},{seed},3,{n},{cv}" for n in range(100) for fault, cv in (("none", 0.3), ("sign", 1.5))
        ]
    path.write_text("\n".join(lines))
    assert failure(capsys, *RATE, path).endswith("--where fault=VALUE with one of none, sign")
    assert calibrate.main([*RATE, "--where", "fault=none", str(path)]) == 0
    assert "2 runs of 3 heads, 200 updates" in capsys.readouterr().out
    assert failure(capsys, "--where", "env=x", path).startswith(
        f"{path} has no column env, but task, fault, seed, heads"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"run,heads\na,3\n", "has no column gradient_cv, but run, heads"),
        ("t.csv", b"run,heads,gradient_cv\na,3,high\n", "line 2: not numbers: gradient_cv 'high', heads '3'"),
        ("t.csv.gz", b"run,heads,gradient_cv\n", "cannot read"),
        ("t.prom", b'ppo_gradient_cv{run="a"} high\n', "line 1: not a sample of the text format"),
        ("t.prom", b"\xff\xfe", "is not a text file"),
        ("t.prom", b"", "there is no update of a run in"),
        (None, b"", "No such file or directory"),
    ],
)
def test_wrong_files_are_named(tmp_path, capsys, name, content, message):
    path = tmp_path / (name or "missing.prom")
    if name:
        path.write_bytes(content)
    told = failure(capsys, path)
    assert message in told and str(path) in told


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path, capsys):
    path = write_table(tmp_path / "t.csv", {"a": [0.1] * 100, "b": [0.2] * 100})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert calibrate.main([*RATE, str(path)]) == 0
    assert "2 runs of 3 heads, 200 updates" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/meaning.md", "study/README.md"])
def test_commands_of_the_study_propose_thresholds(page, capsys, monkeypatch):
    root = Path(calibrate.__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    text = (root / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^\.venv/bin/python -m exporter calibrate (.+)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert calibrate.main(command.split()) == 0
        proposed(capsys.readouterr().out)


def test_own_thresholds_of_runs_that_differ_are_told(healthy, tmp_path, capsys):
    for path in (healthy / "files").iterdir():
        text = path.read_text()
        if "seed2" in path.name:
            text = text.replace('{level="critical",run="seed2"} 2.0', '{level="critical",run="seed2"} 1.5')
        (tmp_path / path.name).write_text(text)
    assert calibrate.main([*RATE, str(tmp_path)]) == 0
    assert "judged by different thresholds (0.5 and 1.5, 0.5 and 2)" in capsys.readouterr().out


def test_the_plot_is_written(healthy, tmp_path, capsys):
    plot = tmp_path / "plot.svg"
    assert calibrate.main([*RATE, "--plot", str(plot), str(healthy / "table.csv")]) == 0
    assert "<svg" in plot.read_text()
    assert "cannot write" in failure(capsys, *RATE, "--plot", tmp_path / "plot.xyz", healthy / "table.csv")


@pytest.fixture
def guarded():
    """URL of a server that answers with the headers that it was sent, as a Prometheus' error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"status": "error", "error": f"no: {self.headers['Authorization']}"}).encode()
            self.send_response(401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_headers_are_sent_and_servers_that_cannot_be_asked_are_named(guarded, tmp_path, capsys):
    headers = tmp_path / "headers"
    headers.write_text("Authorization: Bearer abc\n")
    assert failure(capsys, "--prometheus", guarded, "--headers", headers).endswith("no: Bearer abc")
    closed = f"http://127.0.0.1:{free_ports().prometheus}"
    assert "Connection refused" in failure(capsys, "--prometheus", closed)
    assert "is not the URL of a Prometheus" in failure(capsys, "--prometheus", "file:///etc/passwd")


def test_nothing_to_read_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        calibrate.main([])
    assert "give files, or --prometheus URL" in capsys.readouterr().err
