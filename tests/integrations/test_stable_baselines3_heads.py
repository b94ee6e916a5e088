"""Stable-Baselines3: which algorithms are measured, and what their heads are."""

import gymnasium
import numpy as np
import pytest
import torch
from conftest import fetch
from gymnasium import spaces
from levers import Levers
from sb3 import NVEC, ppo, scrape
from stable_baselines3 import A2C, DQN, PPO
from torch.distributions import Categorical

from exporter import HeadGradientMeter
from exporter.integrations.stable_baselines3 import PrometheusCallback, policy_heads


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


def test_rows_of_the_action_net_have_the_norms_of_separate_layers():
    policy = ppo().policy
    torch.nn.init.normal_(policy.action_net.weight)
    names = ["a", "b", "c"]
    separate = {name: torch.nn.Linear(64, size) for name, size in zip(names, NVEC)}
    weights, biases = policy.action_net.weight.split(NVEC), policy.action_net.bias.split(NVEC)
    for layer, weight, bias in zip(separate.values(), weights, biases):
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    generator = torch.Generator().manual_seed(0)
    observations, advantages = torch.randn(64, 4, generator=generator), torch.randn(64, generator=generator)
    actions = torch.stack([torch.randint(size, (64,), generator=generator) for size in NVEC], dim=-1)

    fused_meter = HeadGradientMeter(policy_heads(policy, names))
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    (advantages * log_prob).mean().backward()
    fused_meter.record()

    separate_meter = HeadGradientMeter(separate)
    features = policy.mlp_extractor.forward_actor(observations)
    choices = [Categorical(logits=layer(features)) for layer in separate.values()]
    log_prob = sum(choice.log_prob(action) for choice, action in zip(choices, actions.unbind(-1)))
    (advantages * log_prob).mean().backward()
    separate_meter.record()

    (fused,), (expected,) = fused_meter.collect(), separate_meter.collect()
    assert list(fused.head_norms) == names
    assert fused.head_norms == pytest.approx(expected.head_norms, rel=1e-6)
    assert fused.cv == pytest.approx(expected.cv, rel=1e-6)


@pytest.mark.parametrize(
    "action_space, names, rows",
    [
        (spaces.Discrete(4), ["action"], [4]),
        (spaces.MultiDiscrete(NVEC), ["action_0", "action_1", "action_2"], [3, 4, 2]),
        (spaces.MultiBinary(3), ["action_0", "action_1", "action_2"], [1, 1, 1]),
    ],
)
def test_unnamed_heads_are_numbered_in_the_order_of_the_action_space(action_space, names, rows, callback):
    model = ppo(action_space)
    heads = policy_heads(model.policy)
    assert list(heads) == names
    assert [head[0].stop - head[0].start for head in heads.values()] == rows
    served = callback(keep_serving=True)
    model.learn(64, callback=served)
    values = scrape(served.url, 2)
    assert all(values[f"ppo_head_gradient_norm/{name}"] > 0 for name in names)
    assert values["ppo_gradient_cv_ceiling"] == pytest.approx(len(names) ** 0.5)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a"], "abc"])
def test_wrong_head_names_are_refused_before_training(names, callback):
    model = ppo()
    with pytest.raises(ValueError, match="names"):
        model.learn(64, callback=callback(head_names=names))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_dimension_of_a_box_is_a_head_of_its_mean_and_its_own_log_std(use_sde):
    model = ppo(spaces.Box(-1.0, 1.0, (3,)), use_sde=use_sde)
    policy, generator = model.policy, torch.Generator().manual_seed(0)
    meter = HeadGradientMeter(policy_heads(policy, ["hip", "knee", "foot"]))
    if use_sde:
        policy.reset_noise(8)
    _, log_prob, _ = policy.evaluate_actions(
        torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
    )
    log_prob.mean().backward()
    meter.record()
    layer, (step,) = policy.action_net, meter.collect()
    squares = layer.weight.grad.square().sum(1) + layer.bias.grad.square()
    if not use_sde:  # whose standard deviations belong to features, not to dimensions
        squares = squares + policy.log_std.grad.square()
    assert list(step.head_norms) == ["hip", "knee", "foot"]
    assert list(step.head_norms.values()) == pytest.approx(squares.sqrt().tolist(), rel=1e-5)


def test_parts_with_a_single_choice_are_no_heads_and_the_log_says_so(callback, caplog):
    served = callback(keep_serving=True, head_names=["a", "fixed", "b"])
    with caplog.at_level("INFO"):
        ppo(spaces.MultiDiscrete([3, 1, 4])).learn(32, callback=served)
    values = scrape(served.url, 1)
    assert values["ppo_head_gradient_norm/b"] > 0 and values["ppo_gradient_cv_ceiling"] == pytest.approx(2**0.5)
    assert not any("fixed" in name for name in values)
    assert [record.message for record in caplog.records if "fixed" in record.message] == [
        "left out of the heads, because they have a single choice: fixed"
    ]
    with pytest.raises(ValueError, match="no part of .* has two choices"):
        policy_heads(ppo(spaces.MultiDiscrete([1, 1])).policy)


def test_off_policy_algorithms_are_refused(callback):
    model = DQN("MlpPolicy", Levers(spaces.Discrete(4)), buffer_size=100, device="cpu")
    with pytest.raises(TypeError, match="DQN is not an on-policy algorithm"):
        model.learn(64, callback=callback())


def test_trpo_is_refused_with_the_reason(callback):
    """It is on-policy, but its optimizer never steps the heads."""
    trpo = pytest.importorskip("sb3_contrib").TRPO
    model = type("MyTRPO", (trpo,), {})("MlpPolicy", Levers(spaces.Discrete(4)), n_steps=64, device="cpu")
    with pytest.raises(TypeError, match="MyTRPO cannot be measured: TRPO updates the policy by a line search"):
        model.learn(64, callback=callback())
    assert model.num_timesteps == 0


class MaskedLevers(Levers):
    def action_masks(self) -> np.ndarray:
        return np.array([True] * sum(NVEC))


@pytest.mark.parametrize("algorithm, policy", [("MaskablePPO", "MlpPolicy"), ("RecurrentPPO", "MlpLstmPolicy")])
def test_ppo_of_contrib_is_measured_like_ppo(algorithm, policy, callback):
    kind = getattr(pytest.importorskip("sb3_contrib"), algorithm)
    model = kind(policy, MaskedLevers(spaces.MultiDiscrete(NVEC)), n_steps=32, batch_size=16, n_epochs=2, device="cpu")
    served = callback(keep_serving=True)
    model.learn(64, callback=served)
    values = scrape(served.url, 2)
    assert values["ppo_gradient_cv_per_step_count"] == 2 * 2 * 2
    assert all(values[f"ppo_head_gradient_norm/action_{i}"] > 0 for i in range(3))
    assert values["ppo_policy_loss"] == pytest.approx(model.logger.name_to_value["train/policy_gradient_loss"])


def test_an_algorithm_that_steps_its_policy_by_another_way_is_said_to_be_unmeasured(callback, caplog):
    class ByHand(PPO):
        def train(self) -> None:
            with torch.no_grad():
                self.policy.action_net.bias += 0.01

    model = ByHand("MlpPolicy", Levers(spaces.MultiDiscrete(NVEC)), n_steps=16, batch_size=16, device="cpu")
    model.learn(8 * 16, callback=callback())
    (message,) = [record.message for record in caplog.records if "no gradient step was seen" in record.message]
    assert "levers" in message


def test_a2c_exports_its_losses(callback):
    served = callback(None, keep_serving=True)
    model = A2C("MlpPolicy", gymnasium.make("CartPole-v1"), seed=7, device="cpu")
    model.learn(20, callback=served)
    values = scrape(served.url, 4)
    assert values["ppo_policy_loss"] == pytest.approx(model.logger.name_to_value["train/policy_loss"])
    assert values["ppo_gradient_cv_per_step_count"] == 4
    assert 'algorithm="A2C"' in (text := fetch(served.url)[1])
    assert 'environment="CartPole-v1"' in text and 'run="CartPole-v1-seed7"' in text and 'seed="7"' in text
