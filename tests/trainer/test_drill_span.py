"""The span of a drill: in updates, in seconds of training, or while a file exists."""

import time

import pytest

from trainer.drill import Drill
from trainer.policy import ActorCritic

HEADS = {"slot": 3, "alpha": 2, "op": 5}


def heads_without_gradient(drill: Drill, update: int) -> set[str]:
    policy = ActorCritic(6, HEADS, 16)
    policy.flat.grad.fill_(1.0)
    drill.bend(policy, update)
    return {
        head
        for head, rows_of_head in policy.head_rows.items()
        if all((rows.parameter.grad[rows.start : rows.stop] == 0).all() for rows in rows_of_head)
    }


def test_a_span_of_updates_includes_both_ends_and_nothing_else():
    drill = Drill.parse("dominate:op:2-3")
    bent = [heads_without_gradient(drill, update) for update in (1, 2, 3, 4)]
    assert bent == [set(), {"slot", "alpha"}, {"slot", "alpha"}, set()]


def test_a_span_in_seconds_counts_from_when_training_began_whatever_the_update():
    ahead, now, over = map(Drill.parse, ("starve:op:600s-601s", "starve:op:0s-600s", "starve:op:0s-0.05s"))
    time.sleep(0.06)
    assert [heads_without_gradient(drill, 1000) for drill in (ahead, now, over)] == [set(), {"op"}, set()]


def test_a_fault_may_last_while_a_file_exists(tmp_path):
    file = tmp_path / "12:30" / "critical"
    file.parent.mkdir()
    drill = Drill.parse(f"starve:op:@{file}")
    before = heads_without_gradient(drill, 1)
    file.touch()
    during = heads_without_gradient(drill, 2)
    file.unlink()
    assert [before, during, heads_without_gradient(drill, 3)] == [set(), {"op"}, set()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan:op:10-130s", "a span of updates such as dominate:op:20-60 or of seconds such as dominate:op:10s-130s"),
        ("nan:op:1.5-2", "expected KIND:HEAD:FIRST-LAST"),
        ("nan:op:-5s-7s", "expected KIND:HEAD:FIRST-LAST"),
        ("nan:op:1m-2m", "expected KIND:HEAD:FIRST-LAST"),
        ("nan:op:@", "or KIND:HEAD:@FILE, got 'nan:op:@'"),
        ("nan:op:5s-5s", "seconds 5s-5s are no span: FIRST must be before LAST"),
        ("nan:op:0-3", "updates 0-3 are no span: they count from 1"),
        ("nan:op:4-3", "FIRST must not be after LAST"),
    ],
)
def test_an_impossible_span_says_what_is_expected(text, message):
    with pytest.raises(ValueError, match=message):
        Drill.parse(text)
