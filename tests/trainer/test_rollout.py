"""GAE against a textbook loop, and episode ends under Gymnasium's three autoreset modes."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from trainer.environments import UnsupportedEnvironment, training_environment
from trainer.environments.host_growth import HostGrowthVectorEnv
from trainer.evaluation import play
from trainer.policy import ActorCritic
from trainer.rollout import RolloutCollector, generalized_advantages

GAMMA, LAMBDA = 0.9, 0.8


class Corridor(gym.Env):
    """Observes its own clock; pays the clock; ends after `length` steps by termination or truncation."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2, start=1)

    def __init__(self, length: int, truncates: bool):
        self._length, self._truncates = length, truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._clock = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        assert action in (1, 2)
        self._clock += 1
        over = self._clock == self._length
        return (
            np.array([self._clock], np.float32),
            float(self._clock),
            over and not self._truncates,
            over and self._truncates,
            {},
        )


LENGTHS = [(3, True), (3, False), (5, True), (100, True)]


def collector(mode: AutoresetMode, steps: int = 14) -> tuple[RolloutCollector, ActorCritic]:
    envs = SyncVectorEnv([lambda a=a: Corridor(*a) for a in LENGTHS], autoreset_mode=mode)
    torch.manual_seed(0)
    policy = ActorCritic(1, {"action": 2}, 16)
    return (
        RolloutCollector(
            training_environment("corridor", envs),
            policy,
            steps=steps,
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            seed=1,
            generator=torch.Generator().manual_seed(0),
        ),
        policy,
    )


def value(policy: ActorCritic, clock: float) -> float:
    return policy.values(torch.tensor([[float(clock)]])).item()


def textbook_return(policy: ActorCritic, clock: int, length: int, truncates: bool, left: int) -> float:
    """Advantage + value of the state at `clock` when `left` rollout steps follow, by definition of GAE."""
    advantage, decay = 0.0, 1.0
    for offset in range(min(length - clock, left)):
        now = clock + offset
        over = now + 1 == length
        following = 0.0 if over and not truncates else value(policy, now + 1)
        advantage += decay * (now + 1 + GAMMA * following - value(policy, now))
        decay *= GAMMA * LAMBDA
    return advantage + value(policy, clock)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_truncation_is_bootstrapped_and_no_step_across_a_reset_is_valid(mode):
    steps = 14
    rollouts, policy = collector(mode, steps)
    rollout = rollouts.collect()
    observed = []
    clocks, waiting = [0] * len(LENGTHS), [False] * len(LENGTHS)
    for step in range(steps):
        for index, (length, truncates) in enumerate(LENGTHS):
            if waiting[index]:
                waiting[index] = False
                continue
            # A NEXT_STEP environment loses one rollout step per reset, but GAE ends before it anyway.
            observed.append((clocks[index], textbook_return(policy, clocks[index], length, truncates, steps - step)))
            clocks[index] = (clocks[index] + 1) % length
            waiting[index] = clocks[index] == 0 and mode is AutoresetMode.NEXT_STEP
    assert rollout.observations[rollout.valid, 0].tolist() == [clock for clock, _ in observed]
    expected_returns = [expected for _, expected in observed]
    np.testing.assert_allclose(rollout.returns[rollout.valid], expected_returns, rtol=1e-5)
    assert rollout.environment_steps == len(observed)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodic_returns_and_lengths_are_those_that_the_environment_paid(mode):
    rollouts, _ = collector(mode, steps=40)
    episodes = rollouts.collect().episodes
    paid = {sum(range(1, length + 1)): length for length, _ in LENGTHS}
    assert episodes == len(rollouts.recent_returns) > 10
    for episode_return, length in zip(rollouts.recent_returns, rollouts.recent_lengths, strict=True):
        assert paid[episode_return] == length


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_evaluation_counts_no_step_that_only_resets(mode):
    envs = SyncVectorEnv([lambda a=a: Corridor(*a) for a in LENGTHS], autoreset_mode=mode)
    _, policy = collector(mode)
    played = play(policy, training_environment("corridor", envs), 2 * len(LENGTHS), seed=1, deterministic=False)
    lengths = sorted(2 * [length for length, _ in LENGTHS])
    assert sorted(played.lengths) == lengths
    assert sorted(played.returns) == [sum(range(1, length + 1)) for length in lengths]


def test_gae_agrees_with_its_definition_as_a_sum_of_discounted_errors():
    rng = np.random.default_rng(0)
    rewards, values, next_values = torch.from_numpy(rng.normal(size=(3, 20, 4)))
    ends = torch.from_numpy(rng.random((20, 4)) < 0.2)
    advantages = generalized_advantages(rewards, values, next_values, ends, GAMMA, LAMBDA)
    errors = rewards + GAMMA * next_values - values
    for env in range(4):
        for start in range(20):
            total, decay = 0.0, 1.0
            for step in range(start, 20):
                total += decay * errors[step, env]
                decay *= GAMMA * LAMBDA
                if ends[step, env]:
                    break
            assert advantages[start, env].item() == pytest.approx(total.item())


def test_nothing_that_comes_after_an_episode_reaches_into_it():
    rewards, ends = torch.ones(4, 1), torch.tensor([[False], [True], [False], [False]])
    rewards[2] = float("nan")
    advantages = generalized_advantages(rewards, torch.zeros(4, 1), torch.zeros(4, 1), ends, GAMMA, LAMBDA)
    assert advantages.isnan().flatten().tolist() == [False, False, True, False]


def test_a_truncated_episode_without_its_final_observation_is_an_error_that_says_so():
    class Forgetful(SyncVectorEnv):
        def step(self, actions):
            *result, _ = super().step(actions)
            return *result, {}

    envs = Forgetful([lambda: Corridor(3, True)], autoreset_mode=AutoresetMode.SAME_STEP)
    policy, generator = ActorCritic(1, {"action": 2}, 16), torch.Generator()
    environment = training_environment("corridor", envs)
    options = {"steps": 4, "gamma": GAMMA, "gae_lambda": LAMBDA, "seed": 1, "generator": generator}
    with pytest.raises(UnsupportedEnvironment, match="final_obs"):
        RolloutCollector(environment, policy, **options).collect()


def test_an_environment_of_tensors_gives_the_rollouts_that_it_gives_in_arrays():
    """Over the end of an episode; on the CPU, where both can be had."""
    rollouts = []
    for as_tensors in (False, True):
        environment = training_environment("host-growth", HostGrowthVectorEnv(3, as_tensors=as_tensors))
        torch.manual_seed(0)
        policy = ActorCritic(environment.observation_size, environment.heads, 16)
        generator = torch.Generator().manual_seed(0)
        options = {"steps": 40, "gamma": GAMMA, "gae_lambda": LAMBDA, "seed": 1, "generator": generator}
        collector = RolloutCollector(environment, policy, **options)
        rollouts.append([collector.collect(), collector.collect(), list(collector.recent_returns)])
    for arrays, tensors in zip(*(each[:2] for each in rollouts), strict=True):
        assert arrays.episodes == tensors.episodes and arrays.environment_steps == tensors.environment_steps == 120
        for name in ("observations", "actions", "log_probs", "advantages", "returns", "valid"):
            torch.testing.assert_close(getattr(arrays, name), getattr(tensors, name))
    assert len(rollouts[0][2]) == 3 and rollouts[0][2] == pytest.approx(rollouts[1][2])
