"""Training in one mode, without Ray, with evaluations in between that the clock does not see."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jpo_ray.config import EvaluateConfig, SampleConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import prompt_ids
from jpo_ray.engine.checkpoints import save_weights
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.loop import _update
from jpo_ray.engine.model import load_policy
from jpo_ray.engine.optim import make_optimizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import trainable
from jpo_ray.engine.tasks import check_margins, preference_task
from jpo_ray.evaluation.generation import Request, SampledModel, TransformersSampler, clean_response
from jpo_ray.evaluation.win_rates import judge_samples, win_rates
from jpo_ray.pipeline.evaluate_stage import evaluation_judge
from quality_curves.world import Row, World, oracle

POLICY = "policy"
TEMPERATURE = 0.5
SAMPLING_BATCH = 64


def train_curve(world: World, settings: TrainConfig, points: int, policy: Any = None) -> Iterator[Row]:
    """Evaluations before, at `points` even distances and after. What updates cost counts, making batches included.

    `policy` is what to train, for a caller that wants it afterwards: then there is no evaluation before.
    """
    seed, from_start = settings.seed or 0, policy is None
    policy = policy or load_policy(world.sft, world.config.model, settings, seed=seed)
    scorer = make_scorer(policy, dropout_seed=seed)
    check_margins(scorer, world.data, settings, world.config.model.dtype)
    parameters = trainable(policy)
    optimizer = make_optimizer(parameters, settings)
    # What libraries set up when first used is not the mode's cost. With a task apart: one keeps its epoch's batches.
    preference_task(scorer, world.data, settings, seed).gradients(0)
    task = preference_task(scorer, world.data, settings, seed)
    stops = set(np.linspace(0, task.total_steps, points + 1).round().astype(int).tolist())
    spent = {"seconds": 0.0, "comparisons": 0, "items": 0}  # items: forward and backward passes
    for step in range(task.total_steps + 1):
        if step in stops and (step or from_start):
            policy.eval()
            point = {"step": step} | spent | _evaluate(world, policy, task.evaluate())
            # The policy is still the reference: all margins are 0, or rounding, which decides nothing.
            yield point if step else point | {"accuracy": 50.0}
        if step < task.total_steps:
            policy.train()
            started = time.perf_counter()
            metrics = _update(parameters, optimizer, task, settings, step)
            spent["seconds"] += time.perf_counter() - started
            spent["comparisons"] += int(metrics["joint/edges"])
            spent["items"] += int(metrics["joint/items"])


def _evaluate(world: World, policy: Any, held_out: dict[str, float]) -> Row:
    judge = evaluation_judge(world.config, world.config.evaluate or EvaluateConfig())
    golds = {row["instruction_id"]: row["response"] for row in world.golds}
    judged = judge_samples(_sample(world, policy), golds, oracle(world.config, judge))
    found = win_rates_of(world, judged)[POLICY]
    return {
        "accuracy": 100 * held_out["eval_rewards/accuracies"],
        "loss": held_out["eval_loss"],
        "win_rate": found["win_rate"]["mean"],
        "win_rate_ci95": found["ci95"],
        "judged": judged,
    }


def win_rates_of(world: World, judged: Sequence[Row]) -> dict[str, Any]:
    """Win rates, in percent, of each model in rows of `records.SAMPLE_JUDGMENTS`."""
    settings = world.config.evaluate or EvaluateConfig()
    found = win_rates(pa.Table.from_pylist(judged), settings.bootstrap_samples, world.config.seed)
    return dict(found["models"])


def _sample(world: World, policy: Any) -> pa.Table:
    """A response to each instruction, as the sample stage gets it from the saved adapter with transformers.

    All points and modes of a seed are sampled with the same random numbers.
    """
    config, instructions = world.config, [row["instruction"] for row in world.golds]
    prompts = prompt_ids(world.tokenizer, layout_of(config.model), instructions)
    longest = (config.sample or SampleConfig()).max_new_tokens
    responses = dict.fromkeys(range(len(prompts)), "")
    with tempfile.TemporaryDirectory() as name:
        save_weights(Path(name), policy, world.tokenizer)
        model = SampledModel(POLICY, Path(name), world.sft)
        sampler = TransformersSampler(world.sft, [model], config.model.dtype, "cpu")
        order = sorted(responses, key=lambda number: len(prompts[number]))  # little padding
        for start in range(0, len(order), SAMPLING_BATCH):
            batch = order[start : start + SAMPLING_BATCH]
            requests = [Request(n, model, prompts[n], TEMPERATURE, config.seed * 1_000_000 + n) for n in batch]
            for answer in sampler.generate(requests, longest):
                responses[answer.number] = clean_response(answer.text, config.model.response_prefix)
    fixed = {"model": POLICY, "temperature": TEMPERATURE, "seed": config.seed}
    kept = ("instruction_id", "instruction")
    return pa.Table.from_pylist(
        [{key: row[key] for key in kept} | fixed | {"response": responses[n]} for n, row in enumerate(world.golds)]
    )
