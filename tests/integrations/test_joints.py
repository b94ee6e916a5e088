"""Heads of a continuous policy: one for each joint."""

import pytest
import torch
from robotics import JOINTS
from torch import nn

from exporter.integrations.joints import joint_heads


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("spread", ["none", "parameter", "shared", "layer"])
def test_a_joint_is_its_rows_of_the_mean_and_of_whatever_spreads_it(rows, spread):
    mean = nn.Linear(4, rows)
    spreads = {
        "none": None,
        "parameter": nn.Parameter(torch.zeros(3)),
        "shared": nn.Parameter(torch.zeros(1)),
        "layer": nn.Linear(4, 3),
    }
    heads = joint_heads(3, mean, spreads[spread], JOINTS)
    assert list(heads) == JOINTS
    taken = [[(part.parameter, part.start) for part in head] for head in heads.values()]
    own = rows // 3 * 2 + {"none": 0, "parameter": 1, "shared": 0, "layer": 2}[spread]
    assert [len(parts) for parts in taken] == [own] * 3
    assert all(row % 3 == joint for joint, parts in enumerate(taken) for _, row in parts)
    assert len({(id(parameter), row) for parts in taken for parameter, row in parts}) == own * 3


@pytest.mark.parametrize("names", [["hip"], ["hip", "hip", "foot"]])
def test_wrong_names_of_joints_are_refused(names):
    with pytest.raises(ValueError, match="3 dimensions, so give 3 different names"):
        joint_heads(3, nn.Linear(4, 3), names=names)
    with pytest.raises(ValueError, match="3 dimensions of the action cannot share a layer of 4 rows"):
        joint_heads(3, nn.Linear(4, 4))
