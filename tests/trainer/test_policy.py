"""The fused heads against one torch distribution per head."""

import pytest
import torch
from torch.distributions import Categorical

from trainer.policy import ActorCritic, FactoredCategorical, HeadLayout, RunningMoments

SIZES = [4, 8, 3, 3, 4, 4, 6]


def fused(logits: torch.Tensor) -> FactoredCategorical:
    return FactoredCategorical(logits, HeadLayout.of(SIZES))


def separate(logits: torch.Tensor) -> list[Categorical]:
    return [Categorical(logits=part) for part in logits.split(SIZES, dim=1)]


# Spread and offset per head: a maximum shared between heads would underflow the quiet ones.
@pytest.mark.parametrize("offsets", [[0.0] * 7, [0, -90, 500, 0, -500, 90, 0]])
def test_log_probabilities_entropies_and_gradients_agree_with_torch_distributions(offsets):
    torch.manual_seed(0)
    shift = torch.cat([torch.full((size,), float(offset)) for size, offset in zip(SIZES, offsets)])
    logits = (torch.randn(64, sum(SIZES)) * 3 + shift).requires_grad_()
    actions = torch.stack([torch.randint(size, (64,)) for size in SIZES], 1)
    ours = fused(logits)
    # In doubles: torch's own distribution loses digits at logits of 500.
    theirs = separate(logits.double())
    log_prob = sum(d.log_prob(actions[:, i]) for i, d in enumerate(theirs))
    entropy = sum(d.entropy() for d in theirs)
    our_log_prob, our_entropy = ours.evaluate(actions)
    torch.testing.assert_close(our_log_prob, log_prob.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_entropy, entropy.float(), rtol=1e-5, atol=1e-5)
    weights, other_weights = torch.randn(2, 64)
    (gradient,) = torch.autograd.grad((our_log_prob * weights + our_entropy * other_weights).sum(), logits)
    (expected,) = torch.autograd.grad((log_prob * weights + entropy * other_weights).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_samples_follow_the_probabilities_and_never_leave_their_head():
    torch.manual_seed(0)
    logits = torch.randn(1, sum(SIZES))
    actions = fused(logits.expand(40_000, -1)).sample(torch.rand(len(SIZES), 40_000))
    for index, (size, distribution) in enumerate(zip(SIZES, separate(logits))):
        frequencies = torch.bincount(actions[:, index], minlength=size) / len(actions)
        assert len(frequencies) == size
        torch.testing.assert_close(frequencies, distribution.probs[0], rtol=0, atol=0.012)


def test_no_variate_leads_to_a_choice_that_a_head_lacks_or_never_takes():
    logits = torch.zeros(2, sum(SIZES))
    logits[1, 0] = -200.0  # the first head's first choice
    largest = torch.full((len(SIZES), 2), 1 - 2**-24)
    assert fused(logits).sample(torch.zeros(len(SIZES), 2)).tolist() == [[size - 1 for size in SIZES]] * 2
    assert fused(logits).sample(largest).tolist() == [[0] * len(SIZES), [1] + [0] * (len(SIZES) - 1)]


def test_a_fresh_policy_is_near_uniform_in_every_head():
    torch.manual_seed(0)
    policy = ActorCritic(10, {f"h{i}": size for i, size in enumerate(SIZES)}, 32)
    distribution, values = policy(torch.randn(16, 10))
    uniform = sum(torch.log(torch.tensor(float(size))) for size in SIZES)
    _, entropies = distribution.evaluate(torch.zeros(16, len(SIZES), dtype=torch.long))
    torch.testing.assert_close(entropies, uniform.expand(16), rtol=1e-3, atol=0)
    assert values.shape == (16,)


def test_moments_follow_the_returns_and_ignore_what_is_not_finite():
    moments = RunningMoments()
    returns = torch.randn(5000).mul(3.0).add(100.0).numpy()
    moments.include(returns)
    assert moments.mean.item() == pytest.approx(returns.mean(), rel=1e-4)
    assert moments.deviation.item() == pytest.approx(returns.std(), rel=1e-3)
    before = moments.mean.item()
    returns[7] = float("nan")
    moments.include(returns)
    assert moments.mean.item() == before
