"""The same batch and the same weights: this trainer, a plain reference, and Stable-Baselines3's own code."""

import math
from collections.abc import Iterable
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
from exporter import gradient_cv
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
    policy.parameters["policy_weight"].normal_(std=0.5)
    return policy


def in_torch_order(named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Weights and biases as torch's modules would have them: actor, critic if it is separate, action heads, value."""
    networks = len(named["hidden_weight"])
    inputs = zip(named["input_weight"].chunk(networks), named["input_bias"][:, 0].chunk(networks))
    hidden = zip(named["hidden_weight"], named["hidden_bias"][..., 0])
    tanh_layers = [tensor for layers in zip(inputs, hidden) for layer in layers for tensor in layer]
    heads = named["policy_weight"], named["policy_bias"][:, 0], named["value_weight"], named["value_bias"][:, 0]
    return [*tanh_layers, *heads]


def assert_gradients_and_parameters_agree(policy: ActorCritic, references: Iterable[torch.Tensor]) -> None:
    """To 5e-5 of the largest of all gradients, and 1e-4 of the largest of a tensor's own parameters.

    A small gradient is a sum of large terms, and how they are rounded depends on the processor: 6e-6 has been seen.
    Adam divides by it: of a bias, which has moved by one step from zero, 8e-5 has been seen.
    """
    references = list(references)
    parameters = in_torch_order(policy.parameters)
    gradients = in_torch_order({name: parameter.grad for name, parameter in policy.parameters.items()})
    largest = max(reference.grad.abs().max() for reference in references)
    for parameter, gradient, reference in zip(parameters, gradients, references, strict=True):
        assert (gradient - reference.grad).abs().max() < 5e-5 * largest
        assert (parameter - reference).abs().max() < 1e-4 * reference.abs().max()


class TorchNetwork(torch.nn.Module):
    """The policy's network in doubles, of torch's own modules, for autograd."""

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        networks, hidden_size, _ = policy.parameters["hidden_weight"].shape
        choices, linear, tanh = sum(policy.heads.values()), torch.nn.Linear, torch.nn.Tanh
        inputs = policy.parameters["input_weight"].shape[1]
        self.trunks = torch.nn.ModuleList(
            torch.nn.Sequential(linear(inputs, hidden_size), tanh(), linear(hidden_size, hidden_size), tanh())
            for _ in range(networks)
        )
        self.policy_layer, self.value_layer = linear(hidden_size, choices), linear(hidden_size, 1)
        self.double()
        for theirs, ours in zip(self.parameters(), in_torch_order(policy.parameters), strict=True):
            theirs.data.copy_(ours)
        self.sizes = list(policy.heads.values())

    def head_weights(self) -> list[torch.Tensor]:
        """Of each head a copy of all its weights and biases."""
        layer = torch.cat([self.policy_layer.weight, self.policy_layer.bias.unsqueeze(1)], 1)
        return [rows.detach().clone() for rows in layer.split(self.sizes)]

    def forward(self, observations: torch.Tensor) -> tuple[list[Categorical], torch.Tensor]:
        logits = self.policy_layer(self.trunks[0](observations)).split(self.sizes, dim=1)
        return [Categorical(logits=of_head) for of_head in logits], self.value_layer(self.trunks[-1](observations))[
            :, 0
        ]


def reference_update(
    policy: ActorCritic, rollout: Rollout, *, minibatch_size: int, epochs: int, value_clip_range: float | None, **other
) -> tuple[TorchNetwork, dict[str, float], list[float], dict[str, dict[str, float]]]:
    """The update with torch.distributions, mse_loss, clip_grad_norm_ and plain Adam: network, statistics, CVs, and
    what is said of each head."""
    network = TorchNetwork(policy)
    before = network.head_weights()
    observations, actions, old_log_probs, old_values, advantages, returns = (
        getattr(rollout, name)[rollout.valid]
        for name in ("observations", "actions", "log_probs", "values", "advantages", "returns")
    )
    observations, mean, std = observations.double(), 0.0, 1.0
    old_outputs = old_values.double()
    if other["normalize_returns"]:
        mean, std = returns.double().mean(), returns.double().std(correction=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    seen, cvs, of_heads = [], [], []
    for _ in range(epochs):
        for batch in torch.randperm(SAMPLES, generator=generator).split(minibatch_size):
            distributions, outputs = network(observations[batch])
            log_probs = torch.stack([d.log_prob(actions[batch, head]) for head, d in enumerate(distributions)], 1)
            log_prob = log_probs.sum(1)
            entropy = sum(d.entropy() for d in distributions).mean()
            log_ratio = log_prob - old_log_probs[batch].sum(1)
            ratio = log_ratio.exp()
            advantage = (advantages[batch] - advantages[batch].mean()) / (advantages[batch].std() + 1e-8)
            policy_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            targets = (returns[batch] - mean) / std
            squared_error = mse_loss(outputs, targets, reduction="none")
            if value_clip_range is not None:
                change = (outputs - old_outputs[batch]).clamp(-value_clip_range, value_clip_range)
                clipped = old_outputs[batch] + change
                squared_error = torch.max(squared_error, mse_loss(clipped, targets, reduction="none"))
            value_loss = 0.5 * squared_error.mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss - 0.01 * entropy).backward()
            by_head = zip(*(p.grad.split(network.sizes) for p in network.policy_layer.parameters()))
            cvs.append(gradient_cv(torch.cat([weight.flatten(), bias]).norm().item() for weight, bias in by_head))
            torch.nn.utils.clip_grad_norm_(network.parameters(), other["max_grad_norm"])
            optimizer.step()
            approx_kl = (ratio - 1 - log_ratio).mean()
            clip_fraction = ((ratio - 1).abs() > 0.2).double().mean()
            seen.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clip_fraction]))
            head_ratios = (log_probs - old_log_probs[batch]).exp()
            of_heads.append(
                [
                    (d.entropy() / math.log(d.logits.shape[1])).mean().item(),
                    (ratios - 1 - ratios.log()).mean().item(),
                    ((ratios - 1).abs() > 0.2).double().mean().item(),
                ]
                for d, ratios in zip(distributions, head_ratios.unbind(1))
            )
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    seen = torch.stack(seen).detach()
    statistics = dict(zip(names, seen.mean(0).tolist()))
    entropies, kls, clip_fractions = np.moveaxis([list(step) for step in of_heads], 2, 0)
    changes = [(after - b).norm() / b.norm() for after, b in zip(network.head_weights(), before)]
    per_head = {
        "head_entropy_ratios": entropies.mean(0),
        "head_approx_kls": kls[-len(kls) // epochs :].mean(0),
        "head_clip_fractions": clip_fractions.mean(0),
        "head_update_ratios": [change.item() for change in changes],
    }
    return (
        network,
        statistics | {"approx_kl": seen[-len(seen) // epochs :, 3].mean().item()},
        cvs,
        {name: dict(zip(policy.heads, values)) for name, values in per_head.items()},
    )


@pytest.mark.parametrize("value_clip_range", [None, 0.2])
@pytest.mark.parametrize("normalize_returns", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("separate_critic", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("steps", ["one gradient step", "six, with clipping"])
def test_an_update_is_that_of_a_plain_reference(separate_critic, normalize_returns, value_clip_range, steps):
    settings = {"minibatch_size": SAMPLES, "epochs": 1, "max_grad_norm": 1e9}
    if steps != "one gradient step":
        settings = {"minibatch_size": SAMPLES // 3, "epochs": 2, "max_grad_norm": 0.05}
    settings |= {"normalize_returns": normalize_returns, "value_clip_range": value_clip_range}
    policy = make_policy(6, HEADS, 16, separate_critic)
    rollout = make_rollout(policy)
    network, expected, cvs, per_head = reference_update(policy, rollout, **settings)
    metrics = make_agent(policy, **settings).update(rollout, learning_rate=LEARNING_RATE)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["gradient_cv_per_step"] == pytest.approx(cvs, rel=1e-4)
    assert set(metrics["head_gradient_norms"]) == set(HEADS)
    for name, of_head in per_head.items():
        assert metrics[name] == pytest.approx(of_head, rel=1e-4, abs=1e-6), name
        assert 0 < min(of_head.values()) and max(of_head.values()) < 1, name
    assert_gradients_and_parameters_agree(policy, network.parameters())


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


def parameters_of(model: PPO) -> list[torch.nn.Parameter]:
    """Trunk, value trunk, action heads, value head."""
    networks = (model.policy.mlp_extractor, model.policy.action_net, model.policy.value_net)
    return [parameter for network in networks for parameter in network.parameters()]


def take_weights(model: PPO, policy: ActorCritic) -> None:
    for theirs, ours in zip(parameters_of(model), in_torch_order(policy.parameters), strict=True):
        theirs.data.copy_(ours)


def both(setting: Setting) -> tuple[ActorCritic, PPO]:
    """Our policy, and Stable-Baselines3's PPO with the same weights after it has collected a rollout of its own."""
    environment = make_environment(setting.env, 1, setting.vectorization)
    policy = make_policy(environment.observation_size, dict(environment.heads), setting.hidden_size, True)
    # Its value loss is the mean squared error, ours half of it, as CleanRL's.
    model = make_model(replace(setting, value_coef=setting.value_coef / 2))
    take_weights(model, policy)
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(setting.steps_per_update)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, setting.rollout_steps)
    return policy, model


def rollout_of(model: PPO, policy: ActorCritic) -> Rollout:
    """What Stable-Baselines3 collected, as we would have."""
    buffer = model.rollout_buffer
    names = ("observations", "actions", "log_probs", "values", "advantages", "returns")
    tensors = {name: torch.from_numpy(getattr(buffer, name).copy()) for name in names}
    tensors["actions"] = tensors["actions"].long()
    # It keeps the joint log-probability, whose parts are ours; what is added to it goes to one head.
    log_probs, _ = policy.evaluate(tensors["observations"].flatten(0, 1), tensors["actions"].flatten(0, 1))
    log_probs = log_probs.unflatten(0, buffer.values.shape)
    log_probs[..., 0] += tensors["log_probs"] - log_probs.sum(-1)
    tensors["log_probs"] = log_probs
    valid = torch.ones(buffer.values.shape, dtype=torch.bool)
    return Rollout(**tensors, valid=valid, environment_steps=valid.numel(), episodes=0)


@pytest.mark.parametrize("setting", [CARTPOLE, SEVEN_HEADS], ids=["one head", "seven heads"])
def test_log_probabilities_entropies_and_values_are_those_of_stable_baselines3(setting):
    policy, model = both(setting)
    rollout = rollout_of(model, policy)
    observations, actions = rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1)
    log_probs, values = policy.evaluate(observations, actions)
    entropies = policy.distribution(policy.forward(observations).logits).entropies.sum(0)
    their_values, their_log_probs, their_entropies = model.policy.evaluate_actions(
        observations, actions if setting is SEVEN_HEADS else actions[:, 0]
    )
    torch.testing.assert_close(values, their_values[:, 0], **CLOSE)
    torch.testing.assert_close(log_probs.sum(1), their_log_probs, **CLOSE)
    torch.testing.assert_close(entropies, their_entropies, **CLOSE)
    # And those with which it acted.
    torch.testing.assert_close(rollout.log_probs.flatten(0, 1).sum(1), log_probs.sum(1), **CLOSE)


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
    rollout = rollout_of(model, policy)

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
    assert metrics["approx_kl"] == pytest.approx(logged["train/approx_kl"], rel=1e-5, abs=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert_gradients_and_parameters_agree(policy, parameters_of(model))


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
    take_weights(model, policy)
    _, callback = model._setup_learn(2 * 14 * len(LENGTHS))
    for _ in range(2):
        rollout = collector.collect()
        buffer = model.rollout_buffer
        model.collect_rollouts(model.env, callback, buffer, 14)
        np.testing.assert_array_equal(rollout.observations, buffer.observations)
        for name in ("values", "advantages", "returns"):
            np.testing.assert_allclose(getattr(rollout, name), getattr(buffer, name), **CLOSE)
