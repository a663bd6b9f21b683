"""Two workers give one worker's gradient: two spawned processes that meet through gloo."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.tiny import World, difference
from engine.workers import CASES, outcome_of, work
from jpo_ray.engine import step
from jpo_ray.engine.micro_batches import tree_tokens, trees_of

WORKERS = 2
SAME = 2e-5  # relative norm: float32 sums in another order


@pytest.fixture(scope="module")
def outcomes(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every case's outcome on both ranks, from one pair of processes (they take seconds to import)."""
    out = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (WORKERS, world.model, out), nprocs=WORKERS)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_workers_are_one(case: str, outcomes: Path, world: World) -> None:
    """Loss, scores and parameter gradients, with dropout on; both ranks have the same to the last bit."""
    alone = outcome_of(case, world)
    first, second = (load_file(outcomes / f"{case}-{rank}.safetensors") for rank in range(WORKERS))
    assert first.keys() == second.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert difference(value, alone[name]) < SAME


def test_items_are_shared_by_tokens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, each to the worker with the fewest tokens: every item once, loads within one tree's length."""
    rows = np.arange(5, 24)
    for share in (False, True):
        shards = []
        for rank in range(3):
            monkeypatch.setattr(step, "rank_and_world", lambda rank=rank: (rank, 3))
            shards.append(step.my_shard(world.tokens, rows, share=share))
        assert sorted(np.concatenate(shards)) == rows.tolist()
        trees = [trees_of(world.tokens, shard, share=share) for shard in shards]
        loads = [sum(tree_tokens(world.tokens, tree) for tree in group) for group in trees]
        longest = max(tree_tokens(world.tokens, tree) for group in trees for tree in group)
        assert max(loads) - min(loads) <= longest
        if share:  # items of one instruction stay together
            prompts = [set(world.tokens.prompt_groups[shard].tolist()) for shard in shards]
            assert sum(len(group) for group in prompts) == len(set.union(*prompts))
