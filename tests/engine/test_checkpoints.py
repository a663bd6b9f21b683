"""A resumed run is the uninterrupted one; checkpoints are whole or not read; results load in plain libraries."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import small_disk
from peft import PeftModel
from s3 import S3
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tiny import World, config
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine import checkpoints, loop
from jpo_ray.engine.checkpoints import is_valid, load_checkpoint, newest_checkpoint, save_checkpoint
from jpo_ray.engine.loop import Task, train
from jpo_ray.engine.model import load_policy, load_tokenizer
from jpo_ray.engine.optim import make_optimizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import trainable
from jpo_ray.engine.tasks import preference_task
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.runs import RunDir
from jpo_ray.stored import pull

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-8bit": {"optim": "adamw_8bit", "lora_r": 64},  # of 4,096 weights and more, which get 8-bit state
    "full": {"use_peft": False, "learning_rate": 1e-3},
}
STEPS, STOP_AT = 6, 5  # three steps an epoch; checkpoints after 2, 3, 4 and 6
TIMINGS = ("tokens_per_second", "mfu", "joint/items_per_second", "joint/comparisons_per_second")


class StoppedError(Exception):
    """Stands for a killed process."""


@dataclass(frozen=True)
class Run:
    recipe: TrainConfig
    out: Path
    state: dict[str, Any]
    model: Any


def recipe_of(name: str) -> TrainConfig:
    return config(comparisons_per_step=4, num_train_epochs=2, save_steps=2, warmup_steps=2, **RECIPES[name])


def run(world: World, recipe: TrainConfig, out: Path, progress: Callable[..., None] | None = None) -> Run:
    policy = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    task = preference_task(make_scorer(policy, dropout_seed=1), world.data, recipe, seed=1)
    state = train(policy, load_tokenizer(world.model), task, recipe, out, progress=progress)
    return Run(recipe, out, state, policy)


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from start to end, of each recipe."""
    return run(world, recipe_of(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def lora(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(world, recipe_of("lora"), tmp_path_factory.mktemp("lora"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return dict(load_file(path))


def log_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in state["log_history"]]


def stop(done: int, total: int, metrics: dict[str, float]) -> None:
    assert total == STEPS
    assert "loss" in metrics
    if done == STOP_AT:
        raise StoppedError


def assert_same(resumed: Run, whole: Run) -> None:
    """Weights and optimizer state to the last bit, and every logged number but the timings."""
    found, expected = weights(resumed.out), weights(whole.out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    last = f"checkpoint-{STEPS}/optimizer.safetensors"
    ours, theirs = load_file(resumed.out / last), load_file(whole.out / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_of(resumed.state) == log_of(whole.state)
    assert resumed.state["num_tokens"] == whole.state["num_tokens"]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole: Run, world: World, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(world, whole.recipe, tmp_path, stop)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-4"
    steps: list[int] = []
    resumed = run(world, whole.recipe, tmp_path, lambda done, *_: steps.append(done))
    assert steps == [5, 6]
    assert_same(resumed, whole)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no list", "broken list"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, lora: Run, world: World, tmp_path: Path
) -> None:
    """The newest one (4) has a file cut short, gone or its list of hashes gone or broken: resumed from 3,
    which is kept as the best one so far."""
    with pytest.raises(StoppedError):
        run(world, lora.recipe, tmp_path, stop)
    newest = tmp_path / "checkpoint-4"
    harm = {"truncated": "adapter_model.safetensors", "missing": "optimizer.safetensors"}.get(damage, "files.json")
    if damage in ("truncated", "broken list"):
        (newest / harm).write_bytes((newest / harm).read_bytes()[:-40])
    else:
        (newest / harm).unlink()
    assert not is_valid(newest)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-3"
    steps: list[int] = []
    assert_same(run(world, lora.recipe, tmp_path, lambda done, *_: steps.append(done)), lora)
    assert steps == [4, 5, 6]
    assert is_valid(tmp_path / "checkpoint-6")


def test_a_checkpoint_cut_at_any_kilobyte_or_without_a_file_is_never_read(
    lora: Run, world: World, tmp_path: Path
) -> None:
    """Each of its files, cut after every KiB and of its last bytes, and gone: the one before is the newest."""
    with pytest.raises(StoppedError):
        run(world, lora.recipe, tmp_path, stop)
    newest, before = tmp_path / "checkpoint-4", tmp_path / "checkpoint-3"
    files = sorted(newest.iterdir())
    assert {path.name for path in files} >= {"adapter_model.safetensors", "optimizer.safetensors", "files.json"}
    tried = 0
    for path in files:
        content = path.read_bytes()
        path.unlink()
        assert newest_checkpoint(tmp_path) == before
        for size in [*range(0, len(content), 1024), len(content) - 2]:
            path.write_bytes(content[:size])
            assert newest_checkpoint(tmp_path) == before, (path.name, size)
            tried += 1
        path.write_bytes(content)
        assert newest_checkpoint(tmp_path) == newest
    logging.getLogger(__name__).info("%d files cut at %d places", len(files), tried)


def test_nothing_is_a_checkpoint_before_there_is_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_a_finished_run_is_not_trained_again(lora: Run, world: World, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(lora.out, again)
    steps: list[int] = []
    repeated = run(world, lora.recipe, again, lambda done, *_: steps.append(done))
    assert steps == []
    assert_same(repeated, lora)


def test_no_pickle_and_nothing_half_written_is_left(whole: Run) -> None:
    files = [path for path in whole.out.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert not list(whole.out.rglob(".*"))
    state = json.loads((whole.out / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (STEPS, 2.0)
    kept = {path.name for path in whole.out.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{STEPS}", state["best_model_checkpoint"]}


def test_the_adapter_loads_in_plain_peft(lora: Run, world: World) -> None:
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, lora.out).eval()
    lora.model.eval()
    assert same_logits(plain, lora.model)
    with plain.disable_adapter():
        assert not same_logits(plain, lora.model)


def test_the_full_model_loads_in_plain_transformers(world: World, tmp_path: Path) -> None:
    full = run(world, recipe_of("full"), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert same_logits(plain, full.model.eval())
    text = "Name a fruit."
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == load_tokenizer(world.model)(text)["input_ids"]


def same_logits(a: Any, b: Any) -> bool:
    ids = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        return torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_state_and_weights_make_the_round_trip(name: str, world: World, tmp_path: Path) -> None:
    recipe, tokenizer = recipe_of(name), load_tokenizer(world.model)
    models = [load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=s) for s in (1, 2)]
    optimizers = [make_optimizer(trainable(model), recipe) for model in models]
    for parameter in trainable(models[0]):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    optimizers[0].step()
    saved = save_checkpoint(tmp_path, models[0], tokenizer, optimizers[0], {"global_step": 7, "log_history": []})
    assert saved == tmp_path / "checkpoint-7"
    assert load_checkpoint(saved, models[1], optimizers[1]) == {"global_step": 7, "log_history": []}
    for ours, theirs in zip(trainable(models[1]), trainable(models[0]), strict=True):
        assert torch.equal(ours, theirs)
        found, expected = optimizers[1].state[ours], optimizers[0].state[theirs]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
    if name == "lora-8bit":
        assert torch.uint8 in {optimizers[1].state[p]["state1"].dtype for p in trainable(models[1])}


def test_weights_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    full = recipe_of("full")
    model = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), full, seed=1)
    optimizer = make_optimizer(trainable(model), full)
    saved = save_checkpoint(tmp_path, model, load_tokenizer(world.model), optimizer, {"global_step": 1})
    model.model.layers = model.model.layers[:1]
    with pytest.raises(RuntimeError, match="weights do not fit the model"):
        load_checkpoint(saved, model, optimizer)


def fake_task(model: Any, losses: list[float], steps: int) -> Task:
    """A task whose held-out losses are given; its gradients are zero."""
    remaining = iter(losses)

    def gradients(_step: int) -> dict[str, float]:
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        return {"loss": 1.0, "tokens": 10}

    return Task(gradients, lambda: {"eval_loss": next(remaining)}, 2, steps)


def test_the_best_and_the_last_checkpoint_are_kept(world: World, tmp_path: Path) -> None:
    """Held-out losses 3, 1, 2, 1.5 after steps 2, 4, 6, 8: the second is the best."""
    recipe = config(eval_steps=2)
    model = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    state = train(model, load_tokenizer(world.model), fake_task(model, [3, 1, 2, 1.5], 8), recipe, tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert (state["best_metric"], state["best_model_checkpoint"]) == (1, "checkpoint-4")
    assert [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry] == [3, 1, 2, 1.5]
    trained = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in trained] == list(range(1, 9))
    assert [entry["num_tokens"] for entry in trained] == list(range(10, 90, 10))
    assert [entry["epoch"] for entry in trained] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]


def test_the_one_before_the_newest_stays_though_the_newest_is_the_best(world: World, tmp_path: Path) -> None:
    """Held-out losses 3, 2, 1 after steps 2, 4, 6; the run is stopped after 7, and its last checkpoint damaged."""

    def at_seven(done: int, *_: Any) -> None:
        if done == 7:
            raise StoppedError

    recipe = config(eval_steps=2)
    model = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    task = fake_task(model, [3, 2, 1, 0.5], 8)
    with pytest.raises(StoppedError):
        train(model, load_tokenizer(world.model), task, recipe, tmp_path, progress=at_seven)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    (tmp_path / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def spoiled(task: Task, model: Any, steps: set[int], what: str, total: int | None = None) -> Task:
    """The task with a loss or gradient that is no number at these steps (counted from 0)."""

    def gradients(step: int) -> dict[str, float]:
        metrics = task.gradients(step)
        if step in steps and what == "gradient":
            next(parameter for parameter in trainable(model) if parameter.grad is not None).grad.fill_(float("inf"))
        return metrics | ({"loss": float("nan")} if step in steps and what == "loss" else {})

    return replace(task, gradients=gradients, total_steps=total or task.total_steps)


def spoiled_run(world: World, recipe: TrainConfig, out: Path, steps: set[int], what: str, **options: Any) -> Run:
    policy = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    task = preference_task(make_scorer(policy, dropout_seed=1), world.data, recipe, seed=1)
    state = train(policy, load_tokenizer(world.model), spoiled(task, policy, steps, what), recipe, out, **options)
    return Run(recipe, out, state, policy)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_no_number_is_skipped_and_counted(what: str, world: World, tmp_path: Path) -> None:
    """Steps 2, 3 and 5 of 6; of three in a row there would have been an end. The weights stay what they were."""
    seen: list[torch.Tensor] = []

    def note(*_: Any) -> None:
        parameters = torch.cat([p.detach().flatten() for p in trainable(models[0])])
        seen.append(parameters.clone())

    recipe = recipe_of("lora").model_copy(update={"max_skipped_steps": 3, "warmup_steps": 0})
    models = [load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)]
    task = preference_task(make_scorer(models[0], dropout_seed=1), world.data, recipe, seed=1)
    task = spoiled(task, models[0], {1, 2, 4}, what)
    state = train(models[0], load_tokenizer(world.model), task, recipe, tmp_path, progress=note)
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [True, True, False, True, False]
    assert torch.isfinite(seen[-1]).all()
    assert (state["global_step"], state["skipped_steps"], state["skipped_in_a_row"]) == (6, 3, 0)
    logged = {entry["step"]: entry for entry in state["log_history"] if "num_tokens" in entry}
    assert [step for step, entry in logged.items() if "loss" in entry] == [1, 4, 6]
    assert [entry.get("skipped_steps", 0) for entry in logged.values()] == [0, 1, 2, 2, 3, 3]
    assert all(np.isfinite(value) for entry in logged.values() for value in entry.values())


def test_a_run_stopped_between_skipped_steps_goes_on_counting(world: World, tmp_path: Path) -> None:
    """Steps 4 and 5 are skipped, the kill comes after step 5, the checkpoint is of step 4: the same end."""
    recipe = recipe_of("lora")
    whole = spoiled_run(world, recipe, tmp_path / "whole", {3, 4}, "loss")
    with pytest.raises(StoppedError):
        spoiled_run(world, recipe, tmp_path / "again", {3, 4}, "loss", progress=stop)
    again = spoiled_run(world, recipe, tmp_path / "again", {3, 4}, "loss")
    assert_same(again, whole)
    assert again.state["skipped_steps"] == whole.state["skipped_steps"] == 2


def test_too_many_in_a_row_stop_training_and_name_the_items(world: World, tmp_path: Path) -> None:
    ids = [f"item-{number}" for number in range(12)]
    named = replace(world, data=replace(world.data, item_ids=ids))
    recipe = recipe_of("lora").model_copy(update={"max_skipped_steps": 2})
    with pytest.raises(InputError) as caught:
        spoiled_run(named, recipe, tmp_path, {0, 3, 4, 5}, "loss")
    written = read_json(tmp_path / "skipped_batch.json")
    assert written["step"] == 5
    assert set(written["items"]) <= set(ids)
    assert 2 <= len(written["items"]) <= 8  # of four comparisons
    assert str(caught.value).startswith(
        f"{tmp_path}: loss or gradient was no finite number in 2 steps in a row, the last of them step 5 (loss nan, "
    )
    assert f"lower learning_rate, or look at its items: {', '.join(written['items'])} (all" in str(caught.value)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-4"
    weights = load_file(newest / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_their_items_are_on_the_store_too(
    world: World, s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the driver has them where rank 0 is on another machine."""
    monkeypatch.setenv("JPO_CACHE", str(tmp_path))
    out = RunDir(s3_server.uri()).root / ".building" / "train-x"
    out.mkdir(parents=True)
    recipe = recipe_of("lora").model_copy(update={"max_skipped_steps": 1})
    with pytest.raises(InputError, match=r"all of them: skipped_batch\.json there"):
        spoiled_run(world, recipe, out, {0}, "loss")
    written = read_json(out / "skipped_batch.json")
    shutil.rmtree(out)
    assert list(pull(out)) == ["skipped_batch.json"]
    assert read_json(out / "skipped_batch.json") == written


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = recipe_of("lora")
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(InputError, match=r"checkpoint-2: cannot be written \(No space left on device\); mend that"):
        run(world, recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_keeps_the_checkpoint_before_and_training_goes_on_once_there_is_room(
    lora: Run, world: World, tmp_path: Path
) -> None:
    """Room for one checkpoint and not for two."""
    size = sum(path.stat().st_size for path in (lora.out / "checkpoint-6").iterdir())
    with small_disk(tmp_path / "disk", f"{size * 3 // 2 // 1024}k") as disk:
        out = disk.path / "out"
        with pytest.raises(InputError, match=r"checkpoint-3: cannot be written \(.*No space left on device"):
            run(world, lora.recipe, out)
        assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
        assert is_valid(out / "checkpoint-2")
        disk.remount("size=64m")
        steps: list[int] = []
        assert_same(run(world, lora.recipe, out, lambda done, *_: steps.append(done)), lora)
        assert steps == [3, 4, 5, 6]


def test_log_of_a_long_run_is_thinned_to_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps make about 200 entries, each the mean of five steps; learning rates 1 - step/1000 of 1e-2, so the
    first entry has (1 + 0.999 + 0.998 + 0.997 + 0.996) / 5 = 0.998 of it."""
    recipe = config(lr_scheduler_type="linear", eval_steps=1000)
    model = torch.nn.Linear(1, 1)
    state = {"calls": 0}

    def gradients(_step: int) -> dict[str, float]:
        state["calls"] += 1
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return {"loss": float(state["calls"]), "tokens": 1}

    monkeypatch.setattr(loop, "_checkpoint", lambda *_: None)
    monkeypatch.setattr(loop, "_finish", lambda *_: None)
    log = train(model, None, Task(gradients, dict, 1000, 1000), recipe, tmp_path)["log_history"]
    assert len(log) == 200
    assert (log[0]["step"], log[0]["loss"], log[-1]["loss"]) == (5, 3.0, 998.0)
    assert log[0]["learning_rate"] == pytest.approx(0.998e-2)
