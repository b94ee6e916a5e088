"""What `GradientMonitor` serves: endpoints that runs share, notebooks, forks, and the end of a script."""

import contextlib
import http.server
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import fetch, wait_until
from prometheus_client import CollectorRegistry, Gauge
from torch import nn

from exporter import GradientMonitor, MetricsServer, RunAggregator
from stack.servers import ROOT


class Training:
    """Heads, their optimizer and a monitor that makes every step an update."""

    def __init__(self, run: str, aggregator: RunAggregator | None = None) -> None:
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})
        self.optimizer = torch.optim.SGD(self.heads.parameters(), lr=0.1)
        self.monitor = GradientMonitor(dict(self.heads.items()), run, window_steps=1, aggregator=aggregator)
        self.monitor.attach(self.optimizer)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            sum(head(torch.randn(8, 4)).square().mean() for head in self.heads.values()).backward()
            self.optimizer.step()


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


def port_of(url: str) -> int:
    return int(re.search(r":(\d+)/", url)[1])


def updates(url: str) -> dict[str, float]:
    """Updates by run."""
    return {run: float(value) for run, value in re.findall(r'ppo_updates_total{run="(.*)"} (.*)', fetch(url)[1])}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def is_gone(url: str) -> bool:
    with contextlib.suppress(OSError):
        fetch(url)
        return False
    return True


def test_monitors_share_one_endpoint_which_closes_with_the_last_one(aggregator, tmp_path):
    first, second = Training("a", aggregator), Training("b", aggregator)
    with first.monitor:
        with second.monitor:
            url = first.monitor.serve(port=0, targets_dir=tmp_path)
            assert url.startswith("http://127.0.0.1:")  # nobody else sees it unless asked to
            assert second.monitor.serve(port=port_of(url), targets_dir=tmp_path) == url
            first.step(2)
            second.step(3)
            wait_until(lambda: updates(url) == {"a": 2.0, "b": 3.0}, "both are served")
            assert names(tmp_path) == {"ppo-a.json", "ppo-b.json"}
        wait_until(lambda: updates(url) == {"a": 2.0}, "one has ended")
    assert list(tmp_path.iterdir()) == [] and is_gone(url)


def test_an_endpoint_is_not_shared_with_less_protection_or_other_metrics_than_asked_for(aggregator, tmp_path):
    (tmp_path / "web.yml").write_text("http_server_config: {headers: {X-Frame-Options: deny}}")
    registry = CollectorRegistry()
    Gauge("mine", "for the test", registry=registry).set(7)
    with Training("a", aggregator).monitor as first, Training("b", aggregator).monitor as second:
        url = first.serve(port=0, registry=registry)
        with pytest.raises(ValueError, match="already has another web_config_file or none"):
            second.serve(port=port_of(url), web_config_file=tmp_path / "web.yml")
        with pytest.raises(ValueError, match="already has another registry or none"):
            second.serve(port=port_of(url), registry=CollectorRegistry())
        assert second.serve(port=port_of(url), registry=registry) == url
        assert "\nmine 7.0\n" in fetch(url)[1]


def test_a_run_that_crashes_beside_another_stays_until_it_begins_again(aggregator, tmp_path):
    other = Training("b", aggregator).monitor
    port = port_of(url := other.serve(port=0))
    crashing = Training("a", aggregator)
    with pytest.raises(ZeroDivisionError), crashing.monitor:
        crashing.monitor.serve(port=port, targets_dir=tmp_path)
        crashing.step()
        raise ZeroDivisionError
    assert updates(url) == {"a": 1.0, "b": 0.0} and names(tmp_path) == {"ppo-a.json"}
    assert set(aggregator.snapshot.runs) == {"a", "b"}
    again = Training("a", aggregator).monitor
    assert again.serve(port=port, targets_dir=tmp_path) == url
    wait_until(lambda: updates(url) == {"a": 0.0, "b": 0.0}, "it has begun again")
    assert names(tmp_path) == {"ppo-a.json"}
    again.close()
    other.close()
    assert list(tmp_path.iterdir()) == [] and aggregator.snapshot.runs == {}


def test_one_that_is_served_again_at_its_port_has_its_files_once_and_at_another_one_too(aggregator, tmp_path):
    with Training("a", aggregator).monitor as monitor:
        url = monitor.serve(port=0, targets_dir=tmp_path, textfile_dir=tmp_path)
        assert monitor.serve(port=port_of(url), targets_dir=tmp_path, textfile_dir=tmp_path) == url
        assert names(tmp_path) == {"ppo-a.json", "ppo-a.prom"}
        monitor.serve(port=0, targets_dir=tmp_path)
        assert len(list(tmp_path.glob("ppo-*.json"))) == 2
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(OSError):
            monitor.serve(port=port_of(url), textfile_dir=tmp_path / "file")
        assert updates(url) == {"a": 0.0}
    assert names(tmp_path) == {"file"} and is_gone(url)


def test_an_endpoint_that_cannot_be_had_whole_is_not_had_at_all(aggregator, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with Training("a", aggregator).monitor as host, Training("b", aggregator).monitor as monitor:
        url = host.serve(port=0)
        with pytest.raises(OSError):
            monitor.serve(port=port_of(url), targets_dir=tmp_path / "targets", textfile_dir=tmp_path / "file")
        assert list((tmp_path / "targets").iterdir()) == []
        host.close()
        assert is_gone(url)


def test_closing_that_is_interrupted_leaves_nothing_open_and_takes_nothing_from_others(
    aggregator, monkeypatch, tmp_path
):
    with Training("b", aggregator).monitor as other, monkeypatch.context() as patch:
        url = other.serve(port=0)
        monitor = Training("a", aggregator).monitor
        monitor.serve(port=port_of(url), targets_dir=tmp_path, pushgateway="http://127.0.0.1:9")

        def interrupted(*given: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(MetricsServer, "push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            monitor.close()
        assert list(tmp_path.iterdir()) == []
        monitor.close()
        wait_until(lambda: updates(url) == {"b": 0.0}, "the other one alone is served")
    assert is_gone(url)


@pytest.mark.parametrize(("shared", "seen"), [(None, {"b"}), (RunAggregator(), {"a", "b"})], ids=["default", "given"])
def test_a_forked_child_takes_nothing_along_and_serves_its_own_runs(shared, seen, tmp_path):
    with Training("a", shared).monitor as monitor:
        url = monitor.serve(port=0, targets_dir=tmp_path)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                monitor.close()
                own = Training("b", shared).monitor
                with pytest.raises(OSError, match="Address already in use"):
                    own.serve(port=port_of(url))
                code = int(set(updates(own.serve(port=0))) != seen)
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert names(tmp_path) == {"ppo-a.json"} and updates(url) == {"a": 0.0}


MODEL = """
model = nn.ModuleDict({"heads": nn.ModuleDict({name: nn.Linear(4, 2) for name in "abcde"})})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
MONITOR = """
monitor = GradientMonitor(heads_from(model, r"heads\\.(\\w+)"), run="walker-17")
monitor.attach(optimizer)
"""
TRAIN = """
for _ in range(5):
    sum(head(torch.randn(8, 4)).square().mean() for head in model["heads"].values()).backward()
    optimizer.step()
"""
IMPORTS = """
import os, signal, sys
import torch
from torch import nn
from exporter import GradientMonitor, heads_from
"""


@pytest.mark.parametrize(
    ("before", "cell"),
    [
        (MODEL, MONITOR),
        ("", MODEL + MONITOR),
        (MODEL + MONITOR + "monitor.detach(); first = optimizer", MODEL + MONITOR),
        ("import sys; sys.ps1 = '>>> '" + MODEL + MONITOR + "first = optimizer", MODEL + MONITOR),
    ],
    ids=["same optimizer", "optimizer bound anew", "detached", "interactive"],
)
def test_a_cell_that_runs_again_takes_over(before, cell, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "ps1", "", raising=False)
    monkeypatch.delattr(sys, "ps1")
    notebook = {"port": 0, "folder": tmp_path}
    exec(IMPORTS + before, notebook)
    for number in range(2):
        exec(cell + "url = monitor.serve(port, targets_dir=folder)", notebook)
        notebook["port"] = port_of(notebook["url"])
        exec(TRAIN + "monitor.update_completed()", notebook)
        wait_until(lambda: updates(notebook["url"]) == {"walker-17": 1.0}, f"run {number} begins at zero")
        assert names(tmp_path) == {"ppo-walker-17.json"}
    notebook["monitor"].close()
    assert list(tmp_path.iterdir()) == []


def test_two_living_monitors_of_one_name_are_refused_in_a_script(aggregator):
    living = Training("a", aggregator)
    with pytest.raises(ValueError, match=r"another monitor already measures run 'a': close\(\) .* or give .* name"):
        Training("a", aggregator)
    living.step()
    assert aggregator.snapshot.runs["a"].updates == 1


@pytest.fixture
def pushgateway() -> Iterator[tuple[str, dict[str, str]]]:
    """URL of what stands for a Pushgateway, and what was pushed: path -> text."""
    pushed = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            pushed[self.path] = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *given: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", pushed
        server.shutdown()


SERVE = "monitor.serve(0, targets_dir=sys.argv[1], textfile_dir=sys.argv[1], pushgateway=sys.argv[2])"


@pytest.mark.parametrize(
    ("script", "code", "is_clean"),
    [
        (IMPORTS + "def main():" + textwrap.indent(MODEL + MONITOR + SERVE + TRAIN, "    ") + "main()", 0, True),
        (IMPORTS + MODEL + MONITOR + SERVE + TRAIN + "os.killpg(0, signal.SIGINT)", -2, True),
        (IMPORTS + MODEL + MONITOR + SERVE + TRAIN + "raise RuntimeError", 1, False),
    ],
    ids=["end", "Ctrl-C", "exception"],
)
def test_a_script_that_ends_without_close(script, code, is_clean, pushgateway, tmp_path):
    (tmp_path / "script.py").write_text(script)
    (folder := tmp_path / "files").mkdir()
    url, pushed = pushgateway
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py", folder, url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,  # Ctrl-C reaches a whole process group
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
    steps = 'ppo_gradient_cv_per_step_count{run="walker-17"} 5.0'
    if is_clean:
        assert list(folder.iterdir()) == []
        assert steps in pushed["/metrics/job/ppo_final/run/walker-17"]
    else:
        assert names(folder) == {"ppo-walker-17.json", "ppo-walker-17.prom"}
        assert steps in (folder / "ppo-walker-17.prom").read_text() and pushed == {}


WITHOUT_POSIX = """
import builtins, os, signal
found = builtins.__import__

def find(name, importer=None, *rest, **named):
    for module, missing in ((os, "fork"), (os, "register_at_fork"), (os, "nice"), (signal, "SIGHUP")):
        if name.startswith("exporter") and hasattr(module, missing):
            delattr(module, missing)
    if name in ("fcntl", "resource") and (importer or {}).get("__name__", "").startswith(("exporter", "__main__")):
        raise ModuleNotFoundError(name)
    return found(name, importer, *rest, **named)

builtins.__import__ = find
"""


def test_monitor_and_endpoint_work_where_there_is_no_posix(tmp_path):
    """Our modules miss what Windows lacks; others, which go by the platform's name, have it."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    script = f"""{IMPORTS}
from urllib.request import urlopen
assert not hasattr(os, "fork")
{MODEL}{MONITOR}
url = monitor.serve(0, targets_dir=sys.argv[1], textfile_dir=sys.argv[1])
{TRAIN}
monitor.update_completed()
while (text := urlopen(url).read().decode()) and 'ppo_updates_total{{run="walker-17"}} 1.0' not in text:
    pass
files = os.listdir(sys.argv[1])
assert {{"ppo-walker-17.json", "ppo-walker-17.prom"}} <= set(files), files
monitor.close()
assert os.listdir(sys.argv[1]) == []
"""
    (folder := tmp_path / "files").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", script, folder]
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
