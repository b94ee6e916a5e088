"""Heads of a fused layer, by the action space."""

import logging
from types import SimpleNamespace

import pytest
import torch
from gymnasium import spaces
from torch import nn

from exporter import GradientMonitor, RunAggregator, space_heads


def rows_of(heads: dict) -> dict[str, tuple[int, int]]:
    return {name: (rows[0].start, rows[0].stop) for name, rows in heads.items()}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Discrete(4), {"action": (0, 4)}),
        (spaces.MultiDiscrete([3, 2]), {"action_0": (0, 3), "action_1": (3, 5)}),
        (
            spaces.MultiDiscrete([[3, 2], [2, 2]]),
            {f"action_{i}": r for i, r in enumerate([(0, 3), (3, 5), (5, 7), (7, 9)])},
        ),
        (spaces.MultiBinary(2), {"action_0": (0, 1), "action_1": (1, 2)}),
        (spaces.Box(-1, 1, (2,)), {"action_0": (0, 1), "action_1": (1, 2)}),
        (
            spaces.Dict({"move": spaces.Discrete(4), "aim": spaces.MultiDiscrete([3, 2])}),
            {"aim_0": (0, 3), "aim_1": (3, 5), "move": (5, 9)},
        ),
        (
            spaces.Tuple([spaces.Discrete(2), spaces.Dict({"arm": spaces.Box(-1, 1, (2,))})]),
            {"action_0": (0, 2), "action_1_arm_0": (2, 3), "action_1_arm_1": (3, 4)},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_parts_of_an_action_are_heads_in_its_order(space, expected):
    layer = nn.Linear(6, max(stop for _, stop in expected.values()))
    heads = space_heads(layer, space)
    assert rows_of(heads) == expected
    assert all(rows[0].parameter is layer.weight and rows[1].parameter is layer.bias for rows in heads.values())


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
@pytest.mark.parametrize("width", [4, 6000])
def test_a_joint_has_its_row_of_the_mean_and_its_entry_of_the_log_std(shape, width):
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    log_std = nn.Parameter(torch.zeros(shape))
    heads = space_heads(actor, spaces.Box(-1, 1, (3,)), ["hip", "knee", "foot"], log_std=log_std)
    optimizer = torch.optim.SGD([*actor.parameters(), log_std], lr=0.1)
    aggregator = RunAggregator()
    GradientMonitor(heads, "r", window_steps=1, aggregator=aggregator).attach(optimizer)
    torch.distributions.Normal(actor(torch.randn(8, 4)), log_std.flatten().exp()).log_prob(
        torch.ones(8, 3)
    ).sum().backward()
    layer = actor[-1]
    expected = {
        name: torch.cat([layer.weight.grad[i], layer.bias.grad[i : i + 1], log_std.grad.flatten()[i : i + 1]])
        .norm()
        .item()
        for i, name in enumerate(["hip", "knee", "foot"])
    }
    optimizer.step()
    assert aggregator.snapshot.runs["r"].gradient_quality.head_norms == pytest.approx(expected, rel=1e-5)


def test_rows_of_standard_deviations_are_behind_those_of_the_means_of_their_box():
    space = spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Discrete(3), spaces.Box(-1, 1, (1,))])
    heads = space_heads(nn.Linear(4, 9, bias=False), space, std_rows=True)
    pieces = {name: [(rows.start, rows.stop) for rows in head] for name, head in heads.items()}
    assert pieces == {
        **{"action_0_0": [(0, 1), (2, 3)], "action_0_1": [(1, 2), (3, 4)]},
        **{"action_1": [(4, 7)], "action_2_0": [(7, 9)]},
    }


def test_a_single_log_std_is_the_heads_where_there_is_one_dimension_and_nobodys_where_all_share_it():
    log_std = torch.zeros(1)
    for size, expected in ((1, {"action_0": 3}), (2, {"action_0": 2, "action_1": 2})):
        heads = space_heads(nn.Linear(4, size), spaces.Box(-1, 1, (size,)), log_std=log_std)
        assert {name: len(rows) for name, rows in heads.items()} == expected


def test_a_single_choice_is_no_head_and_the_log_says_so(caplog):
    space = spaces.MultiDiscrete([3, 1, 2])
    with caplog.at_level(logging.INFO):
        assert rows_of(space_heads(nn.Linear(4, 6), space, ["a", "b", "c"])) == {"a": (0, 3), "c": (4, 6)}
    assert caplog.messages == ["left out of the heads, because they have a single choice: b"]
    with pytest.raises(ValueError, match="nothing to measure"):
        space_heads(nn.Linear(4, 1), spaces.Discrete(1))


def test_other_libraries_spaces_will_do():
    class Discrete(SimpleNamespace):
        pass

    assert rows_of(space_heads(nn.Linear(4, 5), Discrete(n=5))) == {"action": (0, 5)}


@pytest.mark.parametrize(
    ("space", "options", "error", "message"),
    [
        (spaces.Discrete(4), {}, ValueError, r"weight has 5 rows, but the action space Discrete\(4\) makes 4"),
        (spaces.MultiDiscrete([3, 2]), {"names": ["a"]}, ValueError, "the action has 2 parts"),
        (spaces.MultiDiscrete([3, 2]), {"names": "ab"}, ValueError, "the action has 2 parts"),
        (spaces.MultiDiscrete([3, 2]), {"names": ["a", "a"]}, ValueError, "distinct names"),
        (spaces.Text(5), {}, TypeError, "the action space Text has no heads"),
        (spaces.Box(-1, 1, (5,)), {"log_std": torch.zeros(4)}, ValueError, r"log_std has the shape \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(space, options, error, message):
    with pytest.raises(error, match=message):
        space_heads(nn.Linear(4, 5), space, **options)
