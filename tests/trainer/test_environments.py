"""Which environments can be trained on, what their heads are called, and how their actions reach them."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from trainer.config import ConfigError, TrainerConfig
from trainer.environments import UnsupportedEnvironment, make_environment, training_environment
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import Training


class Target(gym.Env):
    """Episodes of one step; the reward is the part of `wanted` that the action matches."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space: spaces.Space, wanted=None):
        self.action_space, self._wanted = action_space, wanted
        self.taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.taken.append(action)
        reward = 0.0
        if self._wanted is not None:
            reward = np.mean(
                spaces.flatten(self.action_space, action) == spaces.flatten(self.action_space, self._wanted)
            )
        return np.zeros(2, np.float32), float(reward), True, False, {}


def of_space(action_space: spaces.Space, num_envs: int = 2):
    envs = SyncVectorEnv([lambda: Target(action_space)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    return training_environment("target", envs)


ROBOT = spaces.Dict(
    {
        "move": spaces.Discrete(3, start=-1),
        "arm": spaces.Tuple((spaces.Discrete(2), spaces.MultiDiscrete([4, 1, 5], start=[0, 7, 2]))),
    }
)


@pytest.mark.parametrize(
    ("space", "heads", "choices", "actions"),
    [
        (spaces.Discrete(3, start=4), {"action": 3}, [[0], [2]], [4, 6]),
        (spaces.MultiDiscrete([2, 3]), {"action_0": 2, "action_1": 3}, [[0, 2], [1, 0]], [[0, 2], [1, 0]]),
        (
            spaces.MultiDiscrete([1, 3, 3], start=[5, 1, 0]),
            {"action_1": 3, "action_2": 3},
            [[0, 2], [2, 1]],
            [[5, 1, 2], [5, 3, 1]],
        ),
        (
            spaces.Tuple((spaces.Discrete(2), spaces.Discrete(1, start=3), spaces.Discrete(4, start=1))),
            {"action_0": 2, "action_2": 4},
            [[1, 0], [0, 3]],
            [(1, 3, 1), (0, 3, 4)],
        ),
        (
            ROBOT,
            {"arm_0": 2, "arm_1_0": 4, "arm_1_2": 5, "move": 3},
            [[1, 3, 0, 2], [0, 2, 4, 0]],
            [{"arm": (1, [3, 7, 2]), "move": 1}, {"arm": (0, [2, 7, 6]), "move": -1}],
        ),
    ],
)
def test_every_choice_reaches_its_own_part_of_the_action(space, heads, choices, actions):
    environment = of_space(space)
    assert environment.heads == heads and list(environment.heads) == list(heads)
    envs = environment.vector_env
    envs.reset(seed=1)
    envs.step(environment.environment_actions(np.array(choices)))
    for env, expected in zip(envs.envs, actions, strict=True):
        np.testing.assert_equal(_plain(env.taken), [expected])


def _plain(action):
    if isinstance(action, dict):
        return {key: _plain(part) for key, part in action.items()}
    return type(action)(map(_plain, action)) if isinstance(action, (list, tuple)) else np.asarray(action).tolist()


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        (spaces.Discrete(1), "leaves nothing to choose"),
        (spaces.MultiDiscrete([1, 1]), "leaves nothing to choose"),
        (spaces.Box(0, 1, (2,)), r"action space Box.* use Discrete"),
        (spaces.MultiDiscrete([[2, 3]]), r"action space MultiDiscrete.* use Discrete"),
        (spaces.Dict({"move": spaces.Discrete(2), "force": spaces.Box(0, 1)}), r"action space Box.* is not supported"),
        (
            spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2),)), "a_0": spaces.Discrete(2)}),
            r"have the same name: a_0, a_0; rename a key",
        ),
    ],
)
def test_action_spaces_without_heads_are_refused(space, reason):
    with pytest.raises(UnsupportedEnvironment, match=f"environment 'target': .*{reason}"):
        of_space(space)


class Plain(VectorEnv):
    """As a vector class of somebody else."""

    def __init__(self, **attributes):
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.single_action_space = spaces.MultiDiscrete([2, 3])
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        for name, value in attributes.items():
            setattr(self, name, value)


def test_names_of_heads_must_fit_the_action_space():
    assert training_environment("own", Plain(action_heads={"a": 2, "b": 3})).heads == {"a": 2, "b": 3}
    for wrong in ({"a": 5, "b": 3, "c": 9}, {"a": 3, "b": 2}, {"a": 2}):
        message = f"'own': its attribute action_heads is {wrong}, but its action space has 2 parts with 2, 3 choices"
        with pytest.raises(UnsupportedEnvironment, match=message):
            training_environment("own", Plain(action_heads=wrong))


def test_a_vector_class_that_does_not_say_its_autoreset_mode_is_taken_for_gymnasiums_default_with_a_word():
    assert training_environment("own", Plain()).notes == ()
    silent = training_environment("own", Plain(metadata={}))
    assert silent.autoreset_mode is AutoresetMode.NEXT_STEP
    assert "sets no autoreset_mode" in silent.notes[0] and 'metadata = {"autoreset_mode": ' in silent.notes[0]
    with pytest.raises(UnsupportedEnvironment, match="autoreset_mode is 'sometimes', which is not one of Gymnasium's"):
        training_environment("own", Plain(metadata={"autoreset_mode": "sometimes"}))


def test_a_policy_learns_every_part_of_a_nested_action():
    wanted = {"arm": (1, np.array([3, 7, 4])), "move": 1}
    gym.register("Robot-v0", lambda: Target(ROBOT, wanted))
    try:
        sizes = dict(num_envs=8, rollout_steps=16, minibatch_size=64, hidden_size=16, total_timesteps=128 * 30)
        training = Training(TrainerConfig(env="Robot-v0", learning_rate=0.02, entropy_coef=0.0, **sizes))
    finally:
        gym.registry.pop("Robot-v0")
    assert training.notes == ["head arm_1_1 has a single choice and is left out"]
    assert list(training.run(StopRequest()))[-1] == 30
    assert np.mean(list(training.collector.recent_returns)) > 0.95  # by chance 0.64
    assert set(training.run_snapshot.gradient_quality.head_norms) == {"arm_0", "arm_1_0", "arm_1_2", "move"}


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_arguments_reach_the_environment(vectorization):
    for arguments, expected in (({}, 1.0), ({"sutton_barto_reward": True}, 0.0)):
        envs = make_environment("CartPole-v1", 2, vectorization, kwargs=arguments).vector_env
        envs.reset(seed=1)
        assert envs.step(np.zeros(2, np.int64))[1].tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("CartPole-v1", {"map_name": "8x8"}, "unexpected keyword argument 'map_name'"),
        ("FrozenLake-v1", {"map_name": "9x9"}, "KeyError: '9x9'"),
        ("CartPole-v1", {"num_envs": 3}, "multiple values for (keyword )?argument 'num_envs'"),
        ("host-growth", {"max_episode_steps": 0}, "max_episode_steps must be an integer of at least 1, got 0"),
        ("host-growth", {"device": "cuda"}, "multiple values for keyword argument 'device'"),
    ],
)
def test_wrong_arguments_are_named_with_the_environment_and_the_reason(name, arguments, reason):
    message = rf"environment '{name}' cannot be made with env-kwargs {re.escape(str(arguments))}: .*{reason}"
    with pytest.raises(UnsupportedEnvironment, match=message):
        make_environment(name, 2, kwargs=arguments)


def test_arguments_come_from_a_flag_as_json_or_yaml_and_from_the_file_as_a_mapping(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("env_kwargs:\n  map_name: 8x8\n  sizes: [1, 2]\n")
    for flags, expected in (
        ([], None),
        (["--env-kwargs", '{"map_name": "8x8", "rate": 1e-3}'], {"map_name": "8x8", "rate": 0.001}),
        (["--env-kwargs", "{map_name: 8x8, is_slippery: false}"], {"map_name": "8x8", "is_slippery": False}),
        (["--config", str(path)], {"map_name": "8x8", "sizes": [1, 2]}),
        (["--config", str(path), "--env-kwargs", "{}"], {}),
    ):
        assert parse_config(flags)[0].env_kwargs == expected
    path.write_text("seed: 1\nenv_kwargs: 8x8\n")
    for flags, message in (
        (["--config", str(path)], r"run.yml:2: env_kwargs must be a mapping, got '8x8'"),
        (["--env-kwargs", "8x8"], r"--env-kwargs: expected a mapping such as '{max_episode_steps: 32}', got '8x8'"),
        (["--env-kwargs", "{map_name: "], r"--env-kwargs: expected a mapping"),
        (["--env-kwargs", "{since: 2020-01-01}"], r"--env-kwargs: must be names with plain values, as JSON has them"),
        (["--env-kwargs", "{1: 2}"], r"--env-kwargs: must be names with plain values, as JSON has them"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(flags)


def test_a_run_keeps_the_arguments_of_its_environment(cli, tmp_path):
    places = ("--metrics-port", "0", "--targets-dir", str(tmp_path / "targets"), "--checkpoint-dir", str(tmp_path))
    sizes = ("--num-envs", "2", "--rollout-steps", "16", "--minibatch-size", "16", "--hidden-size", "16")
    flags = (*places, *sizes, "--run-name", "demo")
    cli(*flags, "--env-kwargs", '{"max_episode_steps": 5}', "--total-timesteps", "64")
    assert "length 5.0" in cli(*flags, "--resume", "--total-timesteps", "96")[0]
    _, refused = cli(*flags, "--resume", "--env-kwargs", '{"max_episode_steps": 6}', code=2)
    assert "has {'max_episode_steps': 5}, which a resume cannot change; got {'max_episode_steps': 6}" in refused
    assert "length mean 5.0" in cli("evaluate", tmp_path / "demo", "--episodes", "2")[0]
