"""skrl, with the real library."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

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


def skrl_agent(action_space: spaces.Space):
    pytest.importorskip("skrl", reason="needs skrl: make test-integrations")
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch.base import Wrapper
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model, MultiCategoricalMixin
    from skrl.trainers.torch import SequentialTrainer

    logging.getLogger("skrl").handlers.clear()  # it would speak at exit, to a stream that pytest has closed

    class ArmEnv(Wrapper):
        def __init__(self) -> None:
            self.arm = Arm()
            super().__init__(SimpleNamespace(unwrapped=SimpleNamespace(), device="cpu", num_envs=ENVS))

        num_envs, num_agents = property(lambda self: ENVS), property(lambda self: 1)
        observation_space = property(lambda self: spaces.Box(-1.0, 1.0, (OBSERVATIONS,)))
        state_space = property(lambda self: None)
        action_space = property(lambda self: action_space)

        def reset(self):
            return self.arm.reset(), {}

        def step(self, actions):
            observations, rewards, done = self.arm.step(actions)
            return observations, rewards[:, None], torch.zeros(ENVS, 1).bool(), torch.full((ENVS, 1), done), {}

        def state(self):
            return None

        def render(self, *_: object, **__: object):
            return None

        def close(self) -> None:
            pass

    def network(outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(OBSERVATIONS, 16), nn.Tanh(), nn.Linear(16, outputs))

    class GaussianPolicy(GaussianMixin, Model):
        def __init__(self, **kinds) -> None:
            Model.__init__(self, **kinds)
            GaussianMixin.__init__(self)
            self.net = network(3)
            self.log_std_parameter = nn.Parameter(torch.zeros(3))

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {"log_std": self.log_std_parameter}

    class DiscretePolicy(MultiCategoricalMixin, Model):
        def __init__(self, **kinds) -> None:
            Model.__init__(self, **kinds)
            MultiCategoricalMixin.__init__(self)
            self.net = network(int(action_space.nvec.sum()))

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {}

    class Value(DeterministicMixin, Model):
        def __init__(self, **kinds) -> None:
            Model.__init__(self, **kinds)
            DeterministicMixin.__init__(self)
            self.net = network(1)

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {}

    env = ArmEnv()
    kinds = {"observation_space": env.observation_space, "action_space": action_space, "device": "cpu"}
    policy = (GaussianPolicy if isinstance(action_space, spaces.Box) else DiscretePolicy)(**kinds)
    agent = PPO(
        models={"policy": policy, "value": Value(**kinds)},
        memory=RandomMemory(memory_size=STEPS, num_envs=ENVS, device="cpu"),
        cfg={
            "rollouts": STEPS,
            "learning_epochs": 2,
            "mini_batches": 2,
            "grad_norm_clip": 0.05,
            "entropy_loss_scale": 0.01,
            "experiment": {"write_interval": 1000, "checkpoint_interval": 0},
        },
        observation_space=env.observation_space,
        action_space=action_space,
        device="cpu",
    )
    trainer = SequentialTrainer(env=env, agents=agent, cfg={"timesteps": 3 * STEPS, "disable_progressbar": True})
    return agent, trainer


@pytest.mark.parametrize("action_space", [CONTINUOUS, spaces.MultiDiscrete([3, 4])])
def test_skrl_serves_its_heads_and_its_own_losses(action_space, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent, trainer = skrl_agent(action_space)
    from exporter.integrations.skrl import watch_agent

    layer = agent.policy.net[-1]
    is_continuous = isinstance(action_space, spaces.Box)

    def norms() -> list[float]:
        if is_continuous:
            return row_norms(layer.weight, layer.bias, agent.policy.log_std_parameter)
        parts = zip(layer.weight.grad.split([3, 4]), layer.bias.grad.split([3, 4]))
        return [math.sqrt(weight.square().sum() + bias.square().sum()) for weight, bias in parts]

    tracked: dict[str, float] = {}
    track = agent.track_data
    agent.track_data = lambda tag, value: tracked.update({tag: value}) or track(tag, value)
    heads = JOINTS if is_continuous else ["action_0", "action_1"]
    witness = Witness(norms)
    with witness, watch_agent(agent, "arm", head_names=JOINTS if is_continuous else None, port=0) as monitor:
        trainer.train()
        values = scrape(monitor.url, 3)
        assert_agrees(values, witness.cvs, 3, heads)
        assert values["ppo_policy_loss"] == pytest.approx(tracked["Loss / Policy loss"])
        assert values["ppo_value_loss"] == pytest.approx(tracked["Loss / Value loss"])
        assert values["ppo_entropy"] == pytest.approx(-tracked["Loss / Entropy loss"] / 0.01)
        assert values["ppo_episode_length_mean"] == EPISODE


def test_skrl_with_several_processes_is_measured_after_its_averaging(tmp_path: Path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)
    skrl = pytest.importorskip("skrl", reason="needs skrl: make test-integrations")
    # As one of two processes, of which the other one has no gradient.
    monkeypatch.setattr(type(skrl.config.torch), "is_distributed", True)
    monkeypatch.setattr(type(skrl.config.torch), "world_size", 2)
    agent, trainer = skrl_agent(CONTINUOUS)
    from exporter.integrations.skrl import watch_agent

    layer, log_std = agent.policy.net[-1], agent.policy.log_std_parameter
    seen = norms_of_last_averaging(agent.policy, lambda: row_norms(layer.weight, layer.bias, log_std))
    with watch_agent(agent, "arm", head_names=JOINTS, port=0) as monitor:
        trainer.train()
        values = scrape(monitor.url, 3)
    assert [values[f"ppo_head_gradient_norm/{joint}"] for joint in JOINTS] == pytest.approx(mean_norms(seen), rel=1e-5)
