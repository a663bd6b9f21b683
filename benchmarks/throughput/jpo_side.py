"""This engine: its public parts, put together as `jpo_ray.engine.loop` does."""

from dataclasses import replace
from pathlib import Path

import torch

from jpo_ray.engine.dataset import EdgeList, EdgeShards, PreferenceData
from jpo_ray.engine.model import add_lora
from jpo_ray.engine.optim import make_optimizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all, trainable
from jpo_ray.engine.tasks import preference_task
from throughput.job import BETA, LEARNING_RATE, Job, Trace
from throughput.measure import MatrixFlops, PeakMemory, matrix_parameters, now
from throughput.model import SHAPES, base_model, set_lora_b
from throughput.work import SEED, Work, rows_of, train_config


def run_jpo(job: Job, work: Work, batches: list[EdgeList]) -> Trace:
    """Reference pass of the base model, then updates of its adapters."""
    micro = job.micro_batch
    config = train_config(work, learning_rate=LEARNING_RATE, beta=BETA, max_micro_batch_tokens=micro)
    base = base_model(Path(job.model), SHAPES[job.shape], job.device, job.dtype)
    parameters = matrix_parameters(base)
    rows = rows_of(work.edges)
    started = now(job.device)
    scores = score_all(make_scorer(base), work.tokens, rows, max_tokens=micro)
    reference_s = now(job.device) - started
    reference = torch.zeros(len(work.tokens), 2, dtype=torch.float64)
    reference[rows] = scores.cpu()
    policy = add_lora(base, config, seed=SEED)
    set_lora_b(policy)
    if job.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    nothing = work.edges.take(rows[:0])
    data = PreferenceData(work.tokens, reference.numpy(), len(work.tokens), EdgeShards.of(work.edges), nothing)
    scorer = make_scorer(policy)
    task = preference_task(scorer, data, config, SEED, len(batches))
    optimizer = make_optimizer(trainable(policy), config)
    policy.train()
    memory = PeakMemory(job.device)
    memory.start()
    losses, norms, seconds = [], [], []
    for step in range(len(batches)):
        started = now(job.device)
        optimizer.zero_grad(set_to_none=True)
        metrics = task.gradients(step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable(policy), config.max_grad_norm)))
        optimizer.step()
        seconds.append(now(job.device) - started)
        losses.append(metrics["loss"])
    above = memory.above()
    # Products are counted in this thread alone, so without lanes, and when time and memory have been taken.
    with MatrixFlops() as counter:
        preference_task(replace(scorer, cores=1), data, config, SEED, len(batches)).gradients(0)
    return Trace(
        losses,
        norms,
        seconds,
        reference_s,
        len(work.edges),
        counter.flops,
        memory.base,
        above,
        parameters,
    )
