"""The scaling benchmark drives the stages themselves, so a change of theirs must not leave it behind."""

from typing import Any

import pytest
from scaled.edges import measure_edges
from scaled.memory import watching


@pytest.mark.ray
def test_comparisons_go_through_every_step(ray_cluster: Any) -> None:
    assert ray_cluster
    with watching() as memory:
        rows = list(measure_edges(memory, items=200, edges=1000))
    assert [row["step"] for row in rows] == ["pairs", "judge", "sampler (pairs)", "sampler (graph)"]
    assert all(row["seconds"] >= 0 and row["bytes each"] > 0 for row in rows)
    assert 0 < rows[3]["items per comparison"] < rows[2]["items per comparison"]
    assert all(row["driver MiB"] > 0 and row["CPU us: driver"] > 0 for row in rows)
    assert rows[0]["workers MiB"] > 0
