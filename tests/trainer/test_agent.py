"""One update: the same weights as a plain reference, and what happens when gradients go wrong."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from exporter import gradient_cv
from trainer.agent import NonFiniteGradientError, PPOAgent, PPOHyperparameters
from trainer.drill import Drill
from trainer.policy import ActorCritic
from trainer.rollout import Rollout

HEADS = {"slot": 3, "blueprint": 4, "alpha": 2, "target": 3, "speed": 2, "curve": 3, "op": 5}
SAMPLES = 96


def make_policy() -> ActorCritic:
    torch.manual_seed(0)
    policy = ActorCritic(6, HEADS, 16)
    # Far from the uniform start, so that ratios, clipping and every head's gradient are in play.
    torch.nn.init.normal_(policy.policy_layer.weight, std=0.5)
    return policy


def make_rollout(policy: ActorCritic, seed: int = 0) -> Rollout:
    """Five steps, of which the third only resets; returns far from zero, as environments pay them."""
    rng = np.random.default_rng(seed)
    steps, environments = 5, SAMPLES // 4
    observations = rng.normal(size=(steps, environments, 6)).astype(np.float32)
    variates = torch.rand(len(HEADS), steps * environments, generator=torch.Generator().manual_seed(seed))
    actions = policy.act(observations.reshape(-1, 6), variates.to(next(policy.parameters()).device))
    log_probs, values = policy.evaluate(observations.reshape(-1, 6), actions)
    actions, log_probs, values = (
        array.reshape(steps, environments, *array.shape[1:]) for array in (actions, log_probs, values)
    )
    advantages = rng.normal(50.0, 3.0, size=values.shape).astype(np.float32)
    noise = rng.normal(scale=0.2, size=values.shape).astype(np.float32)
    trained_on = np.ones(values.shape, bool)
    trained_on[2] = False
    for array in (observations, advantages):
        array[2] = math.nan
    returns = advantages + values
    return Rollout(observations, actions, log_probs + noise, values, advantages, returns, trained_on, SAMPLES, 0)


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


def reference_update(policy: ActorCritic, rollout: Rollout, learning_rate: float) -> dict[str, list]:
    """The same update, written with torch.distributions, clip_grad_norm_ and plain Adam."""
    observations, actions, old_log_probs, advantages, returns = (
        torch.from_numpy(getattr(rollout, name)[rollout.trained_on])
        for name in ("observations", "actions", "log_probs", "advantages", "returns")
    )
    outputs = policy.value_layer(policy.trunk(observations))[:, 0].detach()
    policy.return_moments.include(returns.numpy())
    scale = float(policy.return_moments.deviation)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    # What the value head said before the update, in the moments with which the update reads it.
    old_values = policy.return_moments.mean + scale * outputs
    seen: dict[str, list] = {"policy_loss": [], "value_loss": [], "entropy": [], "clip_fraction": [], "cv": []}
    for _ in range(2):
        for batch in torch.randperm(SAMPLES, generator=generator).split(32):
            features = policy.trunk(observations[batch])
            parts = policy.policy_layer(features).split(list(HEADS.values()), dim=1)
            distributions = [Categorical(logits=part) for part in parts]
            log_prob = sum(d.log_prob(actions[batch, i]) for i, d in enumerate(distributions))
            entropy = sum(d.entropy() for d in distributions).mean()
            values = policy.return_moments.mean + scale * policy.value_layer(features)[:, 0]
            ratio = (log_prob - old_log_probs[batch]).exp()
            advantage = advantages[batch]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            policy_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            clipped = old_values[batch] + (values - old_values[batch]).clamp(-0.2 * scale, 0.2 * scale)
            errors = [((estimate - returns[batch]) / scale) ** 2 for estimate in (values, clipped)]
            value_loss = 0.5 * torch.max(*errors).mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss - 0.01 * entropy).backward()
            layer, start, norms = policy.policy_layer, 0, []
            for size in HEADS.values():
                rows = slice(start, start + size)
                norms.append(torch.cat([layer.weight.grad[rows].flatten(), layer.bias.grad[rows]]).norm().item())
                start += size
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05)
            optimizer.step()
            for name, value in [
                ("policy_loss", policy_loss.item()),
                ("value_loss", value_loss.item()),
                ("entropy", entropy.item()),
                ("clip_fraction", ((ratio - 1).abs() > 0.2).float().mean().item()),
                ("cv", gradient_cv(norms)),
            ]:
                seen[name].append(value)
    return seen


def weights(policy: ActorCritic) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters()]


def test_an_update_agrees_with_a_plain_reference():
    ours, theirs = make_policy(), make_policy()
    rollout = make_rollout(ours)
    metrics = make_agent(ours).update(rollout, learning_rate=1e-3)
    expected = reference_update(theirs, rollout, 1e-3)
    for parameter, reference in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=1e-5, atol=1e-6)
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction"):
        assert metrics[name] == pytest.approx(np.mean(expected[name]), rel=1e-4, abs=1e-5)
    assert metrics["clip_fraction"] > 0
    assert metrics["gradient_cv_per_step"] == pytest.approx(expected["cv"], rel=1e-4)
    assert metrics["gradient_cv"] == pytest.approx(np.mean(expected["cv"]), rel=1e-4)
    assert set(metrics["head_gradient_norms"]) == set(HEADS)


@pytest.mark.parametrize("where", ["head", "trunk"])
def test_a_nonfinite_step_leaves_weights_and_optimizer_untouched_and_is_counted(where):
    policy = make_policy()
    agent = make_agent(policy, "nan:op:2-2" if where == "head" else None)
    agent.update(make_rollout(policy), learning_rate=1e-3)
    rollout = make_rollout(policy, 1)
    if where == "trunk":
        rollout.returns[:] = math.nan
    before, state = (
        weights(policy),
        [{key: value.clone() for key, value in entry.items()} for entry in agent._optimizer.state.values()],
    )
    metrics = agent.update(rollout, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))
    for entry, now in zip(state, agent._optimizer.state.values(), strict=True):
        assert all(torch.equal(entry[key], now[key]) for key in entry)
    assert metrics["skipped_gradient_steps"] == 6
    assert metrics["gradient_cv"] == math.inf
    assert metrics["nonfinite_gradient_steps"] == {head: 6 * (head == "op" and where == "head") for head in HEADS}
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
    rollout.trained_on[:] = False
    rollout.trained_on[0, :3] = True
    metrics = make_agent(policy, minibatch_size=2, epochs=1).update(rollout, learning_rate=1e-3)
    assert len(metrics["gradient_cv_per_step"]) == 2 and metrics["skipped_gradient_steps"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_on_cuda_waits_for_the_device_only_at_its_end():
    policy = make_policy().cuda()
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
