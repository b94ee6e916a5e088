"""`watch()` on an existing trainer: wrappers, several optimizers, timed updates."""

import copy
import math
import socket
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import exporter
from exporter import GradientMonitor, RunAggregator, heads_from
from exporter.link import DEFAULT_PORT


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def heads() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(4, 2) for name in ("left", "right")})


def backward(heads: nn.ModuleDict) -> dict[str, float]:
    """The norms of its heads."""
    heads.zero_grad()
    sum((index + 1) * head(torch.randn(8, 4)).square().mean() for index, head in enumerate(heads.values())).backward()
    return {n: torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item() for n, head in heads.items()}


def norms(aggregator: RunAggregator, run: str = "r") -> dict[str, float]:
    return aggregator.snapshot.runs[run].gradient_quality.head_norms


def test_one_call_attaches_serves_and_measures_before_clipping(heads, aggregator, tmp_path):
    optimizer = torch.optim.Adam(heads.parameters())
    with exporter.watch(optimizer, heads, "r", aggregator=aggregator, targets_dir=tmp_path) as monitor:
        with monitor.update(environment_steps=512) as update:
            expected = backward(heads)
            nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
            optimizer.step()
            update.record(policy_loss=0.25)
        run = aggregator.snapshot.runs["r"]
        assert run.gradient_quality.head_norms == pytest.approx(expected, rel=1e-5)
        assert (run.updates, run.environment_steps, run.signals) == (1, 512, {"policy_loss": 0.25})
        assert 0 < run.update_duration_seconds.total < 10
        with pytest.raises(ZeroDivisionError), monitor.update(environment_steps=1):
            backward(heads)
            optimizer.step()
            raise ZeroDivisionError
        assert aggregator.snapshot.runs["r"].updates == 1
    assert not aggregator.snapshot.runs and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="must be the URL of a Pushgateway"):
        exporter.watch(optimizer, heads, "r", aggregator=aggregator, pushgateway="gateway")
    assert not aggregator.snapshot.runs


def test_a_port_that_is_taken_ends_no_training_and_a_targets_folder_asks_for_none(heads, tmp_path, caplog):
    def port_of(url: str) -> int:
        return int(url.split(":")[2].split("/")[0])

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier listener may linger
        try:
            other.bind(("127.0.0.1", DEFAULT_PORT))
            other.listen()
        except OSError:
            pass  # somebody has it already, which is as good
        monitors = [
            GradientMonitor(heads, name, aggregator=RunAggregator()).attach(torch.optim.SGD(heads.parameters(), lr=0.1))
            for name in "ab"
        ]
        assert [monitor.url for monitor in monitors] == [None, None]
        first, second = (monitor.serve() for monitor in monitors)
        assert [monitor.url for monitor in monitors] == [first, second]
        assert DEFAULT_PORT not in (port_of(first), port_of(second)) and first != second
        assert caplog.text.count(f"port {DEFAULT_PORT} is in use") == 2
        for monitor in monitors:
            monitor.close()
        assert [monitor.url for monitor in monitors] == [None, None]
    aggregator = RunAggregator()
    monitors = [
        GradientMonitor(heads, name, aggregator=aggregator).attach(torch.optim.SGD(heads.parameters(), lr=0.1))
        for name in "ab"
    ]
    first, second = (monitor.serve(targets_dir=tmp_path) for monitor in monitors)
    assert first == second and port_of(first) != DEFAULT_PORT
    assert b'run="b"' in urllib.request.urlopen(first, timeout=10).read()
    for monitor in monitors:
        monitor.close()


def test_heads_of_several_optimizers_are_one_step(heads, aggregator):
    optimizers = [torch.optim.SGD(head.parameters(), lr=0.1) for head in heads.values()]
    GradientMonitor(heads, "r", window_steps=2, aggregator=aggregator).attach(optimizers)
    for _ in range(4):
        expected = backward(heads)
        for optimizer in optimizers:
            optimizer.step()
    run = aggregator.snapshot.runs["r"]
    assert run.updates == 2 and set(norms(aggregator)) == {"left", "right"}
    assert sum(run.gradient_quality.steps_by_level.values()) == 4
    assert expected["left"] > 0


def test_lists_of_heads_and_names_behind_wrappers(heads, aggregator):
    model = nn.Module()
    model.heads = heads
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module.add_module("_orig_mod", model)  # DistributedDataParallel of torch.compile
    assert set(heads_from(wrapped, r"heads\.(\w+)")) == {"left", "right"}
    assert set(heads_from(wrapped, r"module\._orig_mod\.heads\.(\w+)")) == {"left", "right"}
    monitor = GradientMonitor(nn.ModuleList(heads.values()), "r", window_steps=1, aggregator=aggregator)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    monitor.attach(optimizer)
    backward(heads)
    optimizer.step()
    assert set(norms(aggregator)) == {"head_0", "head_1"}


def test_a_head_may_be_of_several_modules_or_of_an_iterator(heads, aggregator):
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    both = {"arm": list(heads.values())}
    GradientMonitor(both, "r", window_steps=1, aggregator=aggregator).attach(optimizer)
    by_iterator = {name: head.parameters() for name, head in heads.items()}
    monitor = GradientMonitor(by_iterator, "s", window_steps=1, aggregator=aggregator).attach(optimizer)
    monitor.detach()
    monitor.attach(optimizer)
    expected = backward(heads)
    optimizer.step()
    assert norms(aggregator) == pytest.approx({"arm": math.hypot(*expected.values())})
    assert norms(aggregator, "s") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (nn.Linear(4, 2), r"heads must be a mapping .* got Linear; space_heads\(\)"),
        (None, "got NoneType"),
        ("heads", "got str"),
        ({"arm": "heads"}, "head 'arm' must be modules, parameters or Rows; it contains 'h'"),
        ({"arm": 3}, "it contains 3"),
    ],
)
def test_what_is_no_head_is_refused_with_the_way_out(heads, wrong, message):
    with pytest.raises(TypeError, match=message):
        exporter.watch(torch.optim.SGD(heads.parameters(), lr=0.1), wrong, "r", aggregator=RunAggregator())


def test_what_is_copied_from_an_agent_that_keeps_its_monitor_is_not_measured(heads, aggregator):
    agent = SimpleNamespace(heads=heads, optimizer=torch.optim.Adam(heads.parameters()))
    agent.monitor = GradientMonitor(heads, "r", window_steps=1, before_clipping=True, aggregator=aggregator)
    agent.monitor.attach(agent.optimizer)
    copied = copy.deepcopy(agent)
    for each in (agent, copied):
        backward(each.heads)
        each.optimizer.step()
    assert copied.monitor is agent.monitor and aggregator.snapshot.runs["r"].updates == 1


class Sam(torch.optim.Optimizer):
    """Sharpness-aware: its users call `second_step()`, not `step()`."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    def second_step(self) -> None:
        self.base_optimizer.step()


@pytest.mark.parametrize("attribute", ["optimizer", "_optim"])
def test_wrappers_that_are_no_optimizers_are_looked_through(heads, aggregator, attribute):
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    wrapper = SimpleNamespace(**{attribute: optimizer})
    GradientMonitor(heads, "r", window_steps=1, aggregator=aggregator).attach(SimpleNamespace(optimizer=wrapper))
    expected = backward(heads)
    optimizer.step()
    assert norms(aggregator) == pytest.approx(expected, rel=1e-5)


def test_the_optimizer_inside_another_is_the_one_that_steps(heads, aggregator):
    sam = Sam(heads.parameters())
    GradientMonitor(heads, "r", window_steps=1, aggregator=aggregator).attach(sam)
    expected = backward(heads)
    sam.second_step()
    assert norms(aggregator) == pytest.approx(expected, rel=1e-5)


def test_what_is_no_optimizer_is_named_with_its_module(heads, aggregator):
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got types\.SimpleNamespace; pass the"):
        GradientMonitor(heads, "r", aggregator=aggregator).attach(SimpleNamespace(inner=1))


@pytest.mark.parametrize("before_clipping", [False, True])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_gradients_that_are_averaged_by_hand_are_measured_when_they_are_ready(
    heads, aggregator, before_clipping, is_scaled
):
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=is_scaled)
    options = dict(before_clipping=before_clipping, grad_scaler=scaler, aggregator=aggregator)
    monitor = GradientMonitor(heads, "r", window_steps=1, **options).attach(optimizer)
    expected = {name: norm / 2 for name, norm in backward(heads).items()}
    for parameter in heads.parameters():
        parameter.grad.mul_(0.5 * scaler.get_scale())
    monitor.gradients_ready()
    scaler.scale(torch.zeros(()))  # as of a loss
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
    scaler.step(optimizer)
    assert norms(aggregator) == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(aggregator.snapshot.runs["r"].gradient_quality.gradient_cv)
