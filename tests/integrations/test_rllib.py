"""RLlib's own PPO with its learners measured, in this process and in others, read over TCP."""

import sys
from pathlib import Path

import levers
import numpy as np
import pytest
import torch
from conftest import fetch, free_ports, wait_until
from gymnasium import spaces
from prometheus_client.parser import text_string_to_metric_families

ray = pytest.importorskip("ray", reason="needs ray[rllib], which pins Gymnasium: make test-integrations")

from ray import cloudpickle  # noqa: E402
from ray.rllib.algorithms.algorithm import Algorithm  # noqa: E402
from ray.rllib.algorithms.ppo import PPOConfig  # noqa: E402
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog  # noqa: E402
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule  # noqa: E402
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner  # noqa: E402
from ray.rllib.core.columns import Columns  # noqa: E402
from ray.rllib.env.multi_agent_env import MultiAgentEnv  # noqa: E402

from exporter.heads import HeadGradientMeter  # noqa: E402
from exporter.integrations.rllib import module_heads, monitored  # noqa: E402

for module in (sys.modules[__name__], levers):
    cloudpickle.register_pickle_by_value(module)  # learners cannot import it
OBSERVATIONS = spaces.Box(-1.0, 1.0, (4,), np.float32)
NVEC = (3, 4, 2)
HEADS = ["action_0", "action_1", "action_2"]


class Levers(levers.Levers):
    """As RLlib makes environments."""

    def __init__(self, config: dict) -> None:
        super().__init__(spaces.MultiDiscrete(NVEC))


class Three(MultiAgentEnv):
    """Three agents with an action space each, all paid for small actions; 10 steps."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.possible_agents = self.agents = ["left", "right", "idle"]
        self.observation_spaces = dict.fromkeys(self.agents, OBSERVATIONS)
        self.action_spaces = {
            "left": spaces.MultiDiscrete(NVEC),
            "right": spaces.Box(-1.0, 1.0, (2,), np.float32),
            "idle": spaces.Discrete(2),
        }

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self._steps = 0
        return {agent: OBSERVATIONS.sample() for agent in self.agents}, {}

    def step(self, actions):
        self._steps += 1
        rewards = {agent: -float(np.sum(np.abs(action))) for agent, action in actions.items()}
        observations = {agent: OBSERVATIONS.sample() for agent in self.agents}
        return observations, rewards, {"__all__": self._steps == 10}, {"__all__": False}, {}


class Witness(PPOTorchLearner):
    """Computes the CV of every step by itself, from the gradients that RLlib hands on."""

    cvs: list[float]
    poison_from: int | None = None  # a step, from which on the gradients of the first row are NaN

    def build(self) -> None:
        super().build()
        self.cvs = []

    def compute_loss_for_module(self, *, module_id, **arguments):
        loss = super().compute_loss_for_module(module_id=module_id, **arguments)
        if self.poison_from is not None and len(self.cvs) >= self.poison_from:
            layer = self.module[module_id].unwrapped().pi.net.mlp[-1]
            loss = loss + (layer.bias[0] * torch.nan)
        return loss

    def compute_gradients(self, loss_per_module, **arguments):
        gradients = super().compute_gradients(loss_per_module, **arguments)
        layer = self.module["default_policy"].unwrapped().pi.net.mlp[-1]
        parts = zip(gradients[layer.weight].split(NVEC), gradients[layer.bias].split(NVEC))
        norms = [(weight.square().sum() + bias.square().sum()).sqrt().item() for weight, bias in parts]
        self.cvs.append(float(np.std(norms, ddof=1) / np.mean(norms)))
        return gradients


class PoisonedWitness(Witness):
    poison_from = 4


@pytest.fixture(scope="module", autouse=True)
def cluster():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=True, configure_logging=False)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture
def trained():
    """Builds algorithms that are stopped after the test."""
    built = []

    def build(config: PPOConfig) -> Algorithm:
        built.append(config.build_algo())
        return built[-1]

    yield build
    for algorithm in built:
        algorithm.stop()


def config(num_learners: int = 0, env=Levers, learner: type = Witness, **training) -> PPOConfig:
    settings = {"train_batch_size_per_learner": 64, "minibatch_size": 32, "num_epochs": 2, "grad_clip": 0.05}
    return (
        PPOConfig()
        .environment(env)
        .env_runners(num_env_runners=0)
        .learners(num_learners=num_learners, learner_class=learner)
        .training(**{**settings, **training})
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .debugging(seed=1)
    )


def scrape(port: int, updates: int, run: str = "levers") -> dict[str, float]:
    """Values of the run by name, and by name and head where there is one, once it has so many updates."""

    def look() -> dict[str, float] | None:
        values = {}
        for family in text_string_to_metric_families(fetch(f"http://127.0.0.1:{port}/metrics")[1]):
            for sample in family.samples:
                if sample.labels.get("run") == run:
                    head = sample.labels.get("head") or (sample.name == "ppo_signal" and sample.labels["name"])
                    values[f"{sample.name}/{head}" if head else sample.name] = sample.value
        return values if values.get("ppo_updates_total") == updates else None

    return wait_until(look, f"{updates} updates of {run} are served")


@pytest.mark.parametrize(
    "space, names, free_log_std",
    [
        (spaces.Discrete(4), ["action"], False),
        (spaces.MultiDiscrete([3, 1, 4]), ["action_0", "action_2"], False),
        (spaces.Box(-1.0, 1.0, (3,)), HEADS, False),
        (spaces.Box(-1.0, 1.0, (3,)), HEADS, True),
        (
            spaces.Dict(
                {"move": spaces.Box(-1.0, 1.0, (2,)), "aim": spaces.Tuple([spaces.Discrete(3), spaces.Discrete(2)])}
            ),
            ["aim_0", "aim_1", "move_0", "move_1"],
            False,
        ),
        (
            spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Discrete(2)]),
            ["action_0_0", "action_0_1", "action_1"],
            False,
        ),
    ],
)
def test_a_part_of_the_action_moves_the_gradient_of_its_own_head_alone(space, names, free_log_std):
    """By RLlib's own distribution: another value for one part changes the gradient in that part's rows only."""
    module = DefaultPPOTorchRLModule(
        observation_space=OBSERVATIONS,
        action_space=space,
        model_config={"fcnet_hiddens": [8], "free_log_std": free_log_std},
        catalog_class=PPOCatalog,
    )
    meter = HeadGradientMeter(heads := module_heads(module))
    assert list(heads) == names

    def gradients(actions) -> dict[str, float]:
        module.zero_grad()
        outputs = module.forward_train({Columns.OBS: torch.ones(1, 4)})
        distribution = module.get_train_action_dist_cls().from_logits(outputs[Columns.ACTION_DIST_INPUTS])
        distribution.logp(actions).sum().backward()
        meter.record()
        (step,) = meter.collect()
        return step.head_norms

    changed = []
    for actions, others in one_part_at_a_time(space):
        before, after = gradients(actions), gradients(others)
        changed.append([name for name in names if before[name] != pytest.approx(after[name], rel=1e-6)])
    assert [name for names_of_one in changed for name in names_of_one] == names
    assert all(len(names_of_one) <= 1 for names_of_one in changed)


def one_part_at_a_time(space):
    """Pairs of actions, batches of one, that differ in one part: for every part, in the order of RLlib's logits."""
    match space:
        case spaces.Discrete():
            yield torch.tensor([0]), torch.tensor([space.n - 1])
        case spaces.MultiDiscrete():
            for index, size in enumerate(space.nvec):
                actions = torch.zeros(1, len(space.nvec), dtype=torch.long)
                others = actions.clone()
                others[0, index] = int(size) - 1
                yield actions, others
        case spaces.Box():
            for index in range(space.shape[0]):
                actions = torch.full((1, space.shape[0]), 0.3)
                others = actions.clone()
                others[0, index] = 2.5
                yield actions, others
        case spaces.Dict() | spaces.Tuple():
            keys = sorted(space.keys()) if isinstance(space, spaces.Dict) else range(len(space))
            first = {key: next(one_part_at_a_time(space[key]))[0] for key in keys}
            for key in keys:
                for actions, others in one_part_at_a_time(space[key]):
                    pair = {**first, key: actions}, {**first, key: others}
                    yield pair if isinstance(space, spaces.Dict) else tuple(tuple(each.values()) for each in pair)


def test_a_policy_head_of_another_form_is_refused_with_the_way_out():
    module = DefaultPPOTorchRLModule(
        observation_space=OBSERVATIONS, action_space=spaces.Discrete(4), model_config={}, catalog_class=PPOCatalog
    )
    module.pi = torch.nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"6 rows, .* Discrete\(4\) makes 4; .*; pass monitored\(heads="):
        module_heads(module)
    module.pi = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"has no `pi` that ends in a linear layer"):
        module_heads(module)


@pytest.mark.parametrize("num_learners", [0, 1, 2])
def test_cv_and_signals_are_rllibs_own_and_the_goodbye_is_said(num_learners, trained, tmp_path: Path, capfd):
    port = free_ports().prometheus
    targets, texts = tmp_path / "targets", tmp_path / "texts"
    targets.mkdir(), texts.mkdir()
    algorithm = trained(
        monitored(config(num_learners), "levers", port=port, targets_dir=targets, textfile_dir=texts, global_norm=True)
    )
    for number in (1, 2):
        result = algorithm.train()
        values = scrape(port, number)
        (cvs, *_) = [each.get() for each in algorithm.learner_group.foreach_learner(lambda learner: learner.cvs)]
        assert values["ppo_gradient_cv_per_step_count"] == len(cvs)
        assert values["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(cvs), rel=1e-4)
        own, sampled = result["learners"]["default_policy"], result["env_runners"]
        expected = {
            "ppo_policy_loss": own["policy_loss"],
            "ppo_value_loss": own["vf_loss"],
            "ppo_entropy": own["entropy"],
            "ppo_approx_kl": own["mean_kl_loss"],
            "ppo_explained_variance": own["vf_explained_var"],
            "ppo_learning_rate": own["default_optimizer_learning_rate"],
            "ppo_signal/kl_coef": own["curr_kl_coeff"],
            "ppo_episode_return_mean": sampled["episode_return_mean"],
            "ppo_episode_length_mean": sampled["episode_len_mean"],
            "ppo_environment_steps_total": number * 64 * max(num_learners, 1),
            "ppo_update_duration_seconds_count": number,
            "ppo_exporter_errors_total": 0,
        }
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-12)
        # Before clipping, which leaves less than 0.05 of all parameters together.
        assert values["ppo_head_gradient_norm/action_0"] > 0.05 and values["ppo_gradient_norm"] > 0.05
    assert list(targets.glob("*.json")) and list(texts.glob("*.prom"))
    algorithm.stop()
    assert not list(targets.glob("*.json")) and not list(texts.glob("*.prom"))
    with pytest.raises(OSError):
        fetch(f"http://127.0.0.1:{port}/metrics")
    assert "exporter process has ended" not in "".join(capfd.readouterr())


def test_weights_are_bit_for_bit_those_without_a_monitor(trained):
    def weights(config: PPOConfig) -> dict[str, np.ndarray]:
        algorithm = trained(config)
        for _ in range(3):
            algorithm.train()
        return algorithm.get_module().get_state()

    plain, measured = weights(config()), weights(monitored(config(), "levers", port=0))
    assert all(np.array_equal(value, measured[name]) for name, value in plain.items())


@pytest.mark.parametrize("num_learners", [0, 2])
def test_nan_gradients_that_rllib_sets_to_zero_are_counted_for_their_head(num_learners, trained):
    port = free_ports().prometheus
    settings = config(num_learners, learner=PoisonedWitness, grad_clip=None)
    algorithm = trained(monitored(settings, "levers", port=port))
    algorithm.train(), algorithm.train()
    values = scrape(port, 2)
    steps = len(algorithm.learner_group.foreach_learner(lambda learner: learner.cvs).result_or_errors[0].get())
    assert values["ppo_nonfinite_gradients_total/action_0"] == steps - 4 > 0
    assert values["ppo_nonfinite_gradients_total/action_1"] == 0
    assert values["ppo_gradient_cv"] == float("inf")
    assert all(np.isfinite(value).all() for value in algorithm.get_module().get_state().values())


def test_each_module_that_is_trained_is_a_run(trained):
    port = free_ports().prometheus
    settings = config(env=Three, learner=PPOTorchLearner).multi_agent(
        policies={"left", "right", "idle"},
        policy_mapping_fn=lambda agent, *_, **__: agent,
        policies_to_train=["left", "right"],
    )
    algorithm = trained(monitored(settings, "three", port=port))
    result = algorithm.train()
    left, right = scrape(port, 1, "three-left"), scrape(port, 1, "three-right")
    assert [name for name in right if name.startswith("ppo_head_gradient_norm/")] == [
        "ppo_head_gradient_norm/action_0",
        "ppo_head_gradient_norm/action_1",
    ]
    for module, values in (("left", left), ("right", right)):
        assert values["ppo_policy_loss"] == pytest.approx(result["learners"][module]["policy_loss"], rel=1e-5)
        returns = result["env_runners"]["module_episode_returns_mean"]
        assert values["ppo_episode_return_mean"] == pytest.approx(returns[module])
    assert 'run="three-idle"' not in fetch(f"http://127.0.0.1:{port}/metrics")[1]


def test_a_restored_algorithm_is_measured_again(trained, tmp_path: Path):
    port = free_ports().prometheus
    algorithm = trained(monitored(config(learner=PPOTorchLearner), "levers", port=port, head_names=["a", "b", "c"]))
    algorithm.train()
    path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    algorithm.restore_from_path(path)
    algorithm.train()
    assert scrape(port, 2)["ppo_head_gradient_norm/b"] > 0
    algorithm.stop()
    restored = Algorithm.from_checkpoint(path)
    try:
        restored.train()
        values = scrape(port, 1)
        assert values["ppo_head_gradient_norm/c"] > 0 and values["ppo_environment_steps_total"] == 64
    finally:
        restored.stop()


def test_callbacks_of_the_user_are_kept_and_monitored_twice_is_once(trained):
    port, seen = free_ports().prometheus, []
    settings = config(learner=PPOTorchLearner).callbacks(on_train_result=lambda **_: seen.append("result"))
    algorithm = trained(
        monitored(monitored(settings, "other"), "levers", port=port, on_update=lambda run: seen.append(run.updates))
    )
    algorithm.train()
    assert scrape(port, 1)["ppo_environment_steps_total"] == 64
    assert seen == ["result", 1]


def test_what_cannot_be_measured_is_refused_before_training():
    old = PPOConfig().api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
    with pytest.raises(TypeError, match="PPOConfig has no torch learner to measure; use the new API stack"):
        monitored(old)
    with pytest.raises(ValueError, match="0 < warning < critical"):
        monitored(config(), thresholds=(2.0, 1.0))
