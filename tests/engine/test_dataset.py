"""Edges out of the preferences table, batches of an epoch, partners of mismatched items."""

import numpy as np
import pyarrow as pa
import pytest

from jpo_ray.engine.batches import shuffled, total_steps
from jpo_ray.engine.dataset import edge_list, mismatched_partners
from jpo_ray.records import PREFERENCES

GAPS = (0.5, None, 1.5, 2.5)
IDS = pa.array(["p", "q", "r"])


def preferences() -> pa.Table:
    rows = [
        ("p", "q", "conditional", 1.0, "train"),
        ("r", "p", "joint", 0.5, "train"),
        ("q", "r", "joint", 2.0, "validation"),
        ("q", "p", "joint", 3.0, "train"),
    ]
    names = ("chosen", "rejected", "protocol", "weight", "split")
    return pa.Table.from_pylist(
        [
            dict(zip(names, row, strict=True)) | {"probability": 1.0, "gap": gap}
            for row, gap in zip(rows, GAPS, strict=True)
        ],
        PREFERENCES,
    )


def test_edges_of_a_split_and_of_protocols_in_table_order() -> None:
    both = edge_list(preferences(), IDS, "train", ["conditional", "joint"])
    assert both.chosen.tolist() == [0, 2, 1]
    assert both.rejected.tolist() == [1, 0, 0]
    assert both.joint.tolist() == [False, True, True]
    assert both.weight.tolist() == [1.0, 0.5, 3.0]
    assert both.gap[[0, 2]].tolist() == [0.5, 2.5]
    assert np.isnan(both.gap[1])
    assert edge_list(preferences(), IDS, "train", ["conditional"]).chosen.tolist() == [0]
    assert edge_list(preferences(), IDS, "validation", ["joint"]).rejected.tolist() == [2]
    assert len(edge_list(preferences(), IDS, "test", ["joint"])) == 0
    assert both.take(np.array([2, 0])).weight.tolist() == [3.0, 1.0]


def test_an_epoch_has_every_edge_once_in_an_order_of_its_own() -> None:
    epochs = [shuffled(10, 4, seed=3, epoch=epoch) for epoch in (0, 1)]
    assert [[len(batch) for batch in batches] for batches in epochs] == [[4, 4, 2]] * 2
    orders = [np.concatenate(batches).tolist() for batches in epochs]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2
    assert orders[0] != orders[1]
    assert np.concatenate(shuffled(10, 4, 3, 0)).tolist() == orders[0]
    assert np.concatenate(shuffled(10, 4, 4, 0)).tolist() != orders[0]


@pytest.mark.parametrize(("per_epoch", "epochs", "steps"), [(10, 2, 20), (10, 0.25, 3), (10, 0.01, 1), (3, 1.5, 5)])
def test_steps_of_fractional_epochs(per_epoch: int, epochs: float, steps: int) -> None:
    assert total_steps(per_epoch, epochs) == steps


def test_partners_are_of_another_instruction_and_use_each_response_once() -> None:
    instructions = [f"i{number // 2}" for number in range(40)]
    partners = mismatched_partners(instructions, seed=1)
    assert all(instructions[mine] != instructions[other] for mine, other in enumerate(partners))
    assert len(set(partners.tolist())) > 35
    assert partners.tolist() == mismatched_partners(instructions, seed=1).tolist()
    assert partners.tolist() != mismatched_partners(instructions, seed=2).tolist()
    distinct = mismatched_partners([str(number) for number in range(9)], seed=0)
    assert sorted(distinct.tolist()) == list(range(9))


def test_one_instruction_alone_has_no_partners() -> None:
    assert mismatched_partners(["i", "i", "i"], seed=0).tolist() == [0, 1, 2]
