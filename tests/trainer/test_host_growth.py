"""The default environment: Gymnasium's vector API, real training of the hosts, and a task worth learning."""

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

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
    networks,
    parameter_count,
    ramp_shape,
)
from trainer.environments.host_growth.networks import HostNetworks, Pass

FULL, HALF = TARGETS.index(1.0), TARGETS.index(0.5)
AT_ONCE, IN_FOUR, IN_SIXTEEN = SPEEDS.index(1), SPEEDS.index(4), SPEEDS.index(16)


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
    final = infos["final_obs"]
    assert infos["_final_obs"].all() and env.observation_space.contains(final)
    assert (final[:, 8] == 1.0).all(), "the final observation shows the end of the episode"
    assert (observation[:, 8] == 0.0).all() and (observation[:, 4:8] == 0.0).all()
    assert (observation[:, :4] != first[:, :4]).any(), "the next episode is another task"


def test_tensors_in_and_out_are_the_same_numbers():
    """Over the end of an episode, where `final_obs` is a tensor too."""
    arrays, tensors = (
        HostGrowthVectorEnv(4, max_episode_steps=8),
        HostGrowthVectorEnv(4, max_episode_steps=8, as_tensors=True),
    )
    expected, given = arrays.reset(seed=7)[0], tensors.reset(seed=7)[0]
    arrays.action_space.seed(0)
    for _ in range(12):
        assert given.dtype == torch.float32 and np.array_equal(given, expected)
        actions = arrays.action_space.sample()
        expected, *paid, infos = arrays.step(actions)
        given, *paid_tensors, tensor_infos = tensors.step(torch.as_tensor(actions))
        assert [tensor.dtype for tensor in paid_tensors] == [torch.float32, torch.bool, torch.bool]
        assert all(np.array_equal(tensor, array) for tensor, array in zip(paid_tensors, paid))
        assert infos.keys() == tensor_infos.keys()
        assert all(np.array_equal(tensor_infos[name], infos[name]) for name in infos)
        expected = np.array(expected)


def test_with_tensors_no_step_asks_the_device_for_a_number():
    """On torch's device `meta`, whose tensors hold no numbers: to ask for one, or to leave the device, is an error."""
    env = HostGrowthVectorEnv(2, max_episode_steps=2, device="meta", as_tensors=True)
    returned = [env.reset(seed=0)[0]]
    for _ in range(3):
        *step, infos = env.step(torch.ones(2, len(ACTION_HEADS), dtype=torch.int64, device="meta"))
        returned += [*step, *infos.values()]
    assert {tensor.device.type for tensor in returned} == {"meta"}


def test_what_was_returned_stays_as_it_was():
    env = HostGrowthVectorEnv(2, max_episode_steps=4, as_tensors=True)
    first = env.reset(seed=0)[0]
    kept, copies = [first], [first.clone()]
    for _ in range(5):
        *returned, infos = env.step(torch.as_tensor(act(2, op=Op.GERMINATE)))
        kept += [*returned, *infos.values()]
        copies += [tensor.clone() for tensor in (*returned, *infos.values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_a_loaded_state_goes_on_as_the_saved_one_and_others_are_refused():
    saved, loaded = HostGrowthVectorEnv(3, max_episode_steps=8), HostGrowthVectorEnv(3, max_episode_steps=8)
    trajectory(saved, 5, 11)
    state = saved.state_dict()
    assert all(len(tensor) == 3 for tensor in state.values())
    loaded.load_state_dict(state)
    for _ in range(8):
        actions = saved.action_space.sample()
        for expected, found in zip(saved.step(actions)[:3], loaded.step(actions)[:3]):
            assert np.array_equal(expected, found)
    with pytest.raises(ValueError, match=r"host must be torch.float32 \[3, 49\], the saved environment has nothing"):
        loaded.load_state_dict({name: tensor for name, tensor in state.items() if name != "host"})
    with pytest.raises(ValueError, match="step must be the same"):
        loaded.load_state_dict({**state, "step": torch.arange(3)})


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
    before = env.state_dict()
    env.step(act())
    after = env.state_dict()
    assert torch.equal(after["seeds"][0, 1], before["seeds"][0, 1])
    assert not torch.equal(after["host"], before["host"])


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
    shapes = [ramp_shape(progress, curve) for curve in Curve]
    for shape in shapes:
        assert shape[0] == pytest.approx(0, abs=1e-6) and shape[-1] == 1.0 and (shape.diff() > 0).all()
    assert not torch.allclose(shapes[0], shapes[1]) and not torch.allclose(shapes[1], shapes[2])


def test_a_training_seed_learns_while_the_host_does_not_show_it():
    """Its weights move; what they are changes the host's training, but not the host's training loss and accuracy."""
    env = HostGrowthVectorEnv(1)
    env.reset(seed=0)
    env.step(act(blueprint=Blueprint.MLP, target=FULL, op=Op.GERMINATE))
    state = env.state_dict()
    shown, *_ = env.step(act())
    assert levels(shown)[0, 0] == 0.0
    assert not torch.equal(env.state_dict()["seeds"][0, 0], state["seeds"][0, 0])
    state["seeds"][0, 0] = 1.0
    env.load_state_dict(state)
    with_another, *_ = env.step(act())
    assert np.array_equal(with_another[:, :2], shown[:, :2]) and with_another[0, 2] != shown[0, 2]


def test_gradients_agree_with_autograd():
    """For every pair of blueprint and combination, in every slot, in float64."""
    torch.manual_seed(0)
    pairs = [(b, a) for b in Blueprint for a in Alpha]
    n, slots, points = len(pairs), ACTION_HEADS["slot"], 9
    blueprint, combination = torch.tensor([[pairs[(i + s) % n] for i in range(n)] for s in range(slots)]).unbind(-1)
    x, y = torch.randn(n, points, 2, dtype=torch.float64), torch.randint(0, 2, (n, points)).double()
    levels_ = torch.rand(slots, n, points, dtype=torch.float64)
    nets = HostNetworks(n, slots, dtype=torch.float64)
    nets.host.normal_()
    nets.seeds.normal_().mul_(networks.seed_scales()[blueprint])
    nets.set_modules(blueprint, combination)
    host, seeds = nets.host.clone().requires_grad_(), nets.seeds.clone().requires_grad_()
    with_ones = torch.cat((x.mT, torch.ones(n, 1, points, dtype=torch.float64)), dim=1)
    way = Pass(nets, points, one_level=False, has_gradient=True)
    logits = way.forward(with_ones, levels_)
    by_host, by_seeds = (
        torch.cat(parts, dim=-1) for parts in way.backward(with_ones, (torch.sigmoid(logits) - y) / points)
    )

    def hosts_one_by_one():
        """The networks as their formulas say, without batching."""
        d, m = networks.WIDTH, networks.UNITS
        loss = 0.0
        for i in range(n):
            inward, outward = host[i].split(networks.HOST_SIZES)
            inward = inward.view(d, 3)
            h = torch.tanh(x[i] @ inward[:, :2].T + inward[:, 2])
            for s in range(slots):
                seed_in, seed_out = seeds[s, i].split(networks.SEED_SIZES)
                seed_in = seed_in.view(m, d + 1)
                u = h @ seed_in[:, :d].T + seed_in[:, d]
                half = m // 2
                z = {
                    Blueprint.BOTTLENECK: lambda: u,
                    Blueprint.MLP: lambda: u.relu(),
                    Blueprint.SINE: lambda: u.sin(),
                    Blueprint.GATED: lambda: torch.cat((u[:, :half] * u[:, half:].sigmoid(), 0 * u[:, half:]), dim=1),
                }[Blueprint(int(blueprint[s, i]))]()
                f, a = z @ seed_out.view(d, m).T, levels_[s, i, :, None]
                h = {
                    Alpha.ADD: lambda: h + a * f,
                    Alpha.MULTIPLY: lambda: h * (1 + a * f),
                    Alpha.INTERPOLATE: lambda: (1 - a) * h + a * f,
                }[Alpha(int(combination[s, i]))]()
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
    living = int((env.state_dict()["seeds"] != 0).sum())
    dead_relus = 0.1 * living if blueprint is Blueprint.MLP else 0
    assert parameter_count(blueprint) - dead_relus <= living <= parameter_count(blueprint)


def test_adam_agrees_with_torch_for_rows_that_began_at_different_times():
    torch.manual_seed(0)
    weights = torch.randn(2, 5)
    references = [row.clone().requires_grad_() for row in weights]
    settings = {"lr": networks.LEARNING_RATE, "betas": (networks.BETA1, networks.BETA2), "eps": networks.EPSILON}
    optimizers = [torch.optim.Adam([row], **settings) for row in references]
    adam, shares = networks.Adam(weights, (2, 3)), networks.shares_of_newest(9)
    updates = torch.tensor([0, -3])
    for _ in range(8):
        updates += 1
        gradient = torch.rand(2, 5) - 0.5
        for row, began in enumerate(updates > 0):
            if began:
                references[row].grad = gradient[row].clone()
                optimizers[row].step()
        rates = networks.LEARNING_RATE * (updates > 0).float().unsqueeze(1)
        adam.step(gradient.split((2, 3), dim=1), shares[updates.clamp(min=0)], rates)
    torch.testing.assert_close(weights, torch.stack(references).detach(), rtol=1e-5, atol=1e-6)


def test_growing_pays_and_acting_at_random_does_not():
    """Mean return over 32 episodes of two seeds: a sensible schedule, against waiting and random actions."""

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

    for seed in (0, 1000):
        grown = mean_return(grow, seed)
        assert grown > mean_return(wait, seed) + 1.0
        assert grown > mean_return(at_random, seed) + 1.0


@pytest.mark.parametrize("arguments", [{"num_envs": 0}, {"max_episode_steps": 0}])
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
