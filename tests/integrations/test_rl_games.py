"""rl_games, with the real library."""

import math
from pathlib import Path

import pytest
import torch
from gymnasium import spaces
from robotics import (
    CONTINUOUS,
    ENVS,
    EPISODE,
    JOINTS,
    OBSERVATIONS,
    STEPS,
    Arm,
    Witness,
    assert_agrees,
    row_norms,
    scrape,
)


def rl_games_configuration(action_space: spaces.Space, folder: Path) -> dict:
    space = (
        {
            "continuous": {
                "mu_activation": "None",
                "sigma_activation": "None",
                "mu_init": {"name": "default"},
                "sigma_init": {"name": "const_initializer", "val": 0},
                "fixed_sigma": True,
            }
        }
        if isinstance(action_space, spaces.Box)
        else {"multi_discrete": {}}
    )
    kind = "continuous" if isinstance(action_space, spaces.Box) else "multi_discrete"
    return {
        "params": {
            "seed": 1,
            "algo": {"name": f"a2c_{'continuous' if kind == 'continuous' else 'discrete'}"},
            "model": {"name": f"{kind}_a2c{'_logstd' if kind == 'continuous' else ''}"},
            "network": {
                "name": "actor_critic",
                "separate": False,
                "space": space,
                "mlp": {"units": [16], "activation": "elu", "initializer": {"name": "default"}},
            },
            "config": {
                "name": "arm",
                "full_experiment_name": "arm",
                "train_dir": str(folder),
                "env_name": "arm",
                "device": "cpu",
                "device_name": "cpu",
                "reward_shaper": {"scale_value": 1.0},
                "normalize_advantage": True,
                "normalize_input": False,
                "gamma": 0.99,
                "tau": 0.95,
                "learning_rate": 1e-3,
                "lr_schedule": None,
                "score_to_win": 1e9,
                "grad_norm": 0.05,
                "entropy_coef": 0.01,
                "truncate_grads": True,
                "e_clip": 0.2,
                "clip_value": False,
                "num_actors": ENVS,
                "horizon_length": STEPS,
                "minibatch_size": 16,
                "mini_epochs": 2,
                "critic_coef": 1,
                "bounds_loss_coef": 0.0,
                "max_epochs": 3,
                "ppo": True,
                "print_stats": False,
            },
        }
    }


@pytest.mark.parametrize("action_space", [CONTINUOUS, spaces.Tuple([spaces.Discrete(3), spaces.Discrete(4)])])
def test_rl_games_serves_its_heads_and_tells_the_other_observer(action_space, tmp_path: Path):
    runners = pytest.importorskip("rl_games.torch_runner", reason="needs rl-games: make test-integrations")
    from rl_games.common import env_configurations, vecenv
    from rl_games.common.algo_observer import AlgoObserver

    from exporter.integrations.rl_games import PrometheusObserver

    class ArmEnv(vecenv.IVecEnv):
        def __init__(self) -> None:
            self.arm = Arm()

        def reset(self):
            return self.arm.reset()

        def step(self, actions):
            observations, rewards, done = self.arm.step(actions)
            return observations, rewards, torch.full((ENVS,), done, dtype=torch.uint8), {}

        def get_env_info(self):
            return {"action_space": action_space, "observation_space": spaces.Box(-1.0, 1.0, (OBSERVATIONS,))}

        def get_number_of_agents(self):
            return 1

    class Other(AlgoObserver):
        written: dict[str, float] = {}

        def after_init(self, algo):
            self.algo = algo
            add_scalar = algo.writer.add_scalar
            algo.writer.add_scalar = lambda tag, value, step: (
                self.written.update({tag: value}) or add_scalar(tag, value, step)
            )

    vecenv.register("ARM", lambda name, actors, **_: ArmEnv())
    env_configurations.register("arm", {"vecenv_type": "ARM", "env_creator": ArmEnv})
    other = Other()
    is_continuous = isinstance(action_space, spaces.Box)
    heads = JOINTS if is_continuous else ["action_0", "action_1"]
    observer = PrometheusObserver(other, run="arm", head_names=JOINTS if is_continuous else None, port=0)

    def norms() -> list[float]:
        network = other.algo.model.a2c_network
        if is_continuous:
            return row_norms(network.mu.weight, network.mu.bias, network.sigma)
        return [
            math.sqrt(sum(parameter.grad.square().sum() for parameter in layer.parameters()))
            for layer in network.logits
        ]

    witness = Witness(norms)
    try:
        with witness:
            runner = runners.Runner(observer)
            runner.load(rl_games_configuration(action_space, tmp_path))
            runner.run({"train": True, "play": False})
        values = scrape(observer.monitor.url, 3)
        assert_agrees(values, witness.cvs, 3, heads)
        assert values["ppo_policy_loss"] == pytest.approx(other.written["losses/a_loss"], rel=1e-5)
        assert values["ppo_value_loss"] == pytest.approx(other.written["losses/c_loss"], rel=1e-5)
        assert values["ppo_approx_kl"] == pytest.approx(other.written["info/kl"], rel=1e-4, abs=1e-9)
        assert values["ppo_episode_length_mean"] == EPISODE
    finally:
        observer.close()
