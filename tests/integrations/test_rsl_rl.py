"""rsl-rl, with the real library."""

from pathlib import Path

import pytest
import torch
from conftest import fetch
from robotics import (
    ENVS,
    EPISODE,
    JOINTS,
    STEPS,
    Arm,
    Witness,
    assert_agrees,
    mean_norms,
    norms_of_last_averaging,
    row_norms,
    scrape,
)
from torch import nn


@pytest.fixture
def group():
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def rsl_rl_runner(log_dir: Path, distribution: str = "GaussianDistribution"):
    runners = pytest.importorskip("rsl_rl.runners", reason="needs rsl-rl-lib: make test-integrations")
    from rsl_rl.env import VecEnv
    from tensordict import TensorDict

    class ArmEnv(VecEnv):
        num_envs, num_actions, max_episode_length, device, cfg = ENVS, 3, EPISODE, "cpu", {}

        def __init__(self) -> None:
            self.arm = Arm()
            self.episode_length_buf = torch.zeros(ENVS, dtype=torch.long)

        def get_observations(self) -> TensorDict:
            return TensorDict({"policy": self.arm.observation}, batch_size=[ENVS])

        def step(self, actions):
            _, rewards, done = self.arm.step(actions)
            return self.get_observations(), rewards, torch.full((ENVS,), done), {}

    network = {"class_name": "MLPModel", "hidden_dims": [16], "activation": "elu"}
    configuration = {
        "num_steps_per_env": STEPS,
        "save_interval": 100,
        "logger": "tensorboard",
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "algorithm": {"class_name": "PPO", "num_learning_epochs": 2, "num_mini_batches": 2, "max_grad_norm": 0.05},
        "actor": {**network, "distribution_cfg": {"class_name": distribution}},
        "critic": dict(network),
    }
    return runners.OnPolicyRunner(ArmEnv(), configuration, log_dir=str(log_dir), device="cpu")


def test_rsl_rl_serves_its_joints_and_its_own_losses(tmp_path: Path):
    runner = rsl_rl_runner(tmp_path)
    from exporter.integrations.rsl_rl import watch_runner

    actor, losses = runner.alg.get_policy(), []
    layer = [module for module in actor.mlp.modules() if isinstance(module, nn.Linear)][-1]
    update = runner.alg.update
    runner.alg.update = lambda: losses.append(update()) or losses[-1]
    witness = Witness(lambda: row_norms(layer.weight, layer.bias, actor.distribution.std_param))
    with witness, watch_runner(runner, "arm", joint_names=JOINTS, port=0) as monitor:
        runner.learn(3)
        values = scrape(url := monitor.url, 3)
        assert_agrees(values, witness.cvs, 3, JOINTS)
        assert values["ppo_policy_loss"] == pytest.approx(losses[-1]["surrogate"])
        assert values["ppo_value_loss"] == pytest.approx(losses[-1]["value"])
        assert values["ppo_entropy"] == pytest.approx(losses[-1]["entropy"])
        assert values["ppo_learning_rate"] == runner.alg.learning_rate
        assert values["ppo_episode_length_mean"] == EPISODE
        # Before clipping, which leaves less than 0.05 of the whole actor.
        assert values["ppo_head_gradient_norm/hip"] > 0.05
    with pytest.raises(OSError):
        fetch(url)
    assert monitor.url is None


def test_rsl_rl_weights_are_those_without_a_monitor_also_where_the_network_gives_the_spread(tmp_path: Path):
    pytest.importorskip("rsl_rl", reason="needs rsl-rl-lib: make test-integrations")
    from exporter.integrations.rsl_rl import watch_runner

    def trained(is_watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        runner = rsl_rl_runner(tmp_path, "HeteroscedasticGaussianDistribution")
        if not is_watched:
            runner.learn(3)
        else:
            with watch_runner(runner, "arm", port=0) as monitor:
                runner.learn(3)
                assert scrape(monitor.url, 3)["ppo_head_gradient_norm/joint_2"] > 0
        return runner.alg.get_policy().state_dict()

    plain, watched = trained(False), trained(True)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_rsl_rl_with_several_processes_is_measured_after_its_averaging(tmp_path: Path, group):
    runner = rsl_rl_runner(tmp_path)
    from exporter.integrations.rsl_rl import watch_runner

    # As one of two processes, of which the other one has no gradient.
    runner.is_distributed = runner.alg.is_multi_gpu = True
    runner.alg.gpu_world_size = 2
    actor = runner.alg.get_policy()
    layer = [module for module in actor.mlp.modules() if isinstance(module, nn.Linear)][-1]
    seen = norms_of_last_averaging(
        runner.alg, lambda: row_norms(layer.weight, layer.bias, actor.distribution.std_param)
    )
    with watch_runner(runner, "arm", joint_names=JOINTS, port=0) as monitor:
        runner.learn(2)
        values = scrape(monitor.url, 2)
    assert [values[f"ppo_head_gradient_norm/{joint}"] for joint in JOINTS] == pytest.approx(mean_norms(seen), rel=1e-5)
