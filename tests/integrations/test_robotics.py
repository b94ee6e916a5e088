"""Trainers of robots, rsl-rl, skrl and rl_games, each with its own PPO on the same small arm, read over TCP."""

import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fetch, wait_until
from gymnasium import spaces
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from exporter.integrations.joints import joint_heads

JOINTS = ["hip", "knee", "foot"]
ENVS, STEPS, OBSERVATIONS, EPISODE = 4, 8, 5, 6
CONTINUOUS = spaces.Box(-1.0, 1.0, (3,), np.float32)


class Arm:
    """Pays a joint for standing where an observation says, the first joint most; all environments end at once."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.reset()

    def reset(self) -> torch.Tensor:
        self.steps = 0
        return self.observe()

    def observe(self) -> torch.Tensor:
        self.observation = torch.rand(ENVS, OBSERVATIONS, generator=self.generator) * 2 - 1
        return self.observation

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        weights = torch.tensor([10.0, 1.0, 1.0])
        errors = (actions.float().reshape(ENVS, -1) - self.observation[:, : actions.reshape(ENVS, -1).shape[1]]).abs()
        rewards = -(errors * weights[: errors.shape[1]]).sum(1)
        self.steps = (self.steps + 1) % EPISODE
        return self.observe(), rewards, self.steps == 0


class Witness:
    """The CV of every optimizer step by a way of its own: from the gradients as they are at the step."""

    def __init__(self, norms: Callable[[], list[float]]) -> None:
        self.norms = norms
        self.cvs: list[float] = []

    def __enter__(self) -> "Witness":
        self.handle = register_optimizer_step_pre_hook(self.take)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def take(self, *_: object) -> None:
        norms = self.norms()
        self.cvs.append(statistics.stdev(norms) / statistics.fmean(norms))


def row_norms(*parameters: torch.Tensor) -> list[float]:
    """Of parameters that have one row a joint."""
    squares = sum(parameter.grad.reshape(len(parameter), -1).square().sum(1) for parameter in parameters)
    return squares.sqrt().tolist()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def scrape(url: str, updates: int) -> dict[str, float]:
    def look() -> dict[str, float] | None:
        values = {}
        for family in text_string_to_metric_families(fetch(url)[1]):
            for sample in family.samples:
                head = sample.labels.get("head")
                values[f"{sample.name}/{head}" if head else sample.name] = sample.value
        return values if values.get("ppo_updates_total") == updates else None

    return wait_until(look, f"{updates} updates are served")


def assert_agrees(values: dict[str, float], cvs: list[float], updates: int, heads: list[str]) -> None:
    assert [name.split("/")[1] for name in values if name.startswith("ppo_head_gradient_norm/")] == heads
    assert values["ppo_gradient_cv_per_step_count"] == len(cvs) > updates
    assert values["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(cvs), rel=1e-5)
    assert values["ppo_environment_steps_total"] == updates * ENVS * STEPS
    assert values["ppo_update_duration_seconds_count"] == values["ppo_rollout_duration_seconds_count"] == updates
    assert values["ppo_exporter_errors_total"] == 0


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("spread", ["none", "parameter", "shared", "layer"])
def test_a_joint_is_its_rows_of_the_mean_and_of_whatever_spreads_it(rows, spread):
    mean = nn.Linear(4, rows)
    spreads = {
        "none": None,
        "parameter": nn.Parameter(torch.zeros(3)),
        "shared": nn.Parameter(torch.zeros(1)),
        "layer": nn.Linear(4, 3),
    }
    heads = joint_heads(3, mean, spreads[spread], JOINTS)
    assert list(heads) == JOINTS
    taken = [[(part.parameter, part.start) for part in head] for head in heads.values()]
    own = rows // 3 * 2 + {"none": 0, "parameter": 1, "shared": 0, "layer": 2}[spread]
    assert [len(parts) for parts in taken] == [own] * 3
    assert all(row % 3 == joint for joint, parts in enumerate(taken) for _, row in parts)
    assert len({(id(parameter), row) for parts in taken for parameter, row in parts}) == own * 3


@pytest.mark.parametrize("names", [["hip"], ["hip", "hip", "foot"]])
def test_wrong_names_of_joints_are_refused(names):
    with pytest.raises(ValueError, match="3 dimensions, which need as many distinct names"):
        joint_heads(3, nn.Linear(4, 3), names=names)
    with pytest.raises(ValueError, match="a layer of 4 rows cannot be shared by 3 dimensions"):
        joint_heads(3, nn.Linear(4, 4))


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


@pytest.fixture
def group():
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def norms_of_last_averaging(owner, norms: Callable[[], list[float]]) -> list[list[float]]:
    """Norms after each `reduce_parameters()` of a trainer, which comes before clipping."""
    reduce, seen = owner.reduce_parameters, []
    owner.reduce_parameters = lambda: (reduce(), seen.append(norms()))
    return seen


def mean_norms(seen: list[list[float]]) -> list[float]:
    """Of the four steps of the last update."""
    return [statistics.fmean(norms) for norms in zip(*seen[-4:])]


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
