"""The benchmark's work: graphs of the promised degrees, full updates, the same comparisons for both contenders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from throughput.figures import agreement, merged
from throughput.graphs import circulant_groups, random_partners
from throughput.work import (
    GROUP,
    WORKS,
    Items,
    batch_sequence,
    load_work,
    make_work,
    rows_of,
    save_work,
    synthetic_items,
    unique_tokens,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_throughput.py"


@pytest.fixture(scope="module")
def items() -> Items:
    return synthetic_items(vocabulary=100)


def _distinct(first: np.ndarray, second: np.ndarray) -> int:
    return len({frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)})


@pytest.mark.parametrize(("degree", "edges"), [(2, 32), (8, 128)])
def test_circulant_groups_have_the_degree_and_no_pair_twice(degree: int, edges: int) -> None:
    first, second = circulant_groups(100, 32, degree, np.random.default_rng(0))
    assert len(first) == 3 * edges
    assert (first != second).all()
    assert _distinct(first, second) == 3 * edges
    counts = np.bincount(np.concatenate([first, second]), minlength=100)
    assert sorted(counts.tolist()) == [0] * 4 + [degree] * 96  # 100 items fill three groups


@pytest.mark.parametrize("degree", [0, 3, 32])
def test_impossible_degrees_are_refused(degree: int) -> None:
    with pytest.raises(ValueError, match="must be even and below"):
        circulant_groups(100, 32, degree, np.random.default_rng(0))


def test_random_partners_are_others_and_no_pair_comes_twice() -> None:
    first, second = random_partners(40, np.random.default_rng(0))
    assert first.tolist() == list(range(40))
    assert (first != second).all()
    assert _distinct(first, second) == 40


@pytest.mark.parametrize(("name", "per_update", "most_items"), [("degree8", 128, 32), ("degree2", 32, 32)])
def test_an_update_of_joint_work_is_one_group(name: str, per_update: int, most_items: int, items: Items) -> None:
    """With the engine's own graph batching, in the second epoch too."""
    work = make_work(name, items)
    assert work.updates_per_epoch == 512 // 32
    for batch in batch_sequence(work, 20):
        assert len(batch) == per_update
        assert len(rows_of(batch)) == most_items
        assert batch.joint.all()


def test_conditional_work_compares_responses_of_one_instruction(items: Items) -> None:
    work = make_work("conditional", items)
    assert not work.edges.joint.any()
    batch = batch_sequence(work, 1)[0]
    assert len(batch) == GROUP
    prompts = 0
    for chosen, rejected in zip(batch.chosen, batch.rejected, strict=True):
        length = work.tokens.prompt_lengths[chosen]
        assert length == work.tokens.prompt_lengths[rejected]
        assert (work.tokens.item(chosen)[:length] == work.tokens.item(rejected)[:length]).all()
        prompts += int(length)
    whole = int(work.tokens.lengths[rows_of(batch)].sum())
    assert unique_tokens(work.tokens, batch) == whole - prompts  # of two equal prompts one counts


def test_the_mix_has_as_many_joint_as_conditional_comparisons_on_shared_items(items: Items) -> None:
    work = make_work("d_m", items)
    assert work.edges.joint.tolist().count(True) == 512
    assert len(work.edges) == 1024
    joint = work.edges.take(np.flatnonzero(work.edges.joint))
    assert set(rows_of(joint)) <= set(items.in_sft.tolist())


@pytest.mark.parametrize("name", WORKS)
def test_work_survives_its_file(name: str, items: Items, tmp_path: Path) -> None:
    work = make_work(name, items)
    save_work(work, tmp_path / "work.npz")
    found = load_work(tmp_path / "work.npz")
    assert (found.name, found.per_update) == (name, work.per_update)
    for ours, theirs in zip(batch_sequence(work, 3), batch_sequence(found, 3), strict=True):
        assert ours.chosen.tolist() == theirs.chosen.tolist()
        assert ours.joint.tolist() == theirs.joint.tolist()
    assert (found.tokens.ids == work.tokens.ids).all()


def test_losses_that_differ_by_more_than_rounding_are_noticed() -> None:
    ours = {"losses": [0.7, 0.6], "grad_norms": [1.0, 2.0]}
    assert agreement(ours, {"losses": [0.7, 0.6001], "grad_norms": [1.0, 2.0]}, "float32")["agrees"]
    assert not agreement(ours, {"losses": [0.7, 0.602], "grad_norms": [1.0, 2.0]}, "float32")["agrees"]
    assert not agreement(ours, {"losses": [0.7, 0.6], "grad_norms": [1.0, 4.0]}, "float32")["agrees"]
    assert not agreement(ours, {"losses": [0.7, float("nan")], "grad_norms": [1.0, 2.0]}, "float32")["agrees"]
    assert agreement(ours, {"losses": [0.7, 0.602], "grad_norms": [1.0, 4.0]}, "bfloat16")["agrees"]


def test_several_runs_are_one_with_the_medians_of_each_update() -> None:
    runs = [
        {"seconds": seconds, "reference_s": r, "peak_bytes": 5, "held_bytes": 1, "matrix_peak": 2.0, "losses": [0.7]}
        for seconds, r in (([1.0, 5.0], 1.0), ([3.0, 4.0], 2.0), ([2.0, 9.0], 7.0))
    ]
    found = merged(runs)
    assert (found["seconds"], found["reference_s"], found["runs"], found["losses"]) == ([2.0, 5.0], 2.0, 3, [0.7])
    assert merged(runs[:1]) is runs[0]
    assert merged([*runs, {"error": "out of memory"}]) == {"error": "out of memory"}


@pytest.mark.slow
def test_both_contenders_compute_the_same_on_every_work(tmp_path: Path) -> None:
    """A tiny model on sandbox text; the script ends with status 1 where losses differ."""
    pytest.importorskip("trl")
    out = tmp_path / "figures.json"
    options = ["--shape", "tiny", "--updates", "2", "--warmup", "1", "--dtype", "float32", "--micro-batches", "16"]
    command = [sys.executable, str(SCRIPT), *options, "--threads", "1", "--trl", "--json", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"JPO_REAL_DATA": str(tmp_path)})
    found = json.loads(out.read_text())
    assert [row["work"] for row in found["ratios"]] == list(WORKS)
    assert len(found["checks"]) == 2 * len(WORKS)
    assert all(row["comparisons_per_s"] > 0 and row["peak_mib"] > 0 for row in found["rows"])
