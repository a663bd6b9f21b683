"""What a spawned worker of `test_workers.py` runs: each case's gradient, written to a file per rank."""

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from engine.tiny import World, config, gradients_of, make_lists, make_world, policy_scorer
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.checkpoints import save_checkpoint, store_checkpoints
from jpo_ray.engine.loop import train
from jpo_ray.engine.model import load_policy, load_tokenizer
from jpo_ray.engine.optim import make_optimizer
from jpo_ray.engine.scoring import Scorer, make_scorer
from jpo_ray.engine.sharding import shard, whole
from jpo_ray.engine.step import accumulate_gradients, score_all, trainable
from jpo_ray.engine.tasks import preference_task
from jpo_ray.errors import InputError
from jpo_ray.files import write_json
from jpo_ray.stored import make_working_copy

PREFERENCE_CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-accumulated": {"gradient_accumulation_steps": 3},
    "lora-two-phase": {"max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
    "lora-kto": {"objective": "kto"},
    "full": {"use_peft": False},
    "lora-fsdp2": {"sharding": "fsdp2"},
    "lora-two-phase-fsdp2": {"sharding": "fsdp2", "max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
    "lora-some-kept-fsdp2": {"sharding": "fsdp2", "max_micro_batch_tokens": 60, "activation_memory_gib": 2e-3},
    "full-fsdp2": {"sharding": "fsdp2", "use_peft": False, "max_micro_batch_tokens": 200},
    "kto-fsdp2": {"sharding": "fsdp2", "objective": "kto"},
    "lora-mixture": {"also": [{"objective": "simpo", "weight": 0.5}, {"objective": "sft", "weight": 0.1}]},
    "lora-rpo": {"objective": "rpo", "max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
    "lora-lipo": {"objective": "lipo", "max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
    "pro-fsdp2": {"sharding": "fsdp2", "objective": "pro", "max_micro_batch_tokens": 120},
    "full-two-phase": {"use_peft": False, "max_micro_batch_tokens": 1, "activation_memory_gib": 0.0},
}
SHARDED_RECIPES = {
    name: config(
        comparisons_per_step=4, num_train_epochs=2, save_steps=2, eval_steps=6, sharding="fsdp2",
        use_peft=name == "lora", learning_rate=1e-2 if name == "lora" else 1e-3,
    )
    for name in ("lora", "full")
}  # fmt: skip
CASES = [*PREFERENCE_CASES, "one-item", "one-item-fsdp2", "scores", "scores-fsdp2"]
CPU = torch.device("cpu")


def outcome_of(case: str, world: World) -> dict[str, torch.Tensor]:
    """Loss and gradient of a case, by however many workers there are."""
    name = case.removesuffix("-fsdp2")
    sharded = case.endswith("-fsdp2") and dist.is_initialized()
    if name == "scores":
        scorer = _scorer(world, config(), sharded)
        return {"scores": score_all(scorer, world.tokens, np.arange(24), max_tokens=200, step=3)}
    if name == "one-item":  # fewer items than workers: one has nothing to do
        scorer = _scorer(world, config(), sharded)
        scores = accumulate_gradients(scorer, world.tokens, np.array([3]), lambda s: s.sum() / 50, max_tokens=4096)
        return {"scores": scores, "gradient": gradient_of(scorer)}
    train = config(**PREFERENCE_CASES[case])
    data = make_lists(world.model).data if train.joins == "lists" else world.data
    loss, gradient = gradients_of(_scorer(world, train, sharded), data, train)
    return {"loss": torch.tensor(loss, dtype=torch.float64), "gradient": gradient}


def _scorer(world: World, train: TrainConfig, sharded: bool) -> Scorer:
    scorer = policy_scorer(world.model, train)
    return shard(scorer, CPU) if sharded else scorer


def gradient_of(scorer: Scorer) -> torch.Tensor:
    return torch.cat([whole(p.grad).flatten() for p in trainable(scorer.model) if p.grad is not None])


def train_sharded(world: World, out: Path) -> None:
    """Train LoRA and all parameters on sharded weights; checkpoints after steps 2, 4 and 6."""
    for name, recipe in SHARDED_RECIPES.items():
        policy = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
        scorer = shard(make_scorer(policy, dropout_seed=1), CPU)
        task = preference_task(scorer, world.data, recipe, seed=1)
        (out / name).mkdir(parents=True, exist_ok=True)

        def copied(done: int, _total: int, _metrics: Any, folder: Path = out / name) -> None:
            if done == 5 and dist.get_rank() == 0:  # before the next checkpoint takes its place
                shutil.copytree(folder / "checkpoint-4", folder / "middle" / "checkpoint-4")

        train(policy, load_tokenizer(world.model), task, recipe, out / name, progress=copied)


def checkpoint_apart(world: World, out: Path, uri: str) -> None:
    """A sharded checkpoint on an object store, each worker having a disk of its own; and what all of it is.

    Before that rank 1 cannot write: what each rank was told, and what is left.
    """
    recipe, rank = SHARDED_RECIPES["full"], dist.get_rank()
    folder = out / f"disk{rank}" / ".building" / "train-x"
    folder.mkdir(parents=True)
    make_working_copy(uri, folder.parents[1])
    scorer = shard(policy_scorer(world.model, recipe), CPU)
    optimizer = make_optimizer(trainable(scorer.model), recipe)
    for parameter in trainable(scorer.model):
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    state = {"global_step": 2, "log_history": []}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if rank else limits[0], limits[1]))
    told = ""
    try:
        save_checkpoint(folder, scorer.model, None, optimizer, state)
    except InputError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path.name for path in folder.iterdir()]
    save_checkpoint(folder, scorer.model, None, optimizer, state)
    if rank == 0:
        store_checkpoints(folder)
    dist.barrier()
    slices = sorted(path.name for path in folder.rglob("shard-*"))
    write_json(out / f"apart{rank}.json", {"told": told, "left": left, "slices": slices})
    everything = all_of(scorer.model, optimizer)
    if rank == 0:
        save_file(everything, out / "all.safetensors")


def all_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, whole."""
    named = dict(model.named_parameters())
    states = {f"{name}/{key}": value for name, p in named.items() for key, value in optimizer.state[p].items()}
    return {name: whole(value.detach()).clone() for name, value in (named | states).items()}


def work(rank: int, workers: int, model: Path, out: Path, uri: str, begun: Path | None = None) -> None:
    """All cases and the sharded trainings; with `begun` also the end of those that other workers have begun there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=workers)
    world = make_world(model)
    for case in CASES:
        save_file(outcome_of(case, world), out / f"{case}-{rank}.safetensors")
    train_sharded(world, out)
    checkpoint_apart(world, out, uri)
    if begun is not None:
        if rank == 0:
            for name in SHARDED_RECIPES:
                shutil.copytree(begun / name / "middle", out / "resumed" / name)
        dist.barrier()
        train_sharded(world, out / "resumed")
    dist.destroy_process_group()
