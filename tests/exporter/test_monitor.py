"""`GradientMonitor` on optimizers that know nothing of it."""

import contextlib
import copy
import logging
import math
import os
import tracemalloc
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from exporter import GradientMonitor, RunAggregator, TargetFile, gradient_cv, heads_from, row_heads

HEADS = ("left", "middle", "right", "up", "down")


class Policy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Linear(6, 16)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 2 + index) for index, name in enumerate(HEADS)})
        self.value = nn.Linear(16, 1)

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.trunk(inputs).tanh()
        outputs = [*(head(features) for head in self.heads.values()), self.value(features)]
        return sum(((index + 1) * output - 1).square().mean() for index, output in enumerate(outputs))


def train(
    policy: Policy, optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None, spoil=None
) -> list[float]:
    """A plain loop; the CV of every step, taken from the gradients before they are clipped."""
    generator, cvs = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optimizer.zero_grad()
        policy.loss(torch.randn(8, 6, generator=generator)).backward()
        if spoil is not None:
            spoil(step)
        cvs.append(
            gradient_cv(
                torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item() for head in policy.heads.values()
            )
        )
        if clip is not None:
            nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
    return cvs


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def policy() -> Policy:
    return Policy()


def monitor_of(policy: Policy, aggregator: RunAggregator, run: str = "walker-17", **options) -> GradientMonitor:
    return GradientMonitor(heads_from(policy, r"heads\.(\w+)"), run, aggregator=aggregator, **options)


def adam(policy: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=1e-3, **options)


def quality(aggregator: RunAggregator, run: str = "walker-17"):
    return aggregator.snapshot.runs[run].gradient_quality


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_window_of_steps_is_exported_whether_clipped_or_not(policy, aggregator, clip):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=4).attach(optimizer)
    cvs = train(policy, optimizer, 10, clip)
    run = aggregator.snapshot.runs["walker-17"]
    assert run.updates == 2 and sum(run.gradient_quality.steps_by_level.values()) == 8
    assert run.gradient_quality.gradient_cv == pytest.approx(sum(cvs[4:8]) / 4, rel=1e-5)
    assert set(run.gradient_quality.head_norms) == set(HEADS)
    assert run.gradient_quality.ceiling == pytest.approx(math.sqrt(5))
    assert run.gradient_quality.gradient_norm is None


def test_a_window_is_an_update_once_the_trainer_says_so(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator, window_steps=100, global_norm=True).attach(optimizer)
    for update in range(3):
        train(policy, optimizer, 150 if update else 7)
        monitor.record(environment_steps=100, episodes=2, policy_loss=update)
        monitor.record(environment_steps=28)
        monitor.update_completed(approx_kl=torch.tensor(0.25), update_duration_seconds=0.5)
    run = aggregator.snapshot.runs["walker-17"]
    assert (run.updates, run.environment_steps, run.episodes) == (3, 384, 6)
    assert run.signals == {"policy_loss": 2.0, "approx_kl": 0.25}
    assert run.update_duration_seconds.total == pytest.approx(1.5)
    assert sum(run.gradient_quality.steps_by_level.values()) == 307
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
    assert run.gradient_quality.gradient_norm == pytest.approx(expected, rel=1)


def test_a_window_without_gradient_steps_says_nothing(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    monitor.update_completed(environment_steps=5)
    assert aggregator.snapshot.runs["walker-17"].updates == 0
    train(policy, optimizer, 1)
    monitor.update_completed(environment_steps=5)
    assert aggregator.snapshot.runs["walker-17"].environment_steps == 10


def test_rows_of_a_fused_layer_are_heads(aggregator):
    torch.manual_seed(0)
    layer = nn.Linear(6, 9)
    optimizer = adam(layer)
    GradientMonitor(row_heads(layer, {"a": 2, "b": 4, "c": 3}), "fused", window_steps=1, aggregator=aggregator).attach(
        optimizer
    )
    layer(torch.randn(8, 6)).square().mean().backward()
    expected = {
        name: torch.cat([layer.weight.grad[rows].flatten(), layer.bias.grad[rows]]).norm().item()
        for name, rows in (("a", slice(0, 2)), ("b", slice(2, 6)), ("c", slice(6, 9)))
    }
    optimizer.step()
    assert quality(aggregator, "fused").head_norms == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="weight has 9 rows, but the heads add up to 8"):
        row_heads(layer, {"a": 8})


class Blowup(torch.autograd.Function):
    """A gradient that becomes NaN in one head's own loss, as it happens in practice."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize("before_clipping", [False, True])
def test_a_nan_is_in_every_head_after_clipping_and_attributed_before(policy, aggregator, before_clipping):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=before_clipping).attach(optimizer)
    features = policy.trunk(torch.randn(8, 6)).tanh().detach()
    outputs = {name: head(features) for name, head in policy.heads.items()}
    outputs["middle"] = Blowup.apply(outputs["middle"])
    sum(output.square().mean() for output in outputs.values()).backward()
    nn.utils.clip_grad_norm_(policy.heads.parameters(), 0.5)
    optimizer.step()
    blamed = {"middle"} if before_clipping else set(HEADS)
    assert quality(aggregator).nonfinite_steps == {head: int(head in blamed) for head in HEADS}
    assert quality(aggregator).gradient_cv == math.inf


def test_before_clipping_sees_the_norms_that_clipping_hides(policy, aggregator):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=True).attach(optimizer)
    norms = {}
    train(
        policy,
        optimizer,
        3,
        clip=1e-3,
        spoil=lambda step: norms.update(
            {n: torch.cat([p.grad.flatten() for p in h.parameters()]).norm().item() for n, h in policy.heads.items()}
        ),
    )
    assert quality(aggregator).head_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before_clipping", [False, True])
def test_loss_scaling_is_undone_and_overflowed_steps_are_none(policy, aggregator, fused, before_clipping):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizer = adam(policy, fused=fused)
    monitor = monitor_of(
        policy, aggregator, window_steps=None, before_clipping=before_clipping, grad_scaler=scaler
    ).attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(4):
        inputs = torch.randn(8, 6, generator=generator)
        reference = copy.deepcopy(policy)
        reference.zero_grad()
        reference.loss(inputs).backward()
        optimizer.zero_grad()
        scaler.scale(policy.loss(inputs)).backward()
        if step == 1:
            policy.trunk.weight.grad.fill_(math.inf)
        else:
            norms.append(torch.cat([p.grad.flatten() for p in reference.heads["up"].parameters()]).norm().item())
        scaler.step(optimizer)
        scaler.update()
    monitor.update_completed()
    run = aggregator.snapshot.runs["walker-17"]
    assert sum(run.gradient_quality.steps_by_level.values()) == 3
    assert run.gradient_quality.head_norms["up"] == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert math.isfinite(run.gradient_quality.gradient_cv) and run.exporter_errors == 0


@pytest.mark.parametrize("set_to_none", [False, True])
def test_before_clipping_knows_absent_zero_and_abandoned_gradients(policy, aggregator, set_to_none):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=True).attach(optimizer)
    train(policy, optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    policy.heads["left"](torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    norms = quality(aggregator).head_norms
    assert norms["left"] > 0 and {n: v for n, v in norms.items() if n != "left"} == (
        {} if set_to_none else dict.fromkeys(HEADS[1:], 0.0)
    )
    # A bad batch that is given up before the step.
    optimizer.zero_grad()
    (policy.loss(torch.randn(8, 6)) * math.nan).backward()
    optimizer.zero_grad()
    policy.heads["left"](torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert set(quality(aggregator).head_norms) == {"left"} and quality(aggregator).gradient_cv == 0.0


def test_frozen_parameters_are_no_obstacle(policy, aggregator):
    policy.heads["left"].bias.requires_grad_(False)
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=True, global_norm=True).attach(optimizer)
    cvs = []
    for _ in range(2):
        optimizer.zero_grad()
        policy.loss(torch.randn(8, 6)).backward()
        optimizer.step()
        cvs.append(quality(aggregator).gradient_cv)
    assert set(quality(aggregator).head_norms) == set(HEADS) and all(cv > 0 for cv in cvs)


def test_a_step_with_a_closure_is_measured_in_its_own_step(policy, aggregator):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1).attach(optimizer)
    for factor in (1.0, math.nan):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = policy.loss(torch.randn(8, 6)) * factor
            loss.backward()
            return loss

        optimizer.step(closure)
        assert math.isfinite(quality(aggregator).gradient_cv) == (factor == 1.0)
    assert aggregator.snapshot.runs["walker-17"].updates == 2


def test_a_single_parameter_is_copied_not_looked_at_later(aggregator):
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    GradientMonitor({"a": layer}, "one", window_steps=2, aggregator=aggregator).attach(optimizer)
    layer.weight.grad = torch.ones_like(layer.weight)
    for value in (1.0, 3.0):
        layer.weight.grad.fill_(value)
        optimizer.step()
    assert quality(aggregator, "one").head_norms["a"] == pytest.approx(2 * math.sqrt(12))


def test_a_long_window_is_right_to_the_last_step(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator, window_steps=None).attach(optimizer)
    cvs = train(policy, optimizer, 300)
    monitor.update_completed()
    assert quality(aggregator).gradient_cv == pytest.approx(sum(cvs) / 300, rel=1e-5)


@pytest.mark.parametrize(
    ("heads", "run", "info", "error"),
    [
        ({0: 0, "b": 1}, "r", {}, TypeError),
        ({"a": 0, "b": 1}, 17, {}, TypeError),
        ({"a": 0, "b": 1}, "", {}, ValueError),
        ({"a": 0, "b": 1}, "\udcff", {}, ValueError),
        ({"a\udcff": 0, "b": 1}, "r", {}, ValueError),
        ({"a": 0, "b": 1}, "r", {"note": "\udcff"}, ValueError),
        ({"a": 0, "b": 1}, "r", {"run": "other"}, ValueError),
        ({"a": 0, "b": 1}, "r", {"not a label": 1}, ValueError),
    ],
)
def test_labels_that_would_break_the_endpoint_are_refused(policy, aggregator, heads, run, info, error):
    heads = {name: [policy.trunk, policy.value][index] for name, index in heads.items()}
    optimizer = adam(policy)
    with pytest.raises(error):
        GradientMonitor(heads, run, info=info, aggregator=aggregator).attach(optimizer)
    assert not aggregator.snapshot.runs and not optimizer._optimizer_step_pre_hooks


def test_training_is_bit_identical_with_and_without(policy, aggregator):
    observed, plain = policy, copy.deepcopy(policy)
    optimizer = adam(observed)
    monitor_of(observed, aggregator, before_clipping=True, global_norm=True).attach(optimizer)
    torch.manual_seed(5)
    train(observed, optimizer, 200, clip=0.5)
    after = torch.rand(1)
    torch.manual_seed(5)
    train(plain, adam(plain), 200, clip=0.5)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(observed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_attached_is_an_error_that_names_the_head(policy, aggregator):
    def attach(heads, optimizer=None):
        # The same name every time: what could not be attached leaves nothing behind.
        return GradientMonitor(heads, "r", aggregator=aggregator).attach(optimizer or adam(policy))

    with pytest.raises(ValueError, match="the optimizer does not own a parameter of head 'right'"):
        without_right = [p for n, p in policy.named_parameters() if "right" not in n]
        attach(heads_from(policy, r"heads\.(\w+)"), torch.optim.SGD(without_right, lr=0.1))
    with pytest.raises(ValueError, match="'a' and 'b' share a parameter"):
        attach({"a": policy.trunk, "b": policy.trunk})
    with pytest.raises(ValueError, match="head 'a' has no parameters"):
        attach({"a": [], "b": policy.trunk})
    with pytest.raises(ValueError, match="there are no heads"):
        attach({})
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer, got Policy"):
        attach({"a": policy.trunk, "b": policy.value}, policy)
    with pytest.raises(
        ValueError, match=r"no module of Policy matches head\\.\(\\w\+\); there are trunk, heads, heads.left"
    ):
        heads_from(policy, r"head\.(\w+)")
    monitor = attach({"a": policy.trunk, "b": policy.value})
    with pytest.raises(RuntimeError, match="attached already"):
        monitor.attach(adam(policy))


def test_detaching_publishes_what_was_measured_and_closing_frees_the_name(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    train(policy, optimizer, 3)
    monitor.detach()
    train(policy, optimizer, 3)
    assert sum(quality(aggregator).steps_by_level.values()) == 3
    monitor.attach(optimizer)
    train(policy, optimizer, 2)
    monitor.close()
    assert not aggregator.snapshot.runs and not optimizer._optimizer_step_pre_hooks
    monitor_of(policy, aggregator).close()


def samples(url: str, name: str) -> dict[str, float]:
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    return {s.labels["run"]: s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == name}


def test_monitors_share_one_endpoint_which_closes_with_the_last_one(policy, aggregator, tmp_path):
    other = Policy(1)
    with monitor_of(policy, aggregator, "a", window_steps=1) as first:
        with monitor_of(other, aggregator, "b", window_steps=1) as second:
            url = first.serve(port=0, targets_dir=tmp_path)
            port = int(url.split(":")[2].split("/")[0])
            assert second.serve(port=port, targets_dir=tmp_path) == url
            for monitor, model in ((first, policy), (second, other)):
                optimizer = adam(model)
                monitor.attach(optimizer)
                train(model, optimizer, 2 if model is policy else 3)
            assert samples(url, "ppo_updates_total") == {"a": 2.0, "b": 3.0}
            (target_file,) = tmp_path.iterdir()
            assert '"run": "a,b"' in target_file.read_text()
            with pytest.raises(ValueError, match="run 'a' is registered already"):
                monitor_of(policy, aggregator, "a").attach(adam(policy))
        assert samples(url, "ppo_updates_total") == {"a": 2.0}
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError):
        samples(url, "ppo_updates_total")


def test_a_run_that_crashes_beside_another_stays_to_be_seen_stalled_until_it_begins_again(policy, aggregator, tmp_path):
    optimizer = adam(policy)
    first, second = (monitor_of(policy, aggregator, name, window_steps=1) for name in ("a", "b"))
    second.attach(optimizer)
    second.serve(port=0, targets_dir=tmp_path)
    port = next(iter(second._served)).server.port
    with pytest.raises(ZeroDivisionError), first:
        first.attach(optimizer)
        first.serve(port=port, targets_dir=tmp_path)
        train(policy, optimizer, 1)
        1 / 0
    assert set(aggregator.snapshot.runs) == {"a", "b"}
    assert '"run": "b,a"' in next(tmp_path.glob("*.json")).read_text()
    again = monitor_of(policy, aggregator, "a").attach(optimizer)
    assert aggregator.snapshot.runs["a"].updates == 0
    again.close()
    second.close()
    assert aggregator.snapshot.runs == {}


def test_a_run_that_begins_again_after_an_exception_replaces_the_target_file_that_it_left(policy, tmp_path):
    paths = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), monitor_of(policy, RunAggregator(), "a").attach(adam(policy)) as monitor:
            monitor.serve(port=0, targets_dir=tmp_path)
            paths.append(next(path for path in tmp_path.iterdir() if path not in paths))
            1 / 0
        assert list(tmp_path.iterdir()) == [paths[-1]]
    with monitor_of(policy, RunAggregator(), "a").attach(adam(policy)) as monitor:
        monitor.serve(port=0, targets_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_at_two_ports_and_one_that_comes_back_to_one_keep_their_target_files(policy, aggregator, tmp_path):
    host = monitor_of(policy, aggregator, "host").attach(adam(policy))
    port = int(host.serve(port=0).split(":")[2].split("/")[0])
    for _ in range(2):
        with monitor_of(policy, aggregator, "a").attach(adam(policy)) as monitor:
            monitor.serve(port=port, targets_dir=tmp_path)
            monitor.serve(port=0, targets_dir=tmp_path)
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == []
    host.close()


def test_an_interrupt_while_a_target_file_is_removed_leaves_it_to_the_next_run(policy, monkeypatch, tmp_path):
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    for is_interrupted in (True, False):
        monitor = monitor_of(policy, RunAggregator(), "a").attach(adam(policy))
        monitor.serve(port=0, targets_dir=tmp_path)
        if is_interrupted:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(TargetFile, "discard", interrupted)
                monitor.close()
            assert len(list(tmp_path.iterdir())) == 1
        monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_that_is_interrupted_and_called_again_takes_nothing_from_others(policy, aggregator, monkeypatch):
    optimizer = adam(policy)
    first, second = (monitor_of(policy, aggregator, name).attach(optimizer) for name in ("a", "b"))
    second.serve(port=0)
    server = next(iter(second._served)).server
    first.serve(port=server.port, pushgateway="http://127.0.0.1:9")

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.monitor.push_final_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.close()
    first.close()
    assert urllib.request.urlopen(server.url).status == 200
    assert set(aggregator.snapshot.runs) == {"b"}
    second.close()


def test_an_interrupt_while_the_last_window_is_awaited_leaves_nothing_open(policy, aggregator, monkeypatch, tmp_path):
    monitor = monitor_of(policy, aggregator).attach(adam(policy))
    url = monitor.serve(port=0, targets_dir=tmp_path, textfile_dir=tmp_path)

    def interrupted(**given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monitor.close()
    assert list(tmp_path.iterdir()) == [] and aggregator.snapshot.runs == {}
    with pytest.raises(OSError):
        urllib.request.urlopen(url)


def test_an_endpoint_that_cannot_be_had_whole_is_not_had_at_all(policy, aggregator, tmp_path):
    monitor = monitor_of(policy, aggregator).attach(adam(policy))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError):
        monitor.serve(port=0, targets_dir=tmp_path / "targets", textfile_dir=tmp_path / "file")
    assert list((tmp_path / "targets").iterdir()) == [] and monitor._served == []
    monitor.close()


def test_a_forked_child_that_leaves_takes_nothing_along(policy, aggregator, tmp_path):
    with monitor_of(policy, aggregator).attach(adam(policy)) as monitor:
        monitor.serve(port=0, targets_dir=tmp_path, textfile_dir=tmp_path)
        child = os.fork()
        if child == 0:
            try:
                monitor.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".prom", ".lock"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shares", [False, True], ids=["its aggregator", "the parent's aggregator"])
def test_a_forked_child_serves_its_own_runs_on_a_port_of_its_own(policy, aggregator, shares):
    given = {"aggregator": aggregator} if shares else {}
    with GradientMonitor(dict(policy.heads), "a", **given).attach(adam(policy)) as monitor:
        url = monitor.serve(port=0)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                own = GradientMonitor(dict(policy.heads), "b", **given).attach(adam(policy))
                with pytest.raises(OSError, match="Address already in use"):
                    own.serve(port=int(url.split(":")[2].split("/")[0]))
                text = urllib.request.urlopen(own.serve(port=0)).read().decode()
                code = int('run="b"' not in text or ('run="a"' in text) != shares)
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_unknown_signal_is_refused_with_the_nearest_one(policy, aggregator):
    monitor = monitor_of(policy, aggregator)
    with pytest.raises(TypeError, match="no signal 'aprox_kl'; did you mean approx_kl"):
        monitor.record(aprox_kl=0.1)
    with pytest.raises(TypeError, match="no signal 'gradient_cv'"):
        monitor.record(gradient_cv=0.1)
    with pytest.raises(TypeError, match="policy_loss must be a number"):
        monitor.record(policy_loss="low")
    with pytest.raises(ValueError, match="environment_steps must be >= 0"):
        monitor.record(episodes=3, environment_steps=-9)
    assert monitor._increments == {}


@pytest.mark.parametrize("before_clipping", [False, True])
def test_an_error_inside_never_stops_training(aggregator, caplog, before_clipping):
    """Sparse gradients are a kind that cannot be measured."""
    embedding, layer = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)
    optimizer = torch.optim.SGD([*embedding.parameters(), *layer.parameters()], lr=0.1)
    heads = {"sparse": embedding, "dense": layer}
    monitor = GradientMonitor(heads, "r", window_steps=2, before_clipping=before_clipping, aggregator=aggregator)
    monitor.attach(optimizer)
    before = embedding.weight.detach().clone()
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            optimizer.zero_grad()
            layer(embedding(torch.arange(4))).square().mean().backward()
            optimizer.step()
    assert not torch.equal(before, embedding.weight)
    # Twice a step where it is tried twice: after backward, and at the step.
    assert aggregator.snapshot.runs["r"].exporter_errors == 5 * (1 + before_clipping)
    assert caplog.text.count("training goes on") == 1


def test_too_few_heads_are_pointed_out(policy, aggregator, caplog):
    with caplog.at_level(logging.WARNING):
        heads = {name: policy.heads[name] for name in HEADS[:3]}
        GradientMonitor(heads, "three", aggregator=aggregator).attach(adam(policy))
    assert "3 heads: CV cannot exceed 1.732; critical at 2.0 can never be reached" in caplog.text


def test_half_precision_gradients_are_measured_in_single_precision(aggregator):
    torch.manual_seed(0)
    heads = {name: nn.Linear(64, 64).to(torch.bfloat16) for name in ("a", "b")}
    optimizer = torch.optim.SGD([p for head in heads.values() for p in head.parameters()], lr=0.1)
    GradientMonitor(heads, "half", window_steps=1, aggregator=aggregator).attach(optimizer)
    for head in heads.values():
        for parameter in head.parameters():
            parameter.grad = torch.randn_like(parameter)
    expected = {n: math.sqrt(sum(p.grad.double().square().sum() for p in h.parameters())) for n, h in heads.items()}
    optimizer.step()
    assert quality(aggregator, "half").head_norms == pytest.approx(expected, rel=1e-5)


def test_memory_stays_flat(policy, aggregator):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=16, before_clipping=True).attach(optimizer)
    train(policy, optimizer, 64)
    tracemalloc.start()
    train(policy, optimizer, 64)
    base, _ = tracemalloc.get_traced_memory()
    train(policy, optimizer, 640)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Ten norms of 640 steps, if they were kept, would be some 500 kB of tensors.
    assert grown - base < 100_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_attached_step_does_not_synchronize_on_cuda(policy, aggregator):
    policy = policy.cuda()
    optimizer = adam(policy, fused=True)
    monitor = monitor_of(policy, aggregator, window_steps=4, global_norm=True).attach(optimizer)
    inputs = torch.randn(8, 6, device="cuda")
    policy.loss(inputs).backward()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            optimizer.zero_grad()
            policy.loss(inputs).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monitor.detach()
    run = aggregator.snapshot.runs["walker-17"]
    assert run.exporter_errors == 0 and sum(run.gradient_quality.steps_by_level.values()) == 41
