"""The default environment: Gymnasium's vector API, real training of the hosts, and a task worth learning."""

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trainer.environments import host_growth
from trainer.environments.host_growth import (
    ACTION_HEADS,
    SPEEDS,
    TARGETS,
    Alpha,
    Blueprint,
    Curve,
    HostGrowthVectorEnv,
    Op,
    Stage,
    parameter_count,
    ramp_shape,
)

FULL, HALF = TARGETS.index(1.0), TARGETS.index(0.5)
AT_ONCE, IN_FOUR, IN_SIXTEEN = SPEEDS.index(1), SPEEDS.index(4), SPEEDS.index(16)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def act(environments=1, **parts):
    """The same action everywhere; parts that are not named are 0."""
    return np.tile([int(parts.get(name, 0)) for name in ACTION_HEADS], (environments, 1))


def stages(observations):
    """Stage [N, slots] that the observations show."""
    slots = observations[:, 10:].reshape(len(observations), ACTION_HEADS["slot"], -1)
    return slots[:, :, : len(Stage)].argmax(-1)


def levels(observations):
    slots = observations[:, 10:].reshape(len(observations), ACTION_HEADS["slot"], -1)
    return slots[:, :, len(Stage) + 1]


def trajectory(env, seed, steps, action_seed=0):
    random = np.random.default_rng(action_seed)
    actions = random.integers(0, env.single_action_space.nvec, (steps, env.num_envs, len(ACTION_HEADS)))
    observations = [env.reset(seed=seed)[0]]
    rewards = []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.stack(rewards)


def test_spaces_shapes_and_bounds():
    env = HostGrowthVectorEnv(5, max_episode_steps=12)
    assert list(env.single_action_space.nvec) == list(ACTION_HEADS.values())
    assert env.action_heads == ACTION_HEADS
    assert list(ACTION_HEADS) == ["slot", "blueprint", "alpha", "target", "speed", "curve", "op"]
    observation, infos = env.reset(seed=3)
    assert env.observation_space.contains(observation) and infos == {}
    env.action_space.seed(0)
    for _ in range(30):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation)
        assert observation.dtype == np.float32 and np.isfinite(reward).all()
        assert [a.shape for a in (reward, terminated, truncated)] == [(5,)] * 3
        assert terminated.dtype == truncated.dtype == bool


def test_autoreset_in_the_same_step_keeps_the_final_observation():
    env = HostGrowthVectorEnv(3, max_episode_steps=4)
    first, _ = env.reset(seed=0)
    for _ in range(3):
        _, _, terminated, _, infos = env.step(act(3))
        assert not terminated.any() and infos == {}
    observation, _, terminated, truncated, infos = env.step(act(3))
    assert terminated.all() and not truncated.any()
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.SAME_STEP
    final = np.stack(infos["final_obs"])
    assert infos["_final_obs"].all() and env.observation_space.contains(final)
    assert (final[:, 8] == 1.0).all(), "the final observation shows the end of the episode"
    assert (observation[:, 8] == 0.0).all() and (observation[:, 4:8] == 0.0).all()
    assert (observation[:, :4] != first[:, :4]).any(), "the next episode is another task"
    assert infos["final_info"]["validation_accuracy"] == pytest.approx(final[:, 3])


def test_reset_mask_begins_only_the_chosen_environments():
    env = HostGrowthVectorEnv(3, max_episode_steps=6)
    env.reset(seed=0)
    for _ in range(2):
        before, *_ = env.step(act(3))
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert (after[[0, 2], :4] == before[[0, 2], :4]).all() and (after[1, :4] != before[1, :4]).any()
    ends = [env.step(act(3))[2].tolist() for _ in range(6)]
    assert ends[3] == [True, False, True] and ends[5] == [False, True, False]


def test_same_seed_and_actions_give_the_same_bits_whatever_the_caller_does():
    env = HostGrowthVectorEnv(4, max_episode_steps=16)
    expected = trajectory(env, 7, 40)
    torch.manual_seed(1)
    np.random.seed(1)
    global_states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        again = trajectory(HostGrowthVectorEnv(4, max_episode_steps=16), 7, 40)
    with torch.enable_grad():
        reused = trajectory(env, 7, 40)
    for other in (again, reused):
        assert all(np.array_equal(a, b) for a, b in zip(expected, other))
    assert torch.equal(torch.get_rng_state(), global_states[0])
    assert np.array_equal(np.random.get_state()[1], global_states[1])
    assert not np.array_equal(trajectory(env, 8, 40)[0], expected[0])


def test_an_environment_begun_under_inference_mode_goes_on_without_it():
    env = HostGrowthVectorEnv(2)
    with torch.inference_mode():
        env.reset(seed=0)
        env.step(act(2, op=Op.GERMINATE))
    observation, *_ = env.step(act(2))
    assert (stages(observation)[:, 0] == Stage.TRAINING).all()


def test_environment_i_depends_on_seed_plus_i_alone():
    together = HostGrowthVectorEnv(4)
    alone = HostGrowthVectorEnv(2)
    a, _ = together.reset(seed=10)
    b, _ = alone.reset(seed=12)
    for _ in range(10):
        assert a[2:] == pytest.approx(b, abs=1e-4)
        action = together.action_space.sample()
        a, *_ = together.step(action)
        b, *_ = alone.step(action[2:])


def test_a_seed_goes_through_its_stages_and_what_is_fossilized_stays():
    env = HostGrowthVectorEnv(1)
    env.reset(seed=0)
    seen, blend = [], []
    grow = dict(slot=1, blueprint=Blueprint.MLP, alpha=Alpha.ADD, target=FULL)
    script = [Op.FOSSILIZE, Op.GERMINATE, Op.WAIT, Op.ADVANCE, *[Op.WAIT] * 4, Op.FOSSILIZE, Op.PRUNE]
    for op in script:
        observation, *_ = env.step(act(**grow, speed=IN_FOUR, curve=Curve.LINEAR, op=op))
        seen.append(Stage(stages(observation)[0, 1]).name)
        blend.append(float(levels(observation)[0, 1]))
    assert seen == ["DORMANT", "TRAINING", "TRAINING", *["BLENDING"] * 3, *["HOLDING"] * 2, *["FOSSILIZED"] * 2]
    assert blend == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    frozen = env._state.seeds[0, 1].clone()
    host = env._state.host[0].clone()
    env.step(act())
    assert torch.equal(env._state.seeds[0, 1], frozen) and not torch.equal(env._state.host[0], host)


def test_a_pruned_slot_is_free_again_after_its_cooldown():
    env = HostGrowthVectorEnv(1)
    env.reset(seed=0)
    env.step(act(op=Op.GERMINATE))
    seen = [Stage(stages(env.step(act(op=Op.PRUNE))[0])[0, 0])]
    while seen[-1] is not Stage.TRAINING:
        seen.append(Stage(stages(env.step(act(op=Op.GERMINATE))[0])[0, 0]))
        assert len(seen) < 20
    assert set(seen[:-1]) == {Stage.PRUNED, Stage.DORMANT}


@pytest.mark.parametrize("part", ACTION_HEADS)
def test_every_part_of_the_action_changes_what_the_host_computes(part):
    """Two episodes whose actions differ in one part alone come to different validation losses.

    Another seed stands in the middle slot: without it, it is the same to the host which slot one seed has.
    """
    usual = dict(slot=0, blueprint=Blueprint.MLP, alpha=Alpha.ADD, target=FULL, speed=IN_FOUR, curve=Curve.LINEAR)
    other = dict(slot=2, blueprint=Blueprint.SINE, alpha=Alpha.MULTIPLY, target=HALF, speed=IN_SIXTEEN)
    other["curve"] = Curve.COSINE
    losses = []
    for changed in (False, True):
        choice = {**usual, part: other[part]} if changed and part != "op" else usual
        env = HostGrowthVectorEnv(1)
        env.reset(seed=0)
        for op in (Op.GERMINATE, Op.ADVANCE):
            env.step(act(slot=1, blueprint=Blueprint.GATED, target=FULL, speed=AT_ONCE, op=op))
        env.step(act(**choice, op=Op.GERMINATE))
        for _ in range(4):
            env.step(act())
        observation, *_ = env.step(act(**choice, op=Op.WAIT if changed and part == "op" else Op.ADVANCE))
        observation, *_ = env.step(act())
        losses.append(observation[0, 2])
    assert losses[0] != losses[1]


def test_ramps_rise_from_nothing_to_the_whole():
    progress = torch.linspace(0, 1, 9)
    shapes = [ramp_shape(progress, torch.tensor(int(curve))) for curve in Curve]
    for shape in shapes:
        assert shape[0] == pytest.approx(0, abs=1e-6) and shape[-1] == 1.0 and (shape.diff() > 0).all()
    assert not torch.allclose(shapes[0], shapes[1]) and not torch.allclose(shapes[1], shapes[2])


def test_a_training_seed_learns_while_the_host_does_not_show_it():
    """Its weights move, but taking it away leaves the validation loss as it was."""
    env = HostGrowthVectorEnv(1)
    env.reset(seed=0)
    env.step(act(blueprint=Blueprint.MLP, target=FULL, op=Op.GERMINATE))
    before = env._state.seeds[0, 0].clone()
    observation, *_ = env.step(act())
    assert levels(observation)[0, 0] == 0.0
    assert not torch.equal(env._state.seeds[0, 0], before)
    loss, _ = env._validate()
    env._state.seeds[0, 0] = 0.0
    assert torch.equal(env._validate()[0], loss)


def test_gradients_agree_with_autograd():
    """For every pair of blueprint and combination, in every slot, in float64."""
    torch.manual_seed(0)
    pairs = [(b, a) for b in Blueprint for a in Alpha]
    n, slots, points = len(pairs), ACTION_HEADS["slot"], 9
    blueprint = torch.tensor([[pairs[(i + s) % n][0] for s in range(slots)] for i in range(n)])
    combination = torch.tensor([[pairs[(i + s) % n][1] for s in range(slots)] for i in range(n)])
    host = torch.randn(n, sum(host_growth._HOST_SIZES), dtype=torch.float64, requires_grad=True)
    draws = torch.randn(n * slots, sum(host_growth._SEED_SIZES))
    seeds = host_growth._seed_weights(draws, blueprint.flatten()).double().view(n, slots, -1).requires_grad_()
    levels_ = torch.rand(n, slots, points, dtype=torch.float64)
    x, y = torch.randn(n, points, 2, dtype=torch.float64), torch.randint(0, 2, (n, points)).double()
    with torch.no_grad():
        with_ones = torch.cat((x.mT, torch.ones(n, 1, points, dtype=torch.float64)), dim=1)
        logits, saved = host_growth.forward(host, seeds, blueprint, combination, levels_, with_ones)
        by_host, by_seeds = host_growth.backward(host, seeds, (torch.sigmoid(logits) - y) / points, saved)

    def hosts_one_by_one():
        """The networks as their formulas say, without batching."""
        d, m = host_growth._WIDTH, host_growth._UNITS
        loss = 0.0
        for i in range(n):
            inward, outward = host[i].split(host_growth._HOST_SIZES)
            inward = inward.view(d, 3)
            h = torch.tanh(x[i] @ inward[:, :2].T + inward[:, 2])
            for s in range(slots):
                seed_in, seed_out = seeds[i, s].split(host_growth._SEED_SIZES)
                seed_in = seed_in.view(m, d + 1)
                u = h @ seed_in[:, :d].T + seed_in[:, d]
                half = m // 2
                z = {
                    Blueprint.BOTTLENECK: lambda: u,
                    Blueprint.MLP: lambda: u.relu(),
                    Blueprint.SINE: lambda: u.sin(),
                    Blueprint.GATED: lambda: torch.cat((u[:, :half] * u[:, half:].sigmoid(), 0 * u[:, half:]), dim=1),
                }[Blueprint(int(blueprint[i, s]))]()
                f, a = z @ seed_out.view(d, m).T, levels_[i, s, :, None]
                h = {
                    Alpha.ADD: lambda: h + a * f,
                    Alpha.MULTIPLY: lambda: h * (1 + a * f),
                    Alpha.INTERPOLATE: lambda: (1 - a) * h + a * f,
                }[Alpha(int(combination[i, s]))]()
            loss = loss + binary_cross_entropy_with_logits(h @ outward[:d] + outward[d], y[i])
        return loss

    expected_host, expected_seeds = torch.autograd.grad(hosts_one_by_one(), (host, seeds))
    torch.testing.assert_close(by_host, expected_host, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_seeds, expected_seeds, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("blueprint", Blueprint)
def test_a_seed_has_the_parameters_it_pays_for(blueprint):
    env = HostGrowthVectorEnv(1)
    env.reset(seed=0)
    env.step(act(blueprint=blueprint, target=FULL, op=Op.GERMINATE))
    for _ in range(20):
        env.step(act())
    living = int((env._state.seeds != 0).sum())
    dead_relus = 0.1 * living if blueprint is Blueprint.MLP else 0
    assert parameter_count(blueprint) - dead_relus <= living <= parameter_count(blueprint)


def test_an_adam_step_agrees_with_torch():
    torch.manual_seed(0)
    weights = torch.randn(2, 5)
    reference = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam(
        [reference], lr=host_growth._LEARNING_RATE, betas=(host_growth._BETA1, host_growth._BETA2), eps=0
    )
    first, second = torch.zeros(2, 5), torch.zeros(2, 5)
    for count in range(1, 6):
        gradient = torch.rand(2, 5) - 0.5
        reference.grad = gradient.clone()
        optimizer.step()
        host_growth._adam(weights, first, second, gradient, torch.full((2,), count), torch.ones(2))
    torch.testing.assert_close(weights, reference.detach(), rtol=1e-4, atol=1e-5)


def test_growing_pays_and_acting_at_random_does_not():
    """Mean return over 32 episodes of three seeds: a sensible schedule, against waiting and random actions."""

    def grow(env, observations, random):
        stage = stages(observations)[:, 0]
        op = np.select([stage == Stage.DORMANT, stage == Stage.TRAINING], [Op.GERMINATE, Op.ADVANCE], Op.WAIT)
        actions = act(env.num_envs, blueprint=Blueprint.SINE, alpha=Alpha.ADD, target=FULL, speed=IN_FOUR)
        actions[:, -1] = op
        return actions

    def wait(env, observations, random):
        return act(env.num_envs)

    def at_random(env, observations, random):
        return random.integers(0, env.single_action_space.nvec, (env.num_envs, len(ACTION_HEADS)))

    def mean_return(policy, seed):
        env = HostGrowthVectorEnv(32)
        observations, _ = env.reset(seed=seed)
        random = np.random.default_rng(seed)
        total = np.zeros(env.num_envs)
        for _ in range(env.max_episode_steps):
            observations, rewards, *_ = env.step(policy(env, observations, random))
            total += rewards
        return total.mean()

    for seed in (0, 1000, 2000):
        grown = mean_return(grow, seed)
        assert grown > mean_return(wait, seed) + 1.0
        assert grown > mean_return(at_random, seed) + 1.0


@pytest.mark.parametrize(
    "arguments",
    [{"num_envs": 0}, {"max_episode_steps": 0}, {"train_steps": 0}, {"batch_size": 3}, {"validation_points": 0}],
)
def test_impossible_sizes_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        HostGrowthVectorEnv(**arguments)


def test_wrong_actions_are_refused():
    env = HostGrowthVectorEnv(2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(act(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="'op' of environment 0"):
        env.step(act(2, op=len(Op)))
    with pytest.raises(ValueError, match="shape"):
        env.step(act(3))
    with pytest.raises(ValueError, match="integers"):
        env.step(act(2).astype(np.float32))
