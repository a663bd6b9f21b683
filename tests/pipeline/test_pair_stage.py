"""What pairs depend on: their fingerprint says how partners are drawn, where that may decide which they are."""

from typing import Any

import pytest

from jpo_ray.pipeline.pair_stage import pair_slice
from pipeline.inline import LIMITS, small_config

UNHELD = {split: [{"path": "sandbox", "limit": LIMITS[split]}] for split in ("train", "test")}


@pytest.mark.parametrize(
    ("joint", "drawn"),
    [
        ({}, True),
        ({"strategy": "proxy"}, True),
        ({"strategy": "similar"}, False),
        ({"strategy": "stratified"}, False),
        ({"group_size": 16}, False),
        ({"min_similarity": 0.1}, False),
        ({"max_similarity": 0.9}, False),
        ({"max_per_item": 4}, False),
        ({"min_per_item": 1, "validation_budget": 10}, False),
        ({"connected": True, "validation_budget": 10}, False),
        ({"connected": True}, True),  # of validation items no chain is asked
        (None, False),
    ],
)
def test_how_partners_are_drawn_is_told_where_any_will_do(joint: dict[str, Any] | None, drawn: bool) -> None:
    slice_ = pair_slice(small_config(pairs={"joint": joint}))
    assert slice_.pop("drawn", None) == (2 if drawn else None)
    assert list(slice_) == ["pairs", "seed"]  # as it was before, so that what stands stays


def test_nothing_is_drawn_where_all_items_are_limited() -> None:
    assert "drawn" not in pair_slice(small_config(items=UNHELD, pairs={"joint": {"connected": True}}))
