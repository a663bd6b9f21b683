"""The training loop: steps, schedule, logging, evaluation and checkpoints. What a step computes is given to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jpo_ray.config_training import OptimizerConfig
from jpo_ray.engine.checkpoints import (
    STATE,
    agreed_checkpoint,
    checkpoint_before,
    keep_only,
    load_checkpoint,
    save_checkpoint,
    save_weights,
    store_checkpoints,
)
from jpo_ray.engine.optim import learning_rate, make_optimizer, warmup_steps
from jpo_ray.engine.sharding import whole
from jpo_ray.engine.step import trainable
from jpo_ray.engine.tracking import Tracking, Write, tracked
from jpo_ray.engine.workers import barrier, rank_and_world
from jpo_ray.errors import InputError
from jpo_ray.files import hash_file, write_json
from jpo_ray.stored import push

Metrics = dict[str, float]
SKIPPED_ITEMS_SHOWN = 8
SKIPPED_BATCH = "skipped_batch.json"
LOG_ENTRIES = 200  # about so many training entries are kept in the log, each the mean of the steps since the last


@dataclass(frozen=True)
class Task:
    """What is trained: how to compute a step's gradients and the held-out metrics.

    `gradients(step)` fills the parameters' `.grad`, the same on every rank, and returns metrics (`loss` and the step's
    `tokens` among them). `evaluate()` returns metrics named `eval_...`, empty where nothing is held out.
    `steps_per_epoch` converts steps to epochs. `items(step)` names the items of a step's batch.
    """

    gradients: Callable[[int], Metrics]
    evaluate: Callable[[], Metrics]
    steps_per_epoch: int
    total_steps: int
    items: Callable[[int], Sequence[str]] = lambda _step: ()


Progress = Callable[[int, int, Metrics], None]


def train(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: OptimizerConfig,
    out: Path,
    *,
    progress: Progress | None = None,
    final_dtype: torch.dtype | None = None,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Train `model` in place, resuming from the newest valid checkpoint in `out`; returns the trainer state.

    Leaves in `out` the final weights, `trainer_state.json` and the best and the last checkpoint. Every rank must call
    it; rank 0 writes. The best checkpoint is the one with the lowest `eval_loss`. `final_dtype` is that of the final
    weights, where it differs from training's. Rank 0 hands what it logs to the trackers of `tracking`.

    A step whose loss or gradient is no finite number changes nothing but the count `skipped_steps`. Raises `InputError`
    where `config.max_skipped_steps` in a row were.
    """
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, config)
    state: dict[str, Any] = {"global_step": 0, "max_steps": task.total_steps, "num_tokens": 0, "log_history": []}
    state |= {"best_metric": None, "best_model_checkpoint": None, "epoch": 0.0}
    state["warmup_steps"] = warmup_steps(config, task.total_steps)
    state |= {"skipped_steps": 0, "skipped_in_a_row": 0}
    resumed = agreed_checkpoint(out)
    if resumed is not None:
        state = load_checkpoint(resumed, model, optimizer)
    eval_every = config.eval_steps or task.steps_per_epoch
    save_every = config.save_steps or eval_every
    log_every = max(1, task.total_steps // LOG_ENTRIES)
    window: list[Metrics] = []
    model.train()
    with tracked(tracking if rank_and_world()[0] == 0 else None, state["log_history"]) as write:
        for step in range(state["global_step"], task.total_steps):
            metrics, skipped = _update(parameters, optimizer, task, config, step)
            state["global_step"] = step + 1
            state["epoch"] = round((step + 1) / task.steps_per_epoch, 4)
            state["num_tokens"] += metrics.pop("tokens")
            _count_skipped(out, task, config, state, metrics, skipped=skipped)
            if not skipped:
                window.append(metrics)
            if progress:
                progress(step + 1, task.total_steps, metrics)
            evaluates = (step + 1) % eval_every == 0 or step + 1 == task.total_steps
            saves = evaluates or (step + 1) % save_every == 0
            if saves or (step + 1) % log_every == 0:  # a checkpoint holds all that was logged until then
                counts = {"num_tokens": state["num_tokens"]}
                counts |= {"skipped_steps": state["skipped_steps"]} if state["skipped_steps"] else {}
                _log(state, _mean(window) | counts, write)
                window = []
            if evaluates:
                _evaluate(model, task, state, write)
            if saves:
                _checkpoint(out, model, tokenizer, optimizer, state)
    _finish(out, model, tokenizer, state, final_dtype)
    return state


def _update(
    parameters: list[torch.nn.Parameter], optimizer: Any, task: Task, config: OptimizerConfig, step: int
) -> tuple[Metrics, bool]:
    """The step's metrics, and whether it was skipped: every rank has the same loss and norm, so all agree."""
    rate = learning_rate(config, step, task.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    metrics = task.gradients(step)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
    skipped = not math.isfinite(norm) or not math.isfinite(metrics["loss"])
    if not skipped:
        optimizer.step()
    return metrics | {"learning_rate": rate, "grad_norm": norm}, skipped


def _count_skipped(
    out: Path, task: Task, config: OptimizerConfig, state: dict[str, Any], metrics: Metrics, *, skipped: bool
) -> None:
    """Raises `InputError`, naming the items of the last batch, where too many steps in a row were skipped."""
    state["skipped_steps"] += skipped
    state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if skipped else 0
    if state["skipped_in_a_row"] < config.max_skipped_steps:
        return
    step, items = state["global_step"], list(task.items(state["global_step"] - 1))
    if rank_and_world()[0] == 0:
        write_json(out / SKIPPED_BATCH, {"step": step, "items": items})
        push(out, {SKIPPED_BATCH: hash_file(out / SKIPPED_BATCH)})
    barrier()  # the first rank that raises ends the others
    shown = ", ".join(items[:SKIPPED_ITEMS_SHOWN])
    more = f" and {len(items) - SKIPPED_ITEMS_SHOWN} more" if len(items) > SKIPPED_ITEMS_SHOWN else ""
    raise InputError(
        f"{out}: loss or gradient was no finite number in {config.max_skipped_steps} steps in a row, the last of them "
        f"step {step} (loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}); lower learning_rate, or look "
        f"at its items: {shown}{more} (all of them: {SKIPPED_BATCH} there)"
    )


def _evaluate(model: Any, task: Task, state: dict[str, Any], write: Write) -> None:
    model.eval()
    metrics = task.evaluate()
    model.train()
    if not metrics:
        return
    _log(state, metrics, write)
    loss = metrics["eval_loss"]
    if math.isfinite(loss) and (state["best_metric"] is None or loss < state["best_metric"]):
        state["best_metric"] = loss
        state["best_model_checkpoint"] = f"checkpoint-{state['global_step']}"


def _checkpoint(out: Path, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> None:
    last = save_checkpoint(out, model, tokenizer, optimizer, state)
    if rank_and_world()[0] == 0:
        # The one before stays until there is another: were the last one damaged, training would begin anew.
        before = {path for path in [checkpoint_before(out, state["global_step"])] if path}
        keep_only(out, {last} | before | _best(out, state))
        store_checkpoints(out)
    barrier()


def _best(out: Path, state: dict[str, Any]) -> set[Path]:
    return {out / state["best_model_checkpoint"]} if state["best_model_checkpoint"] else set()


def _finish(out: Path, model: Any, tokenizer: Any, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    model.eval()
    save_weights(out, model, tokenizer, dtype)
    if rank_and_world()[0] == 0:
        write_json(out / STATE, state)
        keep_only(out, {out / f"checkpoint-{state['global_step']}"} | _best(out, state))
        store_checkpoints(out)
        (out / SKIPPED_BATCH).unlink(missing_ok=True)  # of an attempt before this one
    barrier()


def _log(state: dict[str, Any], metrics: Metrics, write: Write) -> None:
    entry = {"step": state["global_step"], "epoch": state["epoch"]}
    entry |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
    state["log_history"].append(entry)
    write(entry)


def _mean(window: list[Metrics]) -> Metrics:
    """Mean of each metric over the steps that have it (a batch without joint edges has no joint accuracy)."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    columns = {name: [metrics[name] for metrics in window if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}
