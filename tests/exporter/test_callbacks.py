"""What a user hands to a monitor: callbacks, and signals under names of their own."""

import logging

import pytest
import torch
from three_heads import HEADS, backward, run_of, sgd, three_heads
from torch import nn

from exporter import GradientMonitor, HealthLevel, RunAggregator


@pytest.fixture
def heads() -> nn.ModuleDict:
    return three_heads()


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


def test_callbacks_get_every_update_and_every_change_of_level(heads, aggregator, caplog):
    logged, levels = [], []
    optimizer = sgd(heads)
    monitor = GradientMonitor(
        heads,
        "r",
        aggregator=aggregator,
        on_update=lambda run: logged.append(run.scalars() | {"updates": run.updates}),
        on_level=lambda level, run: levels.append((level, run.run)),
    ).attach(optimizer)
    for update in range(4):
        backward(heads, bad="left" if update == 2 else None)
        if update == 2:
            weights = [parameter.detach().clone() for parameter in heads.parameters()]
        optimizer.step()
        if update == 2:
            with torch.no_grad():
                for parameter, before in zip(heads.parameters(), weights):
                    parameter.copy_(before)
        monitor.update_completed(policy_loss=update, signals={"kl_coef": torch.tensor(0.5)})
    assert [entry["updates"] for entry in logged] == [1, 2, 3, 4]
    assert logged[-1]["gradient/cv"] == run_of(aggregator).gradient_quality.gradient_cv
    assert sum(logged[-1][f"gradient/share/{head}"] for head in HEADS) == pytest.approx(1.0)
    assert (logged[-1]["policy_loss"], logged[-1]["kl_coef"]) == (3.0, 0.5)
    assert (
        levels == [(HealthLevel.CRITICAL, "r"), (HealthLevel.HEALTHY, "r")] and "training continues" not in caplog.text
    )


def test_a_callback_that_fails_stops_nothing(heads, aggregator, caplog):
    def fail(run) -> None:
        raise ConnectionError("no logger there")

    optimizer = sgd(heads)
    GradientMonitor(heads, "r", window_steps=1, on_update=fail, aggregator=aggregator).attach(optimizer)
    for _ in range(2):
        backward(heads)
        optimizer.step()
    assert (run_of(aggregator).updates, run_of(aggregator).exporter_errors) == (2, 2)
    assert caplog.text.count("training continues") == 1


def test_signals_have_names_of_their_own(heads, aggregator, caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(heads)
    monitor = GradientMonitor(heads, "r", aggregator=aggregator).attach(optimizer)
    monitor.record(signals={"kl_coef": 0.1, "sigma": 2})
    monitor.record(signals={"sigma": None, "reward_scale": 3.0})
    for wrong, error in (({"a": "low"}, TypeError), ({"": 1.0}, ValueError), ({3: 1.0}, TypeError)):
        with pytest.raises(error):
            monitor.record(signals=wrong, episodes=1)
    backward(heads)
    optimizer.step()
    monitor.update_completed()
    assert run_of(aggregator).other_signals == {"kl_coef": 0.1, "reward_scale": 3.0}
    assert run_of(aggregator).episodes == 0
