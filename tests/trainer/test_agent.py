"""One update: when it ends, and what happens when gradients go wrong; test_reference.py has its numbers."""

import math

import numpy as np
import pytest
import torch

from trainer.agent import NonFiniteGradientError, PPOAgent, PPOHyperparameters
from trainer.drill import Drill
from trainer.policy import ActorCritic
from trainer.rollout import Rollout

HEADS = {"slot": 3, "blueprint": 4, "alpha": 2, "target": 3, "speed": 2, "curve": 3, "op": 5}
SAMPLES = 96


def make_policy(device: str = "cpu") -> ActorCritic:
    torch.manual_seed(0)
    policy = ActorCritic(6, HEADS, 16, device=device)
    # Far from the uniform start, so that ratios, clipping and every head's gradient are in play.
    policy.parameters["policy_weight"].normal_(std=0.5)
    return policy


def make_rollout(policy: ActorCritic, seed: int = 0) -> Rollout:
    """Five steps, of which the third only resets; returns far from zero, as environments pay them."""
    rng = np.random.default_rng(seed)
    shape = steps, environments = 5, SAMPLES // 4
    observations = torch.from_numpy(rng.normal(size=(steps * environments, 6)).astype(np.float32)).to(policy.device)
    uniforms = torch.rand(len(HEADS), steps * environments, generator=torch.Generator().manual_seed(seed))
    actions = policy.act(observations, uniforms.to(policy.device))
    log_probs, values = policy.evaluate(observations, actions)
    observations, actions, log_probs, values = (
        tensor.unflatten(0, shape) for tensor in (observations, actions, log_probs, values)
    )
    advantages = torch.from_numpy(rng.normal(50.0, 3.0, size=shape).astype(np.float32)).to(policy.device)
    # As if the weights had moved since: ratios and values are inside and outside of their clip ranges.
    value_noise, *noise = torch.from_numpy(rng.normal(size=(1 + len(HEADS), *shape)).astype(np.float32)).to(
        policy.device
    )
    valid = torch.ones(shape, dtype=torch.bool)
    valid[2] = False
    for tensor in (observations, advantages):
        tensor[2] = math.nan
    returns = advantages + values
    return Rollout(
        observations,
        actions,
        log_probs + 0.15 * torch.stack(noise, -1),
        values + 0.15 * value_noise,
        advantages,
        returns,
        valid,
        SAMPLES,
        0,
    )


def make_agent(policy: ActorCritic, drill: str | None = None, **changes) -> PPOAgent:
    settings = {
        "minibatch_size": 32,
        "epochs": 2,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "entropy_coef": 0.01,
        "value_coef": 0.5,
        "max_grad_norm": 0.05,
        "target_kl": None,
        "adam_eps": 1e-5,
        "on_nonfinite": "skip",
        **changes,
    }
    return PPOAgent(
        policy,
        PPOHyperparameters(**settings),
        torch.Generator().manual_seed(3),
        Drill.parse(drill) if drill else None,
    )


def weights(policy: ActorCritic) -> list[torch.Tensor]:
    return [parameter.clone() for parameter in policy.parameters.values()]


@pytest.mark.parametrize("where", ["head", "returns", "advantages"])
def test_a_nonfinite_step_leaves_weights_and_optimizer_untouched_and_is_counted(where):
    policy = make_policy()
    agent = make_agent(policy, "nan:op:2-2" if where == "head" else None)
    agent.update(make_rollout(policy), learning_rate=1e-3)
    rollout = make_rollout(policy, 1)
    if where != "head":
        getattr(rollout, where)[:] = math.nan
    before, state = weights(policy), {name: tensor.clone() for name, tensor in agent.state_dict()["optimizer"].items()}
    metrics = agent.update(rollout, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))
    now = agent.state_dict()["optimizer"]
    assert all(torch.equal(tensor, now[name]) for name, tensor in state.items())
    assert metrics["skipped_gradient_steps"] == 6
    assert metrics["gradient_cv"] == math.inf
    bad = {"head": {"op"}, "returns": set(), "advantages": set(HEADS)}[where]
    assert metrics["nonfinite_gradient_steps"] == {head: 6 * (head in bad) for head in HEADS}
    recovered = agent.update(make_rollout(policy, 2), learning_rate=1e-3)
    assert math.isfinite(recovered["gradient_cv"]) and recovered["skipped_gradient_steps"] == 0


def test_raise_stops_at_the_first_bad_step_names_the_head_and_keeps_the_metrics():
    policy = make_policy()
    agent = make_agent(policy, "nan:speed:1-1", on_nonfinite="raise")
    before = weights(policy)
    with pytest.raises(NonFiniteGradientError, match="in head speed at gradient step 1 ") as error:
        agent.update(make_rollout(policy), learning_rate=1e-3)
    assert error.value.metrics["gradient_cv_per_step"] == (math.inf,)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


@pytest.mark.parametrize(("drill", "cv"), [("dominate:op:1-1", math.sqrt(7)), ("starve:op:1-1", None)])
def test_a_drill_bends_the_gradients_that_it_names_for_as_long_as_it_says(drill, cv):
    policy = make_policy()
    agent = make_agent(policy, drill)
    norms = agent.update(make_rollout(policy), learning_rate=1e-3)["head_gradient_norms"]
    dead = {head for head, norm in norms.items() if norm == 0.0}
    assert dead == ({"op"} if drill.startswith("starve") else set(HEADS) - {"op"})
    metrics = agent.update(make_rollout(policy, 1), learning_rate=1e-3)
    assert 0.0 not in metrics["head_gradient_norms"].values()
    if cv is not None:
        agent = make_agent(make_policy(), drill)
        assert agent.update(make_rollout(agent.policy), learning_rate=1e-3)["gradient_cv"] == pytest.approx(cv)


def test_a_head_without_a_choice_is_left_out_of_the_entropies():
    torch.manual_seed(0)
    heads = {"only": 1, "slot": 2}
    policy = ActorCritic(6, heads, 16)
    observations = torch.randn(8, 6)
    actions = policy.act(observations, torch.rand(2, 8))
    log_probs, values = policy.evaluate(observations, actions)
    rollout = Rollout(
        *(tensor.unsqueeze(1) for tensor in (observations, actions, log_probs, values, values, values)),
        torch.ones(8, 1, dtype=torch.bool),
        8,
        0,
    )
    metrics = make_agent(policy).update(rollout, learning_rate=1e-3)
    # As uniform as it can be, but for rounding.
    assert metrics["head_entropy_ratios"] == {"slot": pytest.approx(1.0, abs=1e-3)}
    assert metrics["head_entropy_ratios"]["slot"] <= 1.0
    assert metrics["head_approx_kls"]["only"] == metrics["head_clip_fractions"]["only"] == 0.0
    assert metrics["head_update_ratios"]["slot"] > 0.0


def test_an_update_ends_after_the_running_gradient_step_when_asked():
    policy = make_policy()
    metrics = make_agent(policy).update(make_rollout(policy), learning_rate=1e-3, should_stop=lambda: True)
    assert len(metrics["gradient_cv_per_step"]) == 1


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it():
    policy = make_policy()
    metrics = make_agent(policy, target_kl=1e-9).update(make_rollout(policy), learning_rate=1e-3)
    assert len(metrics["gradient_cv_per_step"]) == 3


@pytest.mark.parametrize(("minibatch_size", "minibatches"), [(32, 3), (33, 3), (27, 4), (200, 1)])
def test_minibatches_are_as_near_to_their_size_as_they_divide_a_rollout(minibatch_size, minibatches):
    policy = make_policy()
    agent = make_agent(policy, minibatch_size=minibatch_size, epochs=1)
    metrics = agent.update(make_rollout(policy), learning_rate=1e-3)
    assert len(metrics["gradient_cv_per_step"]) == minibatches


def test_a_minibatch_of_a_single_sample_is_no_fault_of_a_head():
    policy = make_policy()
    rollout = make_rollout(policy)
    rollout.valid[:] = False
    rollout.valid[0, :3] = True
    metrics = make_agent(policy, minibatch_size=2, epochs=1).update(rollout, learning_rate=1e-3)
    assert len(metrics["gradient_cv_per_step"]) == 2 and metrics["skipped_gradient_steps"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_on_cuda_waits_for_the_device_only_at_its_end():
    policy = make_policy("cuda")
    agent = make_agent(policy)
    agent.update(make_rollout(policy), learning_rate=1e-3)
    rollout = make_rollout(policy, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            agent.update(rollout, learning_rate=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
