"""Stable-Baselines3's own PPO, A2C and DQN with the callback on them, read over TCP."""

import csv
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import fetch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from sb3 import AfterEachUpdate, ppo, scrape
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv

from exporter import GradientMonitor, RunAggregator
from exporter.integrations.stable_baselines3 import PrometheusCallback


@pytest.fixture
def callback():
    """Makes callbacks on a free port that are closed after the test."""
    made = []

    def make(run: str | None = "levers", **options) -> PrometheusCallback:
        made.append(PrometheusCallback(run, port=options.pop("port", 0), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("learning_rate", [0.0, 0.05])
def test_a_head_that_is_deterministic_is_told_from_one_that_is_not(learning_rate, callback):
    model = ppo(spaces.MultiDiscrete((3, 1, 4, 2)), learning_rate=learning_rate)
    with torch.no_grad():
        model.policy.action_net.bias[0] = 50.0  # the first choice of the first head
    served = callback(keep_serving=True, head_names=["a", "only", "b", "c"])
    model.learn(64, callback=served)
    values = scrape(served.url, 2)
    assert values["ppo_head_entropy_ratio/a"] < 1e-6 and 0.2 < values["ppo_head_entropy_ratio/b"] <= 1.0
    assert values["ppo_head_approx_kl/a"] == pytest.approx(0.0, abs=1e-6) and values["ppo_head_clip_fraction/a"] == 0.0
    assert [values[f"ppo_head_approx_kl/{head}"] > 1e-4 for head in "bc"] == [learning_rate > 0] * 2
    assert (values["ppo_head_clip_fraction/b"] > 0) == (learning_rate > 0)
    assert not any(name.endswith("/only") for name in values)


def test_the_sample_of_a_rollout_says_of_one_head_about_what_the_whole_of_it_says(callback):
    model = ppo(spaces.Discrete(4), n_steps=2048, batch_size=512, learning_rate=0.01)
    served = callback(keep_serving=True)
    model.learn(2048, callback=served)
    values = scrape(served.url, 1)
    buffer = model.rollout_buffer
    actions, before = (torch.from_numpy(part).flatten() for part in (buffer.actions, buffer.log_probs))
    with torch.no_grad():
        _, after, entropy = model.policy.evaluate_actions(torch.from_numpy(buffer.observations), actions)
    ratio = (after - before).exp()
    kl, clip_fraction = (ratio - 1 - ratio.log()).mean().item(), ((ratio - 1).abs() > 0.2).float().mean().item()
    assert values["ppo_head_entropy_ratio/action"] == pytest.approx(entropy.mean().item() / np.log(4), abs=0.05)
    assert values["ppo_head_approx_kl/action"] == pytest.approx(kl, rel=0.3) and kl > 0.001
    assert values["ppo_head_clip_fraction/action"] == pytest.approx(clip_fraction, abs=0.1)


def gymnasium_with_a_lambda() -> gymnasium.Env:
    return gymnasium.wrappers.TransformAction(gymnasium.make("CartPole-v1"), lambda action: action, spaces.Discrete(2))


def test_environments_in_other_processes_have_their_name(callback):
    """Also with a specification that cannot be sent, for it contains a lambda."""
    env = make_vec_env(gymnasium_with_a_lambda, 2, vec_env_cls=SubprocVecEnv)
    try:
        served = callback(None, keep_serving=True)
        PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=3, device="cpu").learn(16, callback=served)
        assert scrape(served.url, 1) and served.monitor.run == "CartPole-v1-seed3"
        assert 'environment="CartPole-v1"' in fetch(served.url)[1]
    finally:
        env.close()


def test_impossible_thresholds_are_refused_before_training():
    with pytest.raises(ValueError, match="0 < warning < critical"):
        PrometheusCallback("levers", thresholds=(1.0, 0.5))


def test_a_model_without_a_seed_has_no_seed_on_metrics_and_levels_are_by_the_thresholds_that_are_asked_for(callback):
    served = callback(keep_serving=True, thresholds=(0.25, 1.5))
    ppo(seed=None).learn(32, callback=served)
    scrape(served.url, 1)
    text = fetch(served.url)[1]
    (line,) = [line for line in text.splitlines() if line.startswith("ppo_run_info{")]
    assert 'algorithm="PPO"' in line and "seed=" not in line
    assert 'ppo_gradient_cv_threshold{level="critical",run="levers"} 1.5' in text


def test_an_environment_step_costs_no_more_than_a_count(callback, monkeypatch):
    """Signals are checked where they are recorded, which takes longer than many an environment's step."""
    record, recorded = GradientMonitor.record, []

    def counted(monitor: GradientMonitor, **values) -> None:
        recorded.append(values)
        record(monitor, **values)

    monkeypatch.setattr(GradientMonitor, "record", counted)
    ppo().learn(3 * 32, callback=callback())
    assert [values["episodes"] for values in recorded] == [3, 3, 3]


@pytest.mark.parametrize("target_kl", [None, 1e-9])
def test_metrics_agree_with_what_sb3_logs(target_kl, callback, tmp_path: Path):
    model = ppo(learning_rate=lambda remaining: 3e-3 * remaining, target_kl=target_kl)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    served, scraped = callback(), []
    after_each = AfterEachUpdate(lambda: scraped.append(scrape(served.url, len(scraped) + 1)))
    model.learn(6 * 32, callback=[served, after_each])
    rows = [
        {key: float(value) for key, value in row.items() if value}
        for row in csv.DictReader((tmp_path / "progress.csv").open())
    ]
    assert len(scraped) == 5 and len(rows) == 6
    # A row has the episodes of its rollout, and the update before.
    for number, (values, collected, trained) in enumerate(zip(scraped, rows, rows[1:]), start=1):
        expected = {
            "ppo_policy_loss": trained["train/policy_gradient_loss"],
            "ppo_value_loss": trained["train/value_loss"],
            "ppo_entropy": -trained["train/entropy_loss"],
            "ppo_approx_kl": trained["train/approx_kl"],
            "ppo_clip_fraction": trained["train/clip_fraction"],
            "ppo_explained_variance": trained["train/explained_variance"],
            "ppo_learning_rate": trained["train/learning_rate"],
            "ppo_episode_return_mean": collected["rollout/ep_rew_mean"],
            "ppo_episode_length_mean": collected["rollout/ep_len_mean"],
            "ppo_environment_steps_total": collected["time/total_timesteps"],
            "ppo_episodes_total": number * 32 // 10,
            "ppo_updates_total": number,
            "ppo_update_duration_seconds_count": number,
            "ppo_rollout_duration_seconds_count": number,
            "ppo_exporter_errors_total": 0,
        }
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if target_kl is None:
            assert values["ppo_gradient_cv_per_step_count"] == number * 2 * 2


def test_gradients_are_in_sb3s_own_log_beside_the_losses_of_their_update(callback, tmp_path: Path):
    model, cvs = ppo(), []
    model.set_logger(configure(str(tmp_path), ["csv"]))
    served = callback(log_gradients=True, on_update=lambda run: cvs.append(run.gradient_quality.gradient_cv))
    model.learn(4 * 32, callback=served)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert rows[0]["gradient/cv"] == ""
    assert [float(row["gradient/cv"]) for row in rows[1:]] == pytest.approx(cvs[:-1], rel=1e-6)
    assert float(rows[1]["gradient/share/action_0"]) > 0 and float(rows[1]["gradient/norm/action_2"]) > 0


@pytest.mark.parametrize("options", [{}, {"before_clipping": False, "global_norm": True}])
def test_fifty_updates_are_bit_identical_with_and_without_the_callback(options, callback):
    def trained(observed_by) -> PPO:
        model = ppo(n_steps=16, max_grad_norm=0.05)
        return model.learn(50 * 16, callback=observed_by)

    served = callback(keep_serving=True, **options)
    plain, observed = trained(None), trained(served)
    scrape(served.url, 50)
    expected = plain.policy.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in observed.policy.state_dict().items())
    states = (model.policy.optimizer.state_dict()["state"] for model in (plain, observed))
    for before, after in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_norms_are_those_before_clipping_unless_asked_otherwise(callback):
    def norms(**options) -> dict[str, float]:
        served = callback(f"{options}", keep_serving=True, **options)
        # A single step per update, so that both see the same gradient.
        ppo(n_epochs=1, batch_size=32, max_grad_norm=1e-3).learn(32, callback=served)
        values = scrape(served.url, 1)
        return {name: values[f"ppo_head_gradient_norm/{name}"] for name in ("action_0", "action_1", "action_2")} | {
            "cv": values["ppo_gradient_cv"]
        }

    before, after = norms(aggregator=RunAggregator()), norms(aggregator=RunAggregator(), before_clipping=False)
    assert before["cv"] == pytest.approx(after["cv"], rel=1e-5)
    assert after["action_0"] < 1e-3 < before["action_0"]


def test_the_endpoint_lives_as_long_as_learn_and_a_second_one_starts_anew(callback, tmp_path: Path):
    served, during = callback(targets_dir=tmp_path, textfile_dir=tmp_path), []

    def look() -> None:
        (target_file,) = tmp_path.glob("*.json")
        (target,) = json.loads(target_file.read_text())
        assert target["labels"]["run"] == "levers" and target["targets"][0] in served.url
        assert (tmp_path / "ppo-levers.prom").exists()
        scrape(served.url, 1)
        during.append(served.url)

    model = ppo()
    for _ in range(2):
        model.learn(64, callback=[served, AfterEachUpdate(look)])
        assert served.url is None and served.monitor is None
        assert list(tmp_path.iterdir()) == []
    assert len(during) == 2


@pytest.mark.parametrize("keep_serving", [True, None])
def test_in_a_loop_of_learn_it_stays_open_and_goes_on_counting(keep_serving, callback):
    served, model = callback(keep_serving=keep_serving), ppo()
    for number in (1, 2, 3):
        model.learn(64, callback=served, reset_num_timesteps=False)
        values = scrape(served.url, 2 * number)
        assert values["ppo_environment_steps_total"] == model.num_timesteps == 64 * number
    url = served.url
    served.close()
    with pytest.raises(OSError):
        fetch(url)


def test_after_ctrl_c_the_values_stay_and_the_next_learn_takes_over(callback):
    def interrupt() -> None:
        raise KeyboardInterrupt

    first = callback()
    with pytest.raises(KeyboardInterrupt):
        ppo().learn(96, callback=[first, AfterEachUpdate(interrupt)])
    url = first.url
    scrape(url, 1)

    second, during = callback(keep_serving=True), []
    ppo().learn(64, callback=[second, AfterEachUpdate(lambda: during.append(scrape(second.url, 1)))])
    assert scrape(second.url, 2) and len(during) == 1
    assert first.url is None
    with pytest.raises(OSError):
        fetch(url)


def test_after_ctrl_c_the_same_callback_goes_on_where_it_was(callback):
    def interrupt() -> None:
        raise KeyboardInterrupt

    served, model = callback(), ppo()
    with pytest.raises(KeyboardInterrupt):
        model.learn(96, callback=[served, AfterEachUpdate(interrupt)])
    during = []
    after_each = AfterEachUpdate(lambda: during.append(scrape(served.url, len(during) + 1)))
    model.learn(96, callback=[served, after_each], reset_num_timesteps=False)
    assert [values["ppo_gradient_cv_per_step_count"] for values in during] == [4, 8, 12]
    assert [values["ppo_environment_steps_total"] for values in during] == [32, 64, 96]
    assert [values["ppo_episodes_total"] for values in during] == [3, 6, 9]


def test_training_without_the_callback_in_between_is_not_measured(callback):
    served, model = callback(keep_serving=True), ppo()
    for observed_by in (served, None, served):
        model.learn(32, callback=observed_by)
    values = scrape(served.url, 2)
    assert values["ppo_gradient_cv_per_step_count"] == 2 * 4
    assert values["ppo_environment_steps_total"] == 64


def test_a_run_that_another_thread_trains_is_not_taken_over_before_its_end(callback):
    first, is_training, may_end = callback(keep_serving=True), threading.Event(), threading.Event()

    def hold() -> None:
        is_training.set()
        may_end.wait(60)

    thread = threading.Thread(target=lambda: ppo().learn(64, callback=[first, AfterEachUpdate(hold)]))
    thread.start()
    try:
        assert is_training.wait(60)
        with pytest.raises(ValueError, match="another monitor already measures"):
            ppo().learn(32, callback=callback())
        scrape(first.url, 1)
    finally:
        may_end.set()
        thread.join()
    ppo().learn(32, callback=(second := callback(keep_serving=True)))
    assert scrape(second.url, 1) and first.url is None


def test_in_a_notebook_the_newest_training_of_a_run_takes_over(callback, monkeypatch):
    """Though the one before has been left by an exception, in whatever thread; the fixture closes both."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with ThreadPoolExecutor(1) as another_thread:
        learning = another_thread.submit(ppo().learn, 64, [callback(), AfterEachUpdate(lambda: 1 / 0)])
        assert isinstance(learning.exception(), ZeroDivisionError)
    ppo().learn(32, callback=(second := callback(keep_serving=True)))
    scrape(second.url, 1)


def test_a_taken_port_is_said_before_training_and_leaves_nothing_behind(callback):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        model = ppo()
        with pytest.raises(OSError, match="cannot serve"):
            model.learn(64, callback=callback(port=taken.getsockname()[1]))
    model.learn(64, callback=callback())


def test_two_trainings_share_an_endpoint(callback):
    first = callback("first", keep_serving=True)
    ppo().learn(32, callback=first)
    second = callback("second", keep_serving=True, port=int(first.url.split(":")[2].split("/")[0]))
    ppo().learn(64, callback=second)
    assert second.url == first.url
    scrape(first.url, 2)  # which are those of the second
    assert 'ppo_updates_total{run="first"} 1.0' in fetch(first.url)[1]
