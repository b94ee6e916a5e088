"""Stable-Baselines3's PPO."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.peers import Contestant, Setting


class VectorEnvAdapter(VecEnv):
    """Makes a Gymnasium vector environment a VecEnv of Stable-Baselines3, which resets in the same step.

    One in NEXT_STEP mode is passed through as it is, resets included: each episode then begins with a step that only
    resets. That is learned from wrongly, but costs what a right step costs.
    """

    def __init__(self, envs: gym.vector.VectorEnv, seed: int) -> None:
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._first_seed: int | None = seed

    def reset(self) -> np.ndarray:
        observations, _ = self.envs.reset(seed=self._first_seed)
        self._first_seed = None
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        ended = terminated | truncated
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        final = infos.get("final_obs", observations)
        for env in np.flatnonzero(ended):
            each[env] = {
                "terminal_observation": final[env],
                "TimeLimit.truncated": bool(truncated[env] and not terminated[env]),
            }
        return observations, rewards, ended, each

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.envs, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the environments are one object")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        raise NotImplementedError("the environments are one object")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def make_model(setting: Setting) -> PPO:
    if setting.vectorization == "sync":
        envs = make_vec_env(setting.env, setting.num_envs, seed=setting.seed)  # its own DummyVecEnv
    else:
        vector_env = gym.make_vec(setting.env, setting.num_envs, vectorization_mode=setting.vectorization)
        envs = VectorEnvAdapter(vector_env, setting.seed)
    layers = [setting.hidden_size, setting.hidden_size]
    return PPO(
        "MlpPolicy",
        envs,
        learning_rate=setting.learning_rate,
        n_steps=setting.rollout_steps,
        batch_size=setting.minibatch_size,
        n_epochs=setting.epochs,
        gamma=setting.gamma,
        gae_lambda=setting.gae_lambda,
        clip_range=setting.clip_range,
        clip_range_vf=setting.value_clip_range,
        ent_coef=setting.entropy_coef,
        vf_coef=setting.value_coef,
        max_grad_norm=setting.max_grad_norm,
        policy_kwargs={
            "net_arch": {"pi": layers, "vf": layers},
            "activation_fn": torch.nn.Tanh,
            "optimizer_kwargs": {"eps": setting.adam_eps},
        },
        seed=setting.seed,
        device="cpu",
    )


def start(setting: Setting) -> Contestant:
    model = make_model(setting)
    # Otherwise every `learn()` makes a logger, with a folder in /tmp.
    model.set_logger(Logger(folder=None, output_formats=[]))
    # One rollout and one update; `reset_num_timesteps` would also reset the environments.
    return Contestant(
        lambda: model.learn(setting.steps_per_update, log_interval=None, reset_num_timesteps=not model.num_timesteps)
    )
