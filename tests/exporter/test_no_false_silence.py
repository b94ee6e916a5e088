"""Bad gradients, or a lack of gradients, are reported in every case that could hide them. Causes are real."""

import math

import pytest
import torch
from prometheus_client import generate_latest
from three_heads import HEADS, backward, run_of, sgd, three_heads
from torch import nn
from torch.func import functional_call, grad

from exporter import GradientMonitor, HealthLevel, RunAggregator
from exporter.collectors import build_registry
from exporter.health import STALLED_SECONDS
from exporter.serving.state import State
from exporter.serving.status import StatusPage


@pytest.fixture
def heads() -> nn.ModuleDict:
    return three_heads()


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


def steps(aggregator: RunAggregator) -> int:
    return sum(run_of(aggregator).gradient_quality.steps_by_level.values())


def page(aggregator: RunAggregator) -> str:
    """The status page."""
    state = State({})
    state.take(aggregator.snapshot.plain(), {})
    return StatusPage(state).answer()[2].decode()


@pytest.mark.parametrize("width", [4, 6000])
def test_a_gradient_that_is_not_finite_is_said_before_its_window_ends_and_counted_once(
    aggregator, clock, caplog, width
):
    heads = nn.ModuleDict({name: nn.Linear(4, width) for name in HEADS})
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", window_steps=None, before_clipping=True, aggregator=aggregator)
    monitor.attach(optimizer)
    for step in range(1, 8):
        clock.now += 0.2
        backward(heads, bad="middle" if step in (5, 6) else None)
        nn.utils.clip_grad_norm_(heads.parameters(), 0.5)
        with torch.no_grad():
            weights = [parameter.clone() for parameter in heads.parameters()]
        optimizer.step()
        with torch.no_grad():  # so that the next step is a good one
            for parameter, before in zip(heads.parameters(), weights):
                parameter.copy_(before)
        is_bad = step >= 5
        assert run_of(aggregator).gradient_quality.health is (HealthLevel.CRITICAL if is_bad else HealthLevel.HEALTHY)
        assert caplog.text.count("head middle is NaN or infinite at gradient step 5") == is_bad
    assert run_of(aggregator).updates == 0
    for _ in range(2):
        assert run_of(aggregator).gradient_quality.nonfinite_steps == {"left": 0, "middle": 2, "right": 0}
        monitor.update_completed()
    assert run_of(aggregator).updates == 1 and run_of(aggregator).gradient_quality.gradient_cv == math.inf
    assert caplog.text.count("NaN or infinite") == 1


def test_a_trunk_that_is_not_finite_is_said_where_it_is_measured(heads, aggregator, caplog):
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "heads": heads})
    optimizer = sgd(model)
    GradientMonitor(heads, "r", window_steps=None, global_norm=True, aggregator=aggregator).attach(optimizer)
    backward(heads)
    (model["trunk"](torch.randn(8, 4)).mean() * math.nan).backward()
    optimizer.step()
    assert "the gradient of parameters of no head is NaN or infinite at gradient step 1" in caplog.text
    assert run_of(aggregator).gradient_quality.gradient_cv == math.inf


def test_a_run_before_its_first_window_is_not_shown_as_stable(heads, aggregator):
    optimizer = sgd(heads)
    GradientMonitor(heads, "r", window_steps=None, before_clipping=True, aggregator=aggregator).attach(optimizer)
    assert "No update yet" in page(aggregator) and ">CV:0.000 stable<" not in page(aggregator)
    backward(heads, bad="left")
    optimizer.step()
    assert ">CV:inf BAD<" in page(aggregator) and "No update yet</" not in page(aggregator).split("<figure>")[0]


def repairing(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    for parameter in heads.parameters():
        parameter.grad.nan_to_num_()
    optimizer.step()


def skipping(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    if torch.isfinite(nn.utils.clip_grad_norm_(heads.parameters(), 0.5)):
        optimizer.step()


def stopping(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    """Takes no step, and it may be long until its next backward pass."""


@pytest.mark.parametrize("width", [4, 6000])
@pytest.mark.parametrize(("step", "counted"), [(repairing, 1), (skipping, 0), (stopping, 0)])
def test_the_first_one_is_said_at_once_everywhere_whatever_the_trainer_does_with_it(
    aggregator, caplog, step, counted, width
):
    heads = nn.ModuleDict({name: nn.Linear(4, width) for name in HEADS})
    optimizer, levels = sgd(heads), []
    monitor = GradientMonitor(
        *(heads, "r"),
        window_steps=None,
        before_clipping=True,
        on_level=lambda level, run: levels.append(level),
        aggregator=aggregator,
    ).attach(optimizer)
    for number in range(1, 8):
        backward(heads, bad="middle" if number == 7 else None)
        if number < 7:
            optimizer.step()
    assert caplog.text.count("the gradient of head middle is NaN or infinite at gradient step 7") == 1
    assert levels == [HealthLevel.CRITICAL] and ">CV:inf BAD<" in page(aggregator)
    step(heads, optimizer)
    served = generate_latest(build_registry(aggregator)).decode()
    assert 'ppo_gradient_cv{health="critical",run="r"} +Inf' in served
    assert f'ppo_nonfinite_gradients_total{{head="middle",run="r"}} {counted}.0' in served
    # A step that was skipped is known as such when the next one comes.
    for _ in range(2):
        backward(heads)
        optimizer.step()
    assert run_of(aggregator).gradient_quality.nonfinite_steps == {"left": 0, "middle": 1, "right": 0}
    monitor.update_completed()
    assert run_of(aggregator).gradient_quality.nonfinite_steps == {"left": 0, "middle": 1, "right": 0}
    assert run_of(aggregator).gradient_quality.skipped_steps == 1 - counted
    assert caplog.text.count("NaN or infinite") == 1


@pytest.mark.parametrize("is_enabled", [True, False])
def test_an_overflow_that_a_scaler_gives_up_is_not_said_unless_it_is_switched_off(
    heads, aggregator, caplog, is_enabled
):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=is_enabled), sgd(heads)
    GradientMonitor(heads, "r", before_clipping=True, grad_scaler=scaler, aggregator=aggregator).attach(optimizer)
    scaler.scale(heads["left"](torch.full((8, 4), 1e38)).mean() * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert ("NaN or infinite" in caplog.text) is not is_enabled
    assert (run_of(aggregator).gradient_quality.health is HealthLevel.HEALTHY) is is_enabled


@pytest.mark.parametrize(("named", "said"), [(False, 1), (True, 0)])
def test_a_scaler_of_which_the_monitor_was_not_told_is_said_once(heads, aggregator, caplog, named, said):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), sgd(heads)
    GradientMonitor(
        heads, "r", before_clipping=True, grad_scaler=scaler if named else None, aggregator=aggregator
    ).attach(optimizer)
    for _ in range(3):
        scaler.scale(sum(head(torch.randn(8, 4)).square().mean() for head in heads.values())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert caplog.text.count("there is a GradScaler, but the monitor was given none") == said


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize(("step", "skipped"), [(repairing, 0), (skipping, 4)])
def test_gradients_that_the_trainer_repairs_or_skips_count_all_the_same(heads, aggregator, step, skipped, set_to_none):
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", window_steps=None, before_clipping=True, aggregator=aggregator)
    monitor.attach(optimizer)
    for number in range(12):
        optimizer.zero_grad(set_to_none=set_to_none)
        losses = {name: head(torch.randn(8, 4)).square().mean() for name, head in heads.items()}
        if number % 3 == 2:
            losses["right"] = losses["right"] * math.nan
        sum(losses.values()).backward()
        step(heads, optimizer)
    monitor.detach()
    quality = run_of(aggregator).gradient_quality
    assert quality.nonfinite_steps == {"left": 0, "middle": 0, "right": 4}
    assert (quality.skipped_steps, steps(aggregator)) == (skipped, 12)


def test_a_trainer_that_skips_every_step_is_seen_too(heads, aggregator):
    optimizer = sgd(heads)
    GradientMonitor(heads, "r", window_steps=4, before_clipping=True, aggregator=aggregator).attach(optimizer)
    for _ in range(9):
        backward(heads, bad="left")
        skipping(heads, optimizer)
    assert run_of(aggregator).gradient_quality.skipped_steps == 8


def test_gradients_that_are_good_and_given_up_are_no_steps(heads, aggregator):
    """A trainer that stops an update at its KL limit, after backward."""
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", before_clipping=True, aggregator=aggregator).attach(optimizer)
    for number in range(6):
        backward(heads)
        if number % 2:
            optimizer.step()
    monitor.detach()
    assert steps(aggregator) == 3


def replaced_optimizer(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    backward(heads)
    sgd(heads).step()


def replaced_heads(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    other = nn.Linear(4, 2)
    other(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def functional(heads: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    weights = dict(heads["left"].named_parameters())
    gradients = grad(lambda w: functional_call(heads["left"], w, torch.randn(8, 4)).square().mean())(weights)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter -= 0.1 * gradients[name]


@pytest.mark.parametrize("train", [replaced_optimizer, replaced_heads, functional])
@pytest.mark.parametrize("updates_before", [0, 2])
@pytest.mark.parametrize("before_clipping", [False, True])
def test_updates_without_a_step_are_said_once_counted_and_not_healthy(
    heads, aggregator, caplog, train, updates_before, before_clipping
):
    optimizer, levels = sgd(heads), []
    monitor = GradientMonitor(
        *(heads, "r"),
        before_clipping=before_clipping,
        on_level=lambda level, run: levels.append(level),
        aggregator=aggregator,
    ).attach(optimizer)
    for _ in range(updates_before):
        backward(heads)
        optimizer.step()
        monitor.update_completed(environment_steps=8)
    for _ in range(5):
        train(heads, optimizer)
        monitor.update_completed(environment_steps=8)
    run = run_of(aggregator)
    assert run.exporter_errors == 3 and run.gradient_quality.health is HealthLevel.CRITICAL
    assert caplog.text.count("no gradient step was seen in 3 updates") == 1 and levels == [HealthLevel.CRITICAL]
    backward(heads)
    optimizer.step()
    monitor.update_completed()
    assert run_of(aggregator).gradient_quality.health is HealthLevel.HEALTHY and levels[-1] is HealthLevel.HEALTHY
    assert run_of(aggregator).environment_steps == (updates_before + 5) * 8


def test_passes_whose_steps_another_optimizer_takes_are_said_without_any_word_of_the_trainer(heads, aggregator, caplog):
    GradientMonitor(heads, "r", window_steps=4, before_clipping=True, aggregator=aggregator).attach(sgd(heads))
    optimizer = sgd(heads)
    for _ in range(13):
        backward(heads)
        optimizer.step()
    assert caplog.text.count("no gradient step was seen") == 1
    assert math.isnan(run_of(aggregator).gradient_quality.gradient_cv)


def test_a_last_step_of_an_update_that_is_skipped_counts_in_that_update(heads, aggregator):
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", before_clipping=True, aggregator=aggregator).attach(optimizer)
    for _ in range(4):
        backward(heads)
        skipping(heads, optimizer)
        backward(heads, bad="left")
        skipping(heads, optimizer)
        monitor.update_completed()
        assert run_of(aggregator).gradient_quality.gradient_cv == math.inf
    assert (run_of(aggregator).updates, run_of(aggregator).gradient_quality.skipped_steps) == (4, 4)
    for _ in range(4):
        backward(heads, bad="left")
        skipping(heads, optimizer)
        monitor.update_completed()
    assert (run_of(aggregator).gradient_quality.skipped_steps, run_of(aggregator).exporter_errors) == (8, 0)


def test_steps_in_which_no_head_has_a_gradient_are_said_without_any_word_of_the_trainer(heads, aggregator, caplog):
    optimizer = sgd(heads)
    GradientMonitor(heads, "r", aggregator=aggregator).attach(optimizer)
    for _ in range(64):
        replaced_heads(heads, optimizer)
    assert "no head had a gradient in 64 gradient steps" in caplog.text
    assert run_of(aggregator).exporter_errors == 1 and math.isnan(run_of(aggregator).gradient_quality.gradient_cv)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_heads_that_are_replaced_while_the_trainer_keeps_zeros_in_their_place_are_not_healthy(
    aggregator, caplog, zero_grad
):
    """Replaced in the model, but not in the optimizer; or a loss that does not reach any head."""
    heads, levels = nn.ModuleDict({name: nn.Linear(4, 2) for name in HEADS}), []
    optimizer = sgd(heads)
    GradientMonitor(
        *(heads, "r"), window_steps=2, on_level=lambda level, run: levels.append(level), aggregator=aggregator
    ).attach(optimizer)
    for head in heads.values():
        head(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    for _ in range(11):
        if zero_grad:
            optimizer.zero_grad(set_to_none=False)  # and what is trained now is elsewhere
        else:
            heads.zero_grad()
            (sum(head(torch.randn(8, 4)).square().mean() for head in heads.values()) * 0.0).backward()
        optimizer.step()
    run = run_of(aggregator)
    assert run.gradient_quality.health is HealthLevel.CRITICAL and levels[-1] is HealthLevel.CRITICAL
    assert levels.count(HealthLevel.CRITICAL) == 1 and run.exporter_errors == 3
    assert caplog.text.count("the gradient of every head was exactly zero in 3 windows") == 1
    backward(heads)
    optimizer.step()
    backward(heads)
    optimizer.step()
    assert levels[-1] is not HealthLevel.CRITICAL and math.isfinite(run_of(aggregator).gradient_quality.gradient_cv)


def test_environment_steps_without_a_gradient_step_are_said_after_a_time(heads, aggregator, clock, caplog):
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", aggregator=aggregator).attach(optimizer)
    for _ in range(4):
        clock.now += 0.3 * STALLED_SECONDS
        functional(heads, optimizer)
        monitor.record(environment_steps=2048)
    assert caplog.text.count(f"no gradient step was seen in {1.2 * STALLED_SECONDS:.0f} s") == 1


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_head_that_nothing_trains_any_more_is_said_unless_it_is_frozen(heads, aggregator, caplog, is_frozen):
    optimizer = sgd(heads)
    GradientMonitor(heads, "r", window_steps=1, aggregator=aggregator).attach(optimizer)
    backward(heads)
    optimizer.step()
    in_use = dict(heads.items()) | {"right": nn.Linear(4, 2)}  # a mutation of the head, say
    heads["right"].requires_grad_(not is_frozen)
    for _ in range(5):
        heads.zero_grad()
        sum(head(torch.randn(8, 4)).square().mean() for head in in_use.values()).backward()
        optimizer.step()
    said = 0 if is_frozen else 1
    assert caplog.text.count("head right has had no gradient in 3 windows") == said
    assert run_of(aggregator).exporter_errors == said


def test_an_error_after_backward_never_stops_training(heads, caplog):
    class Broken(RunAggregator):
        def note_nonfinite(self, *given) -> None:
            raise OSError("no space left on device")

    aggregator, optimizer = Broken(), sgd(heads)
    GradientMonitor(heads, "r", before_clipping=True, aggregator=aggregator).attach(optimizer)
    for _ in range(3):
        backward(heads, bad="left")
    assert run_of(aggregator).exporter_errors >= 1
    assert caplog.text.count("training continues") == 1
