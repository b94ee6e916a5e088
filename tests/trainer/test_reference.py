"""The same batch and the same weights: this trainer, a plain reference, and Stable-Baselines3's own code."""

import copy
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from test_agent import HEADS, SAMPLES, make_agent, make_rollout
from test_rollout import GAMMA, LAMBDA, LENGTHS, Corridor
from torch.distributions import Categorical
from torch.nn.functional import mse_loss

from benchmarks.peers import Setting
from benchmarks.peers.sb3 import make_model
from trainer.agent import PPOHyperparameters
from trainer.environments import make_environment, training_environment
from trainer.policy import ActorCritic
from trainer.rollout import Rollout, RolloutCollector

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LEARNING_RATE = 1e-3


def make_policy(observation_size: int, heads: dict[str, int], hidden_size: int, separate_critic: bool) -> ActorCritic:
    torch.manual_seed(0)
    policy = ActorCritic(observation_size, heads, hidden_size, separate_critic=separate_critic)
    # Far from the uniform start, so that ratios, clipping and every head's gradient are in play.
    torch.nn.init.normal_(policy.policy_layer.weight, std=0.5)
    return policy


def assert_gradients_and_parameters_agree(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """To 5e-5 of the largest number among a tensor's own parameters, and among the gradients of all.

    A small gradient is a sum of large terms, and how they are rounded depends on the processor: 6e-6 has been seen.
    """
    largest = max(reference.grad.abs().max() for _, reference in pairs)
    for ours, reference in pairs:
        assert (ours.grad - reference.grad).abs().max() < 5e-5 * largest
        assert (ours - reference).abs().max() < 5e-5 * reference.abs().max()


def reference_update(
    policy: ActorCritic, rollout: Rollout, *, minibatch_size: int, epochs: int, value_clip_range: float | None, **other
) -> dict[str, float]:
    """The update in doubles, with torch.distributions, mse_loss, clip_grad_norm_ and plain Adam; statistics of it."""
    policy.double()
    observations, actions, old_log_probs, old_values, advantages, returns = (
        torch.from_numpy(getattr(rollout, name)[rollout.trained_on])
        for name in ("observations", "actions", "log_probs", "values", "advantages", "returns")
    )
    observations, moments = observations.double(), policy.return_moments
    old_outputs = (old_values - moments.mean) / moments.deviation
    if other["normalize_returns"]:
        moments.include(returns.numpy())
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(epochs):
        for batch in torch.randperm(SAMPLES, generator=generator).split(minibatch_size):
            features = policy.trunk(observations[batch])
            value_features = policy.value_trunk(observations[batch]) if policy.value_trunk else features
            outputs = policy.value_layer(value_features)[:, 0]
            logits = policy.policy_layer(features).split(list(HEADS.values()), dim=1)
            distributions = [Categorical(logits=of_head) for of_head in logits]
            log_prob = sum(d.log_prob(actions[batch, head]) for head, d in enumerate(distributions))
            entropy = sum(d.entropy() for d in distributions).mean()
            log_ratio = log_prob - old_log_probs[batch]
            ratio = log_ratio.exp()
            advantage = (advantages[batch] - advantages[batch].mean()) / (advantages[batch].std() + 1e-8)
            policy_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            targets = (returns[batch] - moments.mean) / moments.deviation
            squared_error = mse_loss(outputs, targets, reduction="none")
            if value_clip_range is not None:
                change = (outputs - old_outputs[batch]).clamp(-value_clip_range, value_clip_range)
                clipped = old_outputs[batch] + change
                squared_error = torch.max(squared_error, mse_loss(clipped, targets, reduction="none"))
            value_loss = 0.5 * squared_error.mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss - 0.01 * entropy).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), other["max_grad_norm"])
            optimizer.step()
            approx_kl = (ratio - 1 - log_ratio).mean()
            clip_fraction = ((ratio - 1).abs() > 0.2).double().mean()
            seen.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clip_fraction]))
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    return dict(zip(names, torch.stack(seen).mean(0).tolist()))


@pytest.mark.parametrize("value_clip_range", [None, 0.2])
@pytest.mark.parametrize("normalize_returns", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("separate_critic", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("steps", ["one gradient step", "six, with clipping"])
def test_an_update_is_that_of_a_plain_reference(separate_critic, normalize_returns, value_clip_range, steps):
    settings = {"minibatch_size": SAMPLES, "epochs": 1, "max_grad_norm": 1e9}
    if steps != "one gradient step":
        settings = {"minibatch_size": SAMPLES // 3, "epochs": 2, "max_grad_norm": 0.05}
    settings |= {"normalize_returns": normalize_returns, "value_clip_range": value_clip_range}
    ours = make_policy(6, HEADS, 16, separate_critic)
    theirs = copy.deepcopy(ours)
    rollout = make_rollout(ours)
    metrics = make_agent(ours, **settings).update(rollout, learning_rate=LEARNING_RATE)
    expected = reference_update(theirs, rollout, **settings)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert_gradients_and_parameters_agree(list(zip(ours.parameters(), theirs.parameters(), strict=True)))


# Stable-Baselines3

CARTPOLE = Setting(
    env="CartPole-v1",
    num_envs=8,
    rollout_steps=32,
    minibatch_size=256,
    hidden_size=16,
    learning_rate=LEARNING_RATE,
    value_clip_range=None,
    max_grad_norm=1e9,
    epochs=1,
)
SEVEN_HEADS = replace(
    CARTPOLE, env="benchmarks.synthetic:SevenHeads-v0", hidden_size=32, vectorization="vector_entry_point"
)


def pairs(policy: ActorCritic, model: PPO) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Our parameters beside Stable-Baselines3's: trunk, value trunk, action heads, value head."""
    networks = (model.policy.mlp_extractor, model.policy.action_net, model.policy.value_net)
    return list(zip(policy.parameters(), (p for network in networks for p in network.parameters()), strict=True))


def both(setting: Setting) -> tuple[ActorCritic, PPO]:
    """Our policy, and Stable-Baselines3's PPO with the same weights after it has collected a rollout of its own."""
    environment = make_environment(setting.env, 1, setting.vectorization)
    policy = make_policy(environment.observation_size, dict(environment.heads), setting.hidden_size, True)
    # Its value loss is the mean squared error, ours half of it, as CleanRL's.
    model = make_model(replace(setting, value_coef=setting.value_coef / 2))
    for ours, theirs in pairs(policy, model):
        theirs.data.copy_(ours)
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(setting.steps_per_update)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, setting.rollout_steps)
    return policy, model


def rollout_of(model: PPO) -> Rollout:
    """What Stable-Baselines3 collected, as we would have."""
    buffer = model.rollout_buffer
    actions = buffer.actions.astype(np.int64)
    trained_on = np.ones(buffer.values.shape, bool)
    experience = (buffer.observations, actions, buffer.log_probs, buffer.values, buffer.advantages, buffer.returns)
    return Rollout(*(array.copy() for array in experience), trained_on, trained_on.size, 0)


@pytest.mark.parametrize("setting", [CARTPOLE, SEVEN_HEADS], ids=["one head", "seven heads"])
def test_log_probabilities_entropies_and_values_are_those_of_stable_baselines3(setting):
    policy, model = both(setting)
    rollout = rollout_of(model)
    observations = torch.from_numpy(rollout.observations.reshape(setting.steps_per_update, -1))
    actions = torch.from_numpy(rollout.actions.reshape(setting.steps_per_update, -1))
    distribution, values = policy(observations)
    log_probs, entropies = distribution.evaluate(actions)
    their_values, their_log_probs, their_entropies = model.policy.evaluate_actions(
        observations, actions if setting is SEVEN_HEADS else actions[:, 0]
    )
    torch.testing.assert_close(values, their_values[:, 0], **CLOSE)
    torch.testing.assert_close(log_probs, their_log_probs, **CLOSE)
    torch.testing.assert_close(entropies, their_entropies, **CLOSE)
    # And those with which it acted.
    np.testing.assert_allclose(rollout.log_probs.ravel(), log_probs.detach(), **CLOSE)


@pytest.mark.parametrize("setting", [CARTPOLE, SEVEN_HEADS], ids=["one head", "seven heads"])
@pytest.mark.parametrize(
    "changes", [{}, {"minibatch_size": 64, "epochs": 2, "max_grad_norm": 0.5}], ids=["one step", "eight steps"]
)
def test_an_update_is_that_of_stable_baselines3(setting, changes, monkeypatch):
    setting = replace(setting, **changes)
    policy, model = both(setting)
    # As if the weights had moved since the rollout: ratios differ from one, and some are clipped.
    log_probs = model.rollout_buffer.log_probs
    log_probs += np.random.default_rng(0).normal(scale=0.2, size=log_probs.shape).astype(np.float32)
    rollout = rollout_of(model)

    generator = torch.Generator().manual_seed(3)

    # Its samples lie environment after environment, ours step after step.
    def shuffled(count: int) -> np.ndarray:
        step, env = np.divmod(torch.randperm(count, generator=generator).numpy(), setting.num_envs)
        return env * setting.rollout_steps + step

    monkeypatch.setattr(np.random, "permutation", shuffled)
    model.train()
    settings = {name: value for name, value in asdict(setting).items() if name in PPOHyperparameters.__annotations__}
    agent = make_agent(policy, normalize_returns=False, **settings)
    metrics = agent.update(rollout, learning_rate=setting.learning_rate)

    logged = model.logger.name_to_value
    assert metrics["policy_loss"] == pytest.approx(logged["train/policy_gradient_loss"], rel=1e-5, abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(logged["train/value_loss"] / 2, rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-logged["train/entropy_loss"], rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(logged["train/clip_fraction"], abs=1e-5)
    assert metrics["explained_variance"] == pytest.approx(logged["train/explained_variance"], rel=1e-5, abs=1e-5)
    if setting.epochs == 1:  # otherwise it logs that of the last epoch alone
        assert metrics["approx_kl"] == pytest.approx(logged["train/approx_kl"], rel=1e-5, abs=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert_gradients_and_parameters_agree(pairs(policy, model))


def test_a_rollout_has_the_advantages_and_returns_that_stable_baselines3_gives_it():
    """Episodes that terminate, that are truncated, and that outlast the rollout, of which the second goes on."""

    def make(length: int, truncates: bool) -> gym.Env:
        # The corridor counts its actions from one, which Stable-Baselines3 does not take.
        return gym.wrappers.TransformAction(Corridor(length, truncates), lambda a: a + 1, gym.spaces.Discrete(2))

    makers = [lambda a=a: make(*a) for a in LENGTHS]
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    policy = make_policy(1, {"action": 2}, 64, True)
    collector = RolloutCollector(
        training_environment("corridor", envs),
        policy,
        steps=14,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        seed=1,
        generator=torch.Generator().manual_seed(0),
    )
    model = PPO(
        "MlpPolicy", DummyVecEnv(makers), n_steps=14, batch_size=56, gamma=GAMMA, gae_lambda=LAMBDA, device="cpu"
    )
    for ours, theirs in pairs(policy, model):
        theirs.data.copy_(ours)
    _, callback = model._setup_learn(2 * 14 * len(LENGTHS))
    for _ in range(2):
        rollout = collector.collect()
        buffer = model.rollout_buffer
        model.collect_rollouts(model.env, callback, buffer, 14)
        np.testing.assert_array_equal(rollout.observations, buffer.observations)
        for name in ("values", "advantages", "returns"):
            np.testing.assert_allclose(getattr(rollout, name), getattr(buffer, name), **CLOSE)
