"""An interrupted run continues as if nothing had happened."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter import Thresholds
from exporter.link import MetricsServer
from exporter.snapshot import RunSnapshot
from exporter.telemetry import HEAD_SIGNALS
from trainer.agent import NonFiniteGradientError
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import checkpoints_in, load
from trainer.config import ConfigError, StartError, TelemetryConfig, TrainerConfig
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import Training, train

REPOSITORY = Path(__file__).parents[2]
TINY = TrainerConfig(num_envs=4, rollout_steps=8, minibatch_size=16, hidden_size=8, epochs=2, total_timesteps=32 * 12)


@pytest.fixture
def tiny(tmp_path) -> TrainerConfig:
    return replace(TINY, checkpoint_dir=str(tmp_path / "checkpoints"))


@pytest.fixture
def place(tmp_path) -> TelemetryConfig:
    return TelemetryConfig(metrics_port=0, targets_dir=str(tmp_path / "targets"))


class StopAt(StopRequest):
    """SIGTERM at the k-th time that training asks, which it does after every environment and gradient step."""

    def __init__(self, asked: int | None = None) -> None:
        super().__init__()
        self._left = asked

    def __call__(self) -> bool:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.signum = signal.SIGTERM
        return super().__call__()


def trained(training: Training, updates: int) -> list[RunSnapshot]:
    """The run after each of so many updates."""
    runs = []
    for _ in range(updates):
        assert training.update(StopRequest())
        runs.append(training.run_snapshot)
    return runs


def cvs(runs: list[RunSnapshot]) -> list[float]:
    return [run.gradient_quality.gradient_cv for run in runs]


def counters(run: RunSnapshot) -> dict:
    """All that is the same when the same work is done, whenever and however fast."""
    plain = run.plain()
    for name in ("update_duration_seconds", "rollout_duration_seconds"):
        plain[name] = sum(plain[name]["counts"])
    times = ("last_update_timestamp_seconds", "level_since_timestamp_seconds", "update_interval_seconds")
    for name in (*times, "rank_rollout_seconds", "resumes"):
        del plain[name]
    return plain


def tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def assert_same(left: Training, right: Training) -> None:
    ours, theirs = tensors(left.state_dict()), tensors(right.state_dict())
    assert len(ours) == len(theirs) > 30
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert counters(left.run_snapshot) == counters(right.run_snapshot)


def resumed(config: TrainerConfig, *flags: str) -> TrainerConfig:
    return parse_config(["--checkpoint-dir", config.checkpoint_dir, "--resume", *flags])[0]


def test_stopped_halfway_and_resumed_is_bit_identical_to_never_stopped(tiny):
    straight = Training(tiny)
    expected = trained(straight, 12)
    first = Training(tiny)
    with Checkpoints(first) as checkpoints:
        for _ in range(6):
            first.update(StopRequest())
            checkpoints.updated()
    second = Training(resumed(tiny))
    assert second.updates == 6 and second.run_snapshot.resumes == 1 and second.notes == []
    assert cvs(trained(second, 6)) == cvs(expected[6:])
    assert_same(straight, second)
    assert second.run_snapshot.signals == straight.run_snapshot.signals  # the learning rate is among them


@pytest.mark.parametrize("asked", [1, 5, 13, 14, 15, 60, 83, 96])
def test_a_signal_at_any_step_costs_nothing_but_the_update_in_progress(tiny, place, asked):
    """In a rollout or in an update, also the first."""
    code = train(tiny, place, StopAt(asked))
    assert code == 128 + signal.SIGTERM
    straight = Training(tiny)
    trained(straight, 12)
    if not checkpoints_in(Path(tiny.checkpoint_dir) / "host-growth-seed1"):
        assert asked < 15 and not list(Path(tiny.checkpoint_dir).iterdir())
        return
    training = Training(resumed(tiny))
    trained(training, 12 - training.updates)
    assert_same(straight, training)


def test_the_cv_series_is_the_same_with_and_without_checkpoints_and_endpoint(tiny):
    plain = trained(Training(replace(tiny, checkpoint_every=0)), 12)
    training, seen = Training(replace(tiny, checkpoint_every=1)), []
    over = threading.Event()
    with MetricsServer(training.aggregator, port=0) as server, Checkpoints(training) as checkpoints:

        def scrape() -> None:
            while not over.is_set():
                urllib.request.urlopen(server.url, timeout=10).read()

        scraper = threading.Thread(target=scrape)
        scraper.start()
        for _ in range(12):
            seen += trained(training, 1)
            checkpoints.updated()
        over.set()
        scraper.join()
    assert [run.plain()["gradient_quality"] for run in seen] == [run.plain()["gradient_quality"] for run in plain]


def crashed_after(config: TrainerConfig, updates: int) -> tuple[RunSnapshot, RunSnapshot]:
    """The run of a process that dies after so many updates: at its last checkpoint, and at its end."""
    processes = multiprocessing.get_context("fork")
    seen = processes.SimpleQueue()

    def train_and_die() -> None:
        training = Training(config)
        checkpoints = Checkpoints(training)
        for _ in range(updates):
            (run,) = trained(training, 1)
            checkpoints.updated()
            if run.updates % config.checkpoint_every == 0 or run.updates == updates:
                seen.put(run.plain())
        os.kill(os.getpid(), signal.SIGKILL)

    process = processes.Process(target=train_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return RunSnapshot.from_plain(seen.get()), RunSnapshot.from_plain(seen.get())


def test_counters_on_metrics_never_go_back_though_a_crash_costs_updates(tiny):
    """For Prometheus a counter that falls has restarted from zero, and all it had counts again."""
    at_checkpoint, before = crashed_after(replace(tiny, checkpoint_every=5), 8)
    training = Training(resumed(tiny))
    after = training.run_snapshot
    assert training.updates == 5
    # The last values are those of the checkpoint: the updates that the crash cost come again.
    assert after.recent_gradient_cvs == before.recent_gradient_cvs[:5]
    assert after.signals == at_checkpoint.signals
    last = at_checkpoint.gradient_quality
    quality = replace(
        before.gradient_quality,
        gradient_cv=last.gradient_cv,
        gradient_norm=last.gradient_norm,
        head_norms=last.head_norms,
        **{name: getattr(last, name) for name in HEAD_SIGNALS},
    )
    expected = replace(
        before, gradient_quality=quality, signals=after.signals, recent_gradient_cvs=after.recent_gradient_cvs
    )
    assert counters(after) == counters(expected) and after.updates == 8
    assert after.update_duration_seconds == before.update_duration_seconds
    with MetricsServer(training.aggregator, port=0) as server:
        text = urllib.request.urlopen(server.url, timeout=10).read().decode()
    assert 'ppo_resumes_total{run="host-growth-seed1"} 1.0' in text
    assert 'ppo_updates_total{run="host-growth-seed1"} 8.0' in text
    assert 'ppo_update_duration_seconds_count{run="host-growth-seed1"} 8.0' in text
    # A spoiled note is no obstacle: the checkpoint has its own.
    (Path(training.config.resume).parent / "totals.json").write_text('{"run"')
    assert Training(training.config).run_snapshot.updates == 5


def test_an_error_leaves_a_checkpoint_of_the_last_whole_update(tiny, place):
    config = replace(tiny, drill="nan:op:9-12", on_nonfinite="raise")
    with pytest.raises(NonFiniteGradientError):
        train(config, place, StopRequest())
    training = Training(resumed(tiny, "--on-nonfinite", "skip"))
    assert training.updates == 8 and training.run_snapshot.gradient_quality.skipped_steps == 1
    assert training.notes == ["settings that differ from the checkpoint: on_nonfinite raise -> skip"]


def test_an_interrupt_while_a_state_is_kept_leaves_the_one_before_whole(tiny, monkeypatch):
    class Interrupted(dict):
        def items(self):
            raise KeyboardInterrupt

    straight, training = Training(tiny), Training(tiny)
    trained(straight, 3)
    with pytest.raises(KeyboardInterrupt), Checkpoints(training) as checkpoints:
        for _ in range(3):
            trained(training, 1)
            checkpoints.updated()
        trained(training, 1)
        monkeypatch.setattr(training.collector, "state_dict", Interrupted)  # the agent's state comes before it
        checkpoints.updated()
    saved = load(checkpoints.last)
    assert saved["updates"] == 3
    expected = straight.state_dict()
    for part in ("agent", "collector"):
        assert all(map(torch.equal, tensors(saved[part]), tensors(expected[part])))


def test_annealing_goes_on_and_a_longer_run_anneals_over_its_whole_length(tiny, place):
    train(tiny, place, StopRequest())
    done = Training(resumed(tiny))
    assert done.updates == done.config.total_updates == 12
    assert done.notes == ["the run has reached its end, update 12; set a larger --total-timesteps to continue"]
    longer = Training(resumed(tiny, "--total-timesteps", str(32 * 24)))
    (run,) = trained(longer, 1)
    assert run.signals["learning_rate"] == pytest.approx(tiny.learning_rate / 2)


def test_what_cannot_be_restored_is_said_and_the_run_goes_on(tiny):
    config = replace(tiny, env="CartPole-v1", hidden_size=16, checkpoint_every=5)
    first = Training(config)
    with Checkpoints(first) as checkpoints:
        trained(first, 6)
        checkpoints.updated()
    second = Training(resumed(tiny, "--env", "CartPole-v1"))
    (note,) = second.notes
    assert "CartPole-v1 cannot be saved: its episodes in progress are lost" in note
    saved = load(Path(second.config.resume))
    assert all(torch.equal(a, b) for a, b in zip(tensors(second.agent.state_dict()), tensors(saved["agent"])))
    assert second.collector.recent_returns == first.collector.recent_returns
    # New episodes, not those with which the run began.
    begun, again = (
        training.collector.collect(StopRequest()).observations[0] for training in (Training(config), second)
    )
    assert not torch.equal(begun, again)
    trained(second, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-envs", "8"), r"--num-envs: the run in .*update-00000012.pt has 4, which a resume cannot change"),
        (("--hidden-size", "16"), r"--hidden-size: the run in .* has 8"),
        (("--minibatch-size", "99"), r"--minibatch-size and .*num_envs and .*rollout_steps: a minibatch of 99"),
        (("--run", "other"), r"--resume: .*other: there is no checkpoint of the run 'other' yet"),
    ],
)
def test_settings_that_cannot_change_are_refused_with_both_values(tiny, place, flags, message):
    train(tiny, place, StopRequest())
    with pytest.raises(ConfigError, match=message):
        resumed(tiny, *flags)


@pytest.mark.parametrize(("run", "other"), [("CartPole-v1-seed1", "CartPole-v1-seed1.5"), ("gamma-0", "gamma-0.99")])
def test_a_run_goes_on_from_its_own_folder_though_another_run_is_called_like_one_of_its_folders(
    tiny, place, run, other
):
    for name, updates in ((run, 2), (other, 3)):
        train(replace(tiny, run=name, total_timesteps=32 * updates), place, StopRequest())
    theirs = Path(tiny.checkpoint_dir) / other
    before = {path: path.read_bytes() for path in theirs.iterdir()}
    config = resumed(tiny, "--run", run, "--total-timesteps", str(32 * 5))
    assert config.run == run and Path(config.resume).parent == Path(tiny.checkpoint_dir) / run
    train(config, place, StopRequest())
    assert {path: path.read_bytes() for path in theirs.iterdir()} == before
    training = Training(resumed(tiny, "--run", run))
    assert training.updates == training.run_snapshot.updates == 5


def test_without_a_name_a_run_is_not_resumed_as_another(tiny, place):
    """The name by default comes from environment and seed, and no flag contradicts the one in the checkpoint."""
    train(replace(tiny, run="host-growth-seed1.5"), place, StopRequest())
    with pytest.raises(ConfigError, match="there is no checkpoint of the run 'host-growth-seed1' yet"):
        resumed(tiny)


def test_counters_of_another_run_in_the_same_folder_are_neither_taken_over_nor_overwritten(tiny, place):
    for name, updates in (("mine", 3), ("other", 2)):
        train(replace(tiny, run=name, total_timesteps=32 * updates), place, StopRequest())
    collection = Path(tiny.checkpoint_dir) / "other"
    mine = Path(tiny.checkpoint_dir) / "mine/update-00000003.pt"
    mine = mine.rename(collection / mine.name)
    training = Training(resumed(tiny, str(mine), "--total-timesteps", str(32 * 5)))
    with Checkpoints(training) as checkpoints:
        assert training.run_snapshot.updates == 3
        trained(training, 2)
        checkpoints.updated()
    again = Training(resumed(tiny, "--run", "mine"))
    assert again.updates == again.run_snapshot.updates == 5
    assert json.loads((collection / "totals.json").read_text())["run"] == "other"
    assert [path.name for path in checkpoints_in(collection)] == ["update-00000003.pt", "update-00000002.pt"]


def test_settings_come_from_the_checkpoint_but_not_places(tiny, place, tmp_path):
    settings = {"gamma": 0.9, "log_interval": 3, "critical_threshold": 1.5, "drill": "starve:op:1-1"}
    train(replace(tiny, **settings), place, StopRequest())
    assert Training(resumed(tiny)).run_snapshot.gradient_quality.thresholds == Thresholds(0.5, 1.5)
    training = Training(resumed(tiny, "--critical-threshold", "2.5"))
    assert training.run_snapshot.gradient_quality.thresholds == Thresholds(0.5, 2.5)
    assert "settings that differ from the checkpoint: critical_threshold 1.5 -> 2.5" in training.notes
    config = resumed(tiny, "--epochs", "3")
    assert (config.gamma, config.log_interval, config.num_envs, config.epochs) == (0.9, 3, 4, 3)
    assert config.drill is None


def test_two_processes_cannot_continue_one_run(tiny, place):
    train(tiny, place, StopRequest())
    with Checkpoints(Training(resumed(tiny))), pytest.raises(StartError, match="another process is writing the check"):
        Checkpoints(Training(resumed(tiny)))


def test_a_checkpoint_that_fits_no_network_is_refused(tiny, place, tmp_path):
    train(tiny, place, StopRequest())
    path = Path(resumed(tiny).resume)
    content = load(path)
    content["agent"]["policy"] = {name: torch.ones(3, 3) for name in content["agent"]["policy"]}
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"update-00000012.pt: it does not fit host-growth in this version"):
        Training(resumed(tiny))


def test_a_folder_that_cannot_be_written_is_an_error_and_a_checkpoint_that_cannot_a_warning(
    tiny, place, tmp_path, capsys
):
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=f"cannot write checkpoints to {tmp_path}/file: .*--checkpoint-every 0"):
        train(replace(tiny, checkpoint_dir=str(tmp_path / "file")), place, StopRequest())
    assert not list(tmp_path.glob("targets/*"))
    training = Training(tiny)
    with Checkpoints(training) as checkpoints:
        (Path(tiny.checkpoint_dir) / "host-growth-seed1").rename(tmp_path / "gone")
        trained(training, 1)
        checkpoints.updated()
    assert "warning: no checkpoint of update 1 in " in capsys.readouterr().err


def test_without_checkpoints_nothing_is_written(tiny, place):
    train(replace(tiny, checkpoint_every=0), place, StopRequest())
    assert not Path(tiny.checkpoint_dir).exists()


def test_from_the_command_line_a_signal_then_resume(cli, tmp_path):
    """The second one has the port, the folders and nothing else."""
    places = ["--metrics-port", "0", "--targets-dir", tmp_path / "targets"]
    places += ["--checkpoint-dir", tmp_path / "checkpoints"]
    small = ["--num-envs", "4", "--rollout-steps", "8", "--minibatch-size", "16", "--total-timesteps", "3200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *places, *small, "--log-interval", "1"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stdout.readline().startswith("update 5/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    update, path = re.search(r"SIGINT after update (\d+) of .*; checkpoint (\S+)$", out).groups()
    assert path.endswith(f"host-growth-seed1/update-{int(update):08d}.pt")
    end = 32 * (int(update) + 3)
    out, err = cli(*places, "--resume", "--total-timesteps", end)
    assert f"from {path} on, metrics at http" in out.splitlines()[0]
    assert re.search(rf"^update {int(update) + 3}/{int(update) + 3} steps {end} ", out, re.M)
    assert err == f"warning: settings that differ from the checkpoint: total_timesteps 3200000 -> {end}\n"
