"""Two workers give one worker's gradient: two spawned processes that meet through gloo."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from s3 import S3
from safetensors.torch import load_file

from engine.tiny import World, difference, policy_scorer
from engine.workers import CASES, SHARDED_RECIPES, all_of, outcome_of, work
from jpo_ray.config import BaseModelConfig
from jpo_ray.engine import step
from jpo_ray.engine.checkpoints import fetch_checkpoints, is_valid, load_checkpoint
from jpo_ray.engine.loop import train
from jpo_ray.engine.micro_batches import tree_tokens, trees_of
from jpo_ray.engine.model import load_policy, load_tokenizer
from jpo_ray.engine.optim import make_optimizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import trainable
from jpo_ray.engine.tasks import preference_task
from jpo_ray.files import read_json
from jpo_ray.stored import make_working_copy

WORKERS = 2
SAME = 2e-5  # relative norm: float32 sums in another order


@pytest.fixture(scope="module")
def uri(s3_server: S3) -> str:
    return s3_server.uri()


@pytest.fixture(scope="module")
def outcomes(world: World, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every case's outcome on both ranks, from one pair of processes (they take seconds to import)."""
    out = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (WORKERS, world.model, out, uri), nprocs=WORKERS)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_workers_are_one(case: str, outcomes: Path, world: World) -> None:
    """Loss, scores and parameter gradients, with dropout on; both ranks have the same to the last bit."""
    assert_as_alone(case, outcomes, WORKERS, world)


def assert_as_alone(case: str, outcomes: Path, workers: int, world: World) -> None:
    alone = outcome_of(case, world)
    first, *others = (load_file(outcomes / f"{case}-{rank}.safetensors") for rank in range(workers))
    for other in others:
        assert other.keys() == first.keys() == alone.keys()
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    for name, value in first.items():
        assert difference(value, alone[name]) < SAME


@pytest.mark.slow
def test_four_workers_are_one_too_and_go_on_where_two_stopped(
    outcomes: Path, world: World, s3_server: S3, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every case; six sharded steps; and the last two of them from the checkpoint that two workers wrote."""
    out = tmp_path_factory.mktemp("four")
    torch.multiprocessing.spawn(work, (4, world.model, out, s3_server.uri(), outcomes), nprocs=4)
    for case in CASES:
        assert_as_alone(case, out, 4, world)
    for name in SHARDED_RECIPES:
        expected, _ = train_alone(name, world, out / "alone" / name)
        found = weights_in(out / name)
        moved = distance(expected, start_of(name, world, found))
        assert distance(found, expected) < 2e-3 * moved
        assert distance(weights_in(out / "resumed" / name), expected) < 2e-3 * moved


def train_alone(name: str, world: World, out: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """In this process, unsharded: the weights, and the steps that were done."""
    recipe = SHARDED_RECIPES[name]
    policy = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    task = preference_task(make_scorer(policy, dropout_seed=1), world.data, recipe, seed=1)
    steps: list[int] = []
    train(policy, load_tokenizer(world.model), task, recipe, out, progress=lambda done, *_: steps.append(done))
    return weights_in(out), steps


def start_of(name: str, world: World, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights_in(world.model) if name == "full" else {key: trained[key] * ("lora_A" in key) for key in trained}


@pytest.mark.parametrize("name", SHARDED_RECIPES)
def test_a_sharded_run_is_the_unsharded_one_and_goes_on_unsharded(
    name: str, outcomes: Path, world: World, tmp_path: Path
) -> None:
    """Six steps on two workers' slices; then the last two again, in one process, from the checkpoint of step 4."""
    expected, _ = train_alone(name, world, tmp_path / "whole")
    found = weights_in(outcomes / name)
    shutil.copytree(outcomes / name / "middle", tmp_path / "resumed")
    resumed, steps = train_alone(name, world, tmp_path / "resumed")
    assert steps == [5, 6]
    moved = distance(expected, start_of(name, world, found))
    assert moved > 0.02
    for other in (found, resumed):
        assert other.keys() == expected.keys()
        assert distance(other, expected) < 2e-3 * moved


def test_a_sharded_checkpoint_is_in_slices(outcomes: Path) -> None:
    """Each worker wrote half of what was trained and of Adam's moments, and nobody the whole."""
    checkpoint = outcomes / "full" / "middle" / "checkpoint-4"
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    halves = [f"sharded/shard-0000{worker}-model-00001-of-00001.safetensors" for worker in (1, 2)]
    assert names == ["files.json", *halves, "trainer_state.json"]
    trained = count(weights_in(outcomes / "full"))
    for half in halves:
        assert count(load_file(checkpoint / half)) == pytest.approx(1.5 * trained, rel=0.01)
    (checkpoint / halves[1]).write_bytes((checkpoint / halves[1]).read_bytes()[:-10])
    assert not is_valid(checkpoint)


def test_workers_of_separate_disks_leave_one_checkpoint_on_the_store(
    outcomes: Path, uri: str, world: World, tmp_path: Path
) -> None:
    """Each uploads its slices; a process alone fetches all, and has the weights and moments that two had."""
    assert [read_json(outcomes / f"apart{rank}.json")["slices"] for rank in range(WORKERS)] == [
        ["shard-00001-model-00001-of-00001.safetensors"], []
    ]  # fmt: skip
    folder = tmp_path / ".building" / "train-x"
    folder.mkdir(parents=True)
    make_working_copy(uri, tmp_path)
    fetch_checkpoints(folder)
    assert len(list(folder.rglob("shard-*"))) == WORKERS
    scorer = policy_scorer(world.model, SHARDED_RECIPES["full"])
    optimizer = make_optimizer(trainable(scorer.model), SHARDED_RECIPES["full"])
    assert load_checkpoint(folder / "checkpoint-2", scorer.model, optimizer)["global_step"] == 2
    found, expected = all_of(scorer.model, optimizer), load_file(outcomes / "all.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_what_one_worker_cannot_write_ends_all_in_one_line(outcomes: Path) -> None:
    for rank in range(WORKERS):
        found = read_json(outcomes / f"apart{rank}.json")
        assert "checkpoint-2: cannot be written (File too large); mend that" in found["told"]
        assert found["left"] == []


def test_slices_of_another_model_are_refused(outcomes: Path, world: World) -> None:
    scorer = policy_scorer(world.model, SHARDED_RECIPES["full"])
    optimizer = make_optimizer(trainable(scorer.model), SHARDED_RECIPES["full"])
    with pytest.raises(RuntimeError, match="weights do not fit the model"):
        load_checkpoint(outcomes / "lora" / "middle" / "checkpoint-4", scorer.model, optimizer)


def count(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return dict(load_file(path))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((a[name] - b[name]).pow(2).sum() for name in a)) ** 0.5


def test_items_are_shared_by_tokens(world: World) -> None:
    """Longest first, each to the lane with the fewest tokens: every item once, loads within one tree's length."""
    rows = np.arange(5, 24)
    for packed in (False, True):
        shards = step.shards(world.tokens, rows, 3, packed=packed)
        assert sorted(np.concatenate(shards)) == rows.tolist()
        trees = [trees_of(world.tokens, shard, share=packed) for shard in shards]
        loads = [sum(tree_tokens(world.tokens, tree) for tree in group) for group in trees]
        longest = max(tree_tokens(world.tokens, tree) for group in trees for tree in group)
        assert max(loads) - min(loads) <= longest
        if packed:  # items of one instruction stay together
            prompts = [set(world.tokens.prompt_groups[shard].tolist()) for shard in shards]
            assert sum(len(group) for group in prompts) == len(set.union(*prompts))
