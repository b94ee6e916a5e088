"""The fused heads against one torch distribution per head."""

import pytest
import torch
from torch.distributions import Categorical

from trainer.policy import ActorCritic, FactoredCategorical, HeadLayout, RunningMoments

SIZES = [4, 8, 3, 3, 4, 4, 6]


def fused(logits: torch.Tensor) -> FactoredCategorical:
    return FactoredCategorical(logits.t(), HeadLayout.of(SIZES))


def separate(logits: torch.Tensor) -> list[Categorical]:
    return [Categorical(logits=part) for part in logits.split(SIZES, dim=1)]


# Spread and offset per head: a maximum shared between heads would underflow the quiet ones.
@pytest.mark.parametrize("offsets", [[0.0] * 7, [0, -90, 500, 0, -500, 90, 0]])
def test_log_probabilities_entropies_and_gradients_agree_with_torch_distributions(offsets):
    torch.manual_seed(0)
    shift = torch.cat([torch.full((size,), float(offset)) for size, offset in zip(SIZES, offsets)])
    logits = (torch.randn(64, sum(SIZES)) * 3 + shift).requires_grad_()
    actions = torch.stack([torch.randint(size, (64,)) for size in SIZES], 1)
    ours = fused(logits.detach())
    # In doubles: torch's own distribution loses digits at logits of 500.
    theirs = separate(logits.double())
    log_prob = sum(d.log_prob(actions[:, i]) for i, d in enumerate(theirs))
    entropy = sum(d.entropy() for d in theirs)
    torch.testing.assert_close(ours.log_probs(actions).sum(0), log_prob.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropies.sum(0), entropy.float(), rtol=1e-5, atol=1e-5)
    by_log_prob = torch.randn(64)
    gradient = ours.gradient(actions, by_log_prob, 0.7)
    (expected,) = torch.autograd.grad((log_prob * by_log_prob + entropy * 0.7).sum(), logits)
    torch.testing.assert_close(gradient.t(), expected, rtol=1e-5, atol=1e-5)


def test_samples_follow_the_probabilities_and_never_leave_their_head():
    torch.manual_seed(0)
    logits = torch.randn(1, sum(SIZES))
    actions = fused(logits.expand(40_000, -1)).sample(torch.rand(len(SIZES), 40_000))
    for index, (size, distribution) in enumerate(zip(SIZES, separate(logits))):
        frequencies = torch.bincount(actions[:, index], minlength=size) / len(actions)
        assert len(frequencies) == size
        torch.testing.assert_close(frequencies, distribution.probs[0], rtol=0, atol=0.012)


def test_no_uniform_number_leads_to_a_choice_that_a_head_lacks_or_never_takes():
    logits = torch.zeros(2, sum(SIZES))
    logits[1, 0] = -200.0  # the first head's first choice
    largest = torch.full((len(SIZES), 2), 1 - 2**-24)
    assert fused(logits).sample(torch.zeros(len(SIZES), 2)).tolist() == [[size - 1 for size in SIZES]] * 2
    assert fused(logits).sample(largest).tolist() == [[0] * len(SIZES), [1] + [0] * (len(SIZES) - 1)]


def test_a_fresh_policy_is_near_uniform_in_every_head():
    torch.manual_seed(0)
    policy = ActorCritic(10, {f"h{i}": size for i, size in enumerate(SIZES)}, 32)
    observations = torch.randn(16, 10)
    seen = policy.forward(observations)
    uniform = sum(torch.log(torch.tensor(float(size))) for size in SIZES)
    torch.testing.assert_close(policy.distribution(seen.logits).entropies.sum(0), uniform.expand(16), rtol=1e-3, atol=0)
    assert policy.values(observations).shape == (16,)


@pytest.mark.parametrize("batch", [1, 8])
def test_acting_on_arrays_and_on_tensors_is_the_same(batch):
    torch.manual_seed(0)
    policy = ActorCritic(10, {f"h{i}": size for i, size in enumerate(SIZES)}, 32, separate_critic=True)
    policy.parameters["policy_weight"].normal_()
    for _ in range(20):
        observations, uniforms = torch.randn(batch, 10), torch.rand(len(SIZES), batch)
        actions = policy.act(observations.numpy(), uniforms.numpy())
        assert actions.tolist() == policy.act(observations, uniforms).tolist()


def test_moments_follow_the_returns_and_ignore_what_is_not_finite():
    moments = RunningMoments()
    returns = torch.randn(5000).mul(3.0).add(100.0)
    moments.update(returns)
    assert moments.mean.item() == pytest.approx(returns.mean().item(), rel=1e-4)
    assert moments.std.item() == pytest.approx(returns.std().item(), rel=1e-3)
    before = moments.mean.item()
    returns[7] = float("nan")
    moments.update(returns)
    assert moments.mean.item() == before
