"""Memory and speed as the engine counts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tiny import World, config, make_llama, policy_scorer
from jpo_ray.engine.memory import activation_bytes, free_bytes, tokens_to_keep
from jpo_ray.engine.model import load_model
from jpo_ray.engine.throughput import flops_per_token, matrix_peak


def test_bytes_per_token_are_of_the_order_of_the_models_activations(world: World) -> None:
    """Two layers of width 64 and 128 inside, of float32; a third of the tokens is shared and kept once."""
    scorer = policy_scorer(world.model, config(lora_dropout=0.0))
    found = activation_bytes(scorer, world.tokens)
    assert 2 * (5 * 64 + 2 * 128) * 4 < found < 2 * (30 * 64 + 12 * 128) * 4
    scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.model.enable_input_require_grads()
    assert activation_bytes(scorer, world.tokens) < found / 2


def test_the_budget_in_tokens(world: World) -> None:
    scorer = policy_scorer(world.model, config())
    each = activation_bytes(scorer, world.tokens)
    assert tokens_to_keep(scorer, world.tokens, 0.0) == 0
    assert tokens_to_keep(scorer, world.tokens, 1000 * each / 2**30) == pytest.approx(1000, abs=1)
    free = free_bytes(torch.device("cpu"))
    assert free > 2**28
    assert tokens_to_keep(scorer, world.tokens, None) == pytest.approx(free / 2 / each, rel=0.3)


def test_flops_per_token_by_hand(tmp_path: Path, llama: Path) -> None:
    """Two layers: 4 * 64 * 64 of attention and 3 * 64 * 128 of MLP, norms of 64; the tied head has 420 * 64."""
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    adapters = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert flops_per_token(policy_scorer(llama, config()).model) == 4 * (layers + 420 * 64) + 6 * adapters
    full = load_model(make_llama(tmp_path, tied=False), dtype="float32")
    assert flops_per_token(full) == 6 * (layers + 420 * 64)  # the input embeddings are looked up


def test_the_peak_is_a_matrix_products_speed() -> None:
    assert 1e9 < matrix_peak(torch.device("cpu"), torch.float32) < 1e14


def test_steps_report_their_speed(world: World) -> None:
    from jpo_ray.engine.tasks import preference_task

    scorer = policy_scorer(world.model, config())
    metrics = preference_task(scorer, world.data, config(), seed=0).gradients(0)
    assert metrics["joint/items"] == 12
    assert metrics["joint/edges"] == 12
    assert metrics["joint/items_per_second"] == pytest.approx(metrics["joint/comparisons_per_second"])
    rows = np.unique(np.concatenate([world.data.train[0].chosen, world.data.train[0].rejected]))
    assert metrics["tokens"] == world.tokens.lengths[rows].sum()
    assert 0 < metrics["mfu"] < 1.5
    seconds = 12 / metrics["joint/items_per_second"]
    computed = scorer.computed_tokens(world.tokens, rows)
    assert metrics["tokens_per_second"] == pytest.approx(computed / seconds, rel=0.5)
