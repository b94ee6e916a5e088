"""`python -m trainer` as a person or a process manager uses it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.environments.host_growth import ACTION_HEADS
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import train

REPOSITORY = Path(__file__).parents[2]


def command(tmp_path: Path, *flags: str) -> list[str]:
    """Writes nothing outside of `tmp_path`."""
    folders = ["--targets-dir", str(tmp_path / "targets"), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    return [sys.executable, "-m", "trainer", "--metrics-port", "0", *folders, *flags]


_launched: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _end_all():
    yield
    while _launched:
        _launched.pop().kill()  # those that a failed test has left


def launch(command: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _launched.append(process)
    return process


def start(tmp_path: Path, *flags: str) -> subprocess.Popen:
    return launch(command(tmp_path, *flags))


@pytest.fixture
def run(cli, tmp_path) -> Callable[..., tuple[str, str]]:
    """Trains to the end in this process; output and errors."""
    return lambda *flags, code=0: cli(*command(tmp_path, *flags)[3:], code=code)


def endpoint(process: subprocess.Popen) -> str:
    return re.search(r"metrics at (\S+)", process.stdout.readline()).group(1)


def scrape(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


def wait_for_update(url: str) -> None:
    deadline = time.monotonic() + 60
    while not re.search(r"^ppo_updates_total{.*} [1-9]", scrape(url), re.M):
        assert time.monotonic() < deadline
        time.sleep(0.1)


SMALL = ("--num-envs", "16", "--rollout-steps", "16", "--minibatch-size", "64")


@pytest.mark.parametrize(
    ("flags", "host"), [((), socket.gethostname()), (("--metrics-target", "trainer.example:80"), "trainer.example:80")]
)
def test_the_target_file_names_what_others_can_reach(tmp_path, flags, host):
    targets = []

    class Look(StopRequest):
        """Reads the target file at the first step of the run, and ends it."""

        def __call__(self) -> bool:
            targets.extend(json.loads(path.read_text())[0]["targets"][0] for path in tmp_path.glob("targets/*.json"))
            self.signum = signal.SIGTERM
            return True

    config, telemetry = parse_config(command(tmp_path, *SMALL, "--metrics-address", "0.0.0.0", *flags)[3:])
    assert train(config, telemetry, Look()) == 143
    assert targets and targets[0].startswith(host)


def test_the_default_environment_trains_with_seven_heads_on_metrics(tmp_path):
    process = start(tmp_path, *SMALL, "--seed", "7")
    try:
        url = endpoint(process)
        wait_for_update(url)
        text = scrape(url)
        assert set(re.findall(r'ppo_head_gradient_norm{head="(\w+)"', text)) == set(ACTION_HEADS)
        assert list(ACTION_HEADS) == ["slot", "blueprint", "alpha", "target", "speed", "curve", "op"]
        assert len(re.findall(r"^ppo_gradient_cv{", text, re.M)) == 1
        assert 'environment="host-growth"' in text and 'seed="7"' in text
        (target,) = (tmp_path / "targets").glob("*.json")
        assert json.loads(target.read_text())[0]["targets"][0] in url
    finally:
        process.kill()
        process.communicate()
    # A crash leaves the target, so that Prometheus sees it down.
    assert list((tmp_path / "targets").glob("*.json"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_cleanly_and_says_where_it_is(tmp_path, signum, code):
    process = start(tmp_path, *SMALL, "--total-timesteps", "100000000")
    url = endpoint(process)
    wait_for_update(url)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and err == ""
    last = out.splitlines()[-1]
    assert re.fullmatch(
        rf"host-growth-seed1: stopped by {signum.name} after update \d+ of \d+, \d+ environment steps, \d+ episodes.*",
        last,
    )
    assert not list((tmp_path / "targets").iterdir())


def test_a_signal_that_comes_twice_at_once_costs_no_checkpoint_and_one_that_comes_again_ends_a_push(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flags = ("--total-timesteps", "100000000", "--checkpoint-every", "100000")
        process = start(tmp_path, *SMALL, *flags, "--pushgateway", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wait_for_update(endpoint(process))
        for _ in range(3):
            process.terminate()
            time.sleep(0.003)
        silent.settimeout(30)
        pushing, _ = silent.accept()
        with pushing:
            assert list((tmp_path / "checkpoints").glob("*/*.pt"))
            time.sleep(1.1)
            process.terminate()
            out, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and "stopped by SIGTERM" in out


def test_a_signal_that_comes_again_does_not_cost_the_checkpoint_that_is_being_written(tmp_path):
    code = (
        "import sys, time; from trainer import __main__, checkpoint_files; real = checkpoint_files.RunFolder.write\n"
        "def slow(*given): print('writing', flush=True); time.sleep(2.5); return real(*given)\n"
        "checkpoint_files.RunFolder.write = slow; sys.exit(__main__.main())"
    )
    flags = ("--total-timesteps", "100000000", "--checkpoint-every", "100000")
    arguments = command(tmp_path, *SMALL, *flags)
    process = launch([sys.executable, "-c", code, *arguments[arguments.index("trainer") + 1 :]])
    wait_for_update(endpoint(process))
    process.terminate()
    assert "writing\n" in iter(process.stdout.readline, "")
    time.sleep(1.1)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "") and "stopped by SIGTERM" in out
    assert list((tmp_path / "checkpoints").glob("*/*.pt")) and not list((tmp_path / "targets").iterdir())


def test_a_run_without_an_output_ends_as_it_should(tmp_path):
    trainer = command(tmp_path, *SMALL, "--total-timesteps", str(256 * 2))
    subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *trainer], cwd=REPOSITORY, check=True)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*/*.pt")] == ["update-00000002.pt"]


def test_a_run_that_is_to_outlive_its_terminal_does(tmp_path):
    process = launch(["nohup", *command(tmp_path, *SMALL, "--total-timesteps", "100000000")])
    url = endpoint(process)
    wait_for_update(url)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert "ppo_updates_total" in scrape(url)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_disk_on_which_not_even_a_line_has_room_does_not_end_the_training(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tmp_path, *SMALL, "--total-timesteps", str(256 * 3), "--log-interval", "1"),
            cwd=REPOSITORY,
            stdout=full,
            stderr=full,
            timeout=120,
        )
    assert done.returncode == 0
    assert [path.name for path in (tmp_path / "checkpoints").glob("*/*.pt")] == ["update-00000003.pt"]
    assert not list((tmp_path / "targets").iterdir())


def test_plain_lines_come_every_n_updates_and_the_run_finishes(run):
    out, err = run(*SMALL, "--total-timesteps", str(256 * 5), "--log-interval", "2")
    assert re.findall(r"^update (\d)/5 .* CV:\d\.\d{3} (?:stable|warn|BAD)$", out, re.M) == ["2", "4", "5"]
    assert "finished after update 5 of 5, 1280 environment steps" in out.splitlines()[-1]
    assert err == ""


def test_the_levels_follow_the_thresholds_of_the_run(run):
    flags = (*SMALL, "--total-timesteps", str(256 * 2), "--log-interval", "1", "--drill", "dominate:op:1-1")
    out, err = run(*flags, "--warning-threshold", "0.01", "--critical-threshold", "2.7")
    assert re.findall(r"^update (\d)/2 .* (CV:2\.646|CV:0\.\d{3}) (\w+)$", out, re.M)[0] == ("1", "CV:2.646", "warn")
    assert re.search(r"^update 2/2 .* CV:0\.\d{3} warn$", out, re.M)
    assert err == "warning: 7 heads: CV cannot exceed 2.646; critical at 2.7 can never be reached\n"


def test_a_taken_port_is_an_error_before_training_starts(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        out, err = run("--metrics-port", str(port), code=1)
    assert (
        f"cannot serve /metrics on 127.0.0.1:{port}: Address already in use; --metrics-address and --metrics-port"
        in err
    )
    assert "update" not in out and not list(tmp_path.iterdir())


def test_a_targets_folder_that_cannot_be_written_is_an_error_before_training_starts(run, tmp_path):
    (tmp_path / "file").touch()
    _, err = run("--targets-dir", str(tmp_path / "file"), code=1)
    assert f"cannot write a target file to {tmp_path / 'file'}" in err and "Traceback" not in err


@pytest.mark.parametrize("delay", [0.3, 1.2])
def test_a_signal_while_starting_is_taken_too(tmp_path, delay):
    process = start(tmp_path, *SMALL)
    time.sleep(delay)
    process.terminate()
    time.sleep(0.05)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in err
    assert not list(tmp_path.glob("targets/*.json"))


def test_a_nan_is_skipped_and_shown_or_stops_the_run_with_the_head_named(run, tmp_path):
    flags = (*SMALL, "--total-timesteps", str(256 * 3), "--log-interval", "1", "--drill", "nan:curve:2-2")
    out, _ = run(*flags)
    assert re.search(r"^update 2/3 .* CV:inf BAD$", out, re.M)
    assert re.search(r"^update 3/3 .* CV:0\.\d{3} stable$", out, re.M)
    assert "16 gradient steps skipped" in out
    _, err = run(*flags, "--on-nonfinite", "raise", code=1)
    assert "non-finite gradient in head curve at gradient step 1 of the update" in err
    assert "Traceback" not in err
    # As after a crash, somebody is to be told.
    assert list((tmp_path / "targets").glob("*.json"))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--env", "CartPole-v11"], 2, "CartPole-v11"),
        (
            ["--env", "Pendulum-v1"],
            2,
            "action space Box(-2.0, 2.0, (1,), float32) is not supported; use Discrete",
        ),
        (["--env", "Taxi-v4"], 2, "observation space Discrete(500) is not supported; use a Box"),
        (["--device", "cudda"], 2, "device 'cudda'"),
        # Where the environment would live on the device too.
        (["--device", "cuda:99", "--num-envs", "1024"], 2, "device 'cuda:99'"),
        (["--drill", "dominate:opp:1-2"], 2, "host-growth has no head 'opp'; its heads are slot, blueprint, alpha"),
        (
            "--env CartPole-v1 --vectorization vector_entry_point --rollout-steps 1 --minibatch-size 2".split(),
            2,
            "rollout-steps must be at least 2: CartPole-v1 uses a step for every reset",
        ),
        (["--metrics-address", "203.0.113.7"], 1, "cannot serve /metrics on 203.0.113.7:0"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(run, flags, code, message):
    _, err = run(*flags, code=code)
    assert message in err and err.count("\n") == 1


def test_cartpole_learns_and_its_single_head_is_pointed_out(run):
    out, err = run(
        "--config", REPOSITORY / "examples/cartpole.yml", "--total-timesteps", "40960", "--log-interval", "1"
    )
    assert err == "warning: 1 head: CV needs two heads and stays 0.000; critical at 2.0 can never be reached\n"
    returns = [float(value) for value in re.findall(r" return (\d+\.\d+)", out)]
    assert returns[0] < 60 and returns[-1] > 195
    assert set(re.findall(r"CV:(\S+)", out)) == {"0.000"}


def test_the_live_display_shows_a_bar_per_head_and_the_flow(tmp_path):
    """In a real pseudo-terminal."""
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.environ.pop("PYTHONUNBUFFERED", None)  # without a buffer a signal may cut a frame short
        os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="40")
        (tmp_path / "notifications.log").touch()
        os.execv(
            sys.executable,
            command(tmp_path, *SMALL, "--drill", "dominate:op:1-1000", "--follow", str(tmp_path / "notifications.log")),
        )
    shown = b""
    deadline = time.monotonic() + 60
    appended = False
    while not (b"BAD" in shown and b"a notification" in shown):
        assert time.monotonic() < deadline, shown[-3000:]
        shown += os.read(terminal, 65536)
        if b"update" in shown and not appended:
            time.sleep(0.5)
            (tmp_path / "notifications.log").write_text("a notification\n")
            appended = True
    os.kill(pid, signal.SIGINT)
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:
        pass  # Linux's way of saying that the other end has closed
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "Flow: CV:2.646 BAD" in text and "ETA" in text
    assert b"\x1b[1;31mCV:2.646 BAD" in shown
    for head in ACTION_HEADS:
        assert re.search(rf"{head} +━", text), head
    assert "stopped by SIGINT" in text.split("╰")[-1]
