"""However items are laid out for a forward pass, alone, padded, packed or with a shared instruction, scores and
gradients are the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from engine.tiny import SIZES, World, config, difference, gradients_of, only_conditional, policy_scorer, save
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.dropout import KeyedDropout
from jpo_ray.engine.micro_batches import lay_out, micro_batches, tree_tokens, trees_of
from jpo_ray.engine.model import load_model
from jpo_ray.engine.scoring import Scorer, make_scorer, score_items
from jpo_ray.engine.step import accumulate_gradients
from jpo_ray.engine.tasks import preference_task


def rebuilt(scorer: Scorer, *, packed: bool) -> Scorer:
    """Another scorer of the same model and dropout seed."""
    return make_scorer(scorer.model, dropout_seed=scorer.dropout_seed, packed=packed)


def scores_and_gradient(
    scorer: Scorer, world: World, rows: np.ndarray, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a loss that weighs every part of every item differently."""
    scorer.model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, 2 * len(rows), dtype=torch.float64).view(-1, 2)
    scores = accumulate_gradients(
        scorer, world.tokens, rows, lambda s: (s * weights).sum() / 50, step=3, **({"max_tokens": 10**6} | options)
    )
    gradients = [p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]
    return scores, torch.cat(gradients)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_packed_rows_give_the_scores_and_gradients_of_padded_ones_with_dropout_on(
    kind: str, use_peft: bool, world: World, request: pytest.FixtureRequest
) -> None:
    """Three of the eight items share an instruction, and two more."""
    train = config(use_peft=use_peft, lora_target_modules="all-linear")
    other = policy_scorer(request.getfixturevalue(kind), train)
    assert other.packed
    rows = np.array([7, 2, 3, 11, 10, 6, 0, 14])
    plain = replace(other, packed=False)
    expected, gradient = scores_and_gradient(plain, world, rows)
    for max_tokens in (10**6, 150):
        found, its_gradient = scores_and_gradient(other, world, rows, max_tokens=max_tokens)
        assert (found - expected).abs().max() < 2e-4
        assert difference(its_gradient, gradient) < 1e-5
    drops = [module.p for module in plain.model.modules() if isinstance(module, KeyedDropout)]
    assert bool(drops) == (use_peft or kind == "gpt2")


def test_an_instruction_is_scored_once_for_all_its_items(world: World) -> None:
    scorer = policy_scorer(world.model, config())
    laid = lay_out(
        world.tokens, np.array([0, 1, 12, 4]), packed=True
    )  # 12: a mismatched response to the first instruction
    assert laid.instruction_M.tolist() == [0, 0, 0, 4]
    assert laid.response_M.tolist() == [1, 2, 3, 5]
    tokens = world.tokens
    prompt, other = int(tokens.prompt_lengths[0]), int(tokens.prompt_lengths[4])
    assert len(laid.source_S) == prompt - 1 + tokens.response_tokens[[0, 1, 12]].sum() + tokens.lengths[4] - 1
    computed = prompt + other + int(tokens.response_tokens[[0, 1, 12, 4]].sum())
    assert scorer.computed_tokens(tokens, np.array([0, 1, 12, 4])) == computed
    scores = score_items(scorer, tokens, [0, 1, 12, 4]).detach()
    assert scores[0, 0] == scores[1, 0] == scores[2, 0] != scores[3, 0]


def test_what_is_laid_out_is_the_items_tokens(world: World) -> None:
    """Every scored token is predicted by the one before it in its item, whatever stands between them."""
    tokens = world.tokens
    for packed in (False, True):
        rows = np.array([5, 0, 1, 13, 4])
        laid = lay_out(tokens, rows, packed=packed)
        flat, positions = laid.ids_BL.ravel(), laid.position_BL.ravel()
        for place, row in enumerate(rows.tolist()):
            pieces = (laid.piece_S == laid.instruction_M[place]) | (laid.piece_S == laid.response_M[place])
            item = tokens.item(row)
            assert laid.target_S[pieces].tolist() == item[1:].tolist()
            assert flat[laid.source_S[pieces]].tolist() == item[:-1].tolist()
            assert positions[laid.source_S[pieces]].tolist() == list(range(len(item) - 1))


def items_of(prompts: list[int], responses: list[int]) -> TokenizedItems:
    """Items whose instruction is `prompts[i]` repeated so many times."""
    rows = [[prompt] * prompt + [1] * response for prompt, response in zip(prompts, responses, strict=True)]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return TokenizedItems(np.concatenate(rows).astype(np.int32), offsets, np.array(prompts, np.int32), 0)


def test_trees_hold_items_of_one_instruction() -> None:
    tokens = items_of([3, 5, 3, 3, 5], [10, 10, 20, 30, 10])
    rows = np.arange(5)
    assert [tree.tolist() for tree in trees_of(tokens, rows, share=True)] == [[0, 2, 3], [1, 4]]
    assert [tree.tolist() for tree in trees_of(tokens, rows, share=False)] == [[0], [1], [2], [3], [4]]
    assert tree_tokens(tokens, np.array([0, 2, 3])) == 63


def test_packed_micro_batches_count_tokens_and_padded_ones_their_longest_row() -> None:
    tokens = items_of([3, 4, 5, 6], [7, 16, 5, 4])  # 10, 20, 10, 10
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 40, packed=True)] == [[1, 0, 2], [3]]
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 70)] == [[1], [0, 2, 3]]
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 80)] == [[1, 0, 2, 3]]  # padding for one pass less
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 40)] == [[1], [0, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=40),
    max_tokens=st.integers(1, 900),
    at_least=st.integers(1, 5),
    packed=st.booleans(),
)
def test_micro_batches_hold_every_item_once_within_the_limit(
    lengths: list[int], max_tokens: int, at_least: int, packed: bool
) -> None:
    tokens = items_of([1 + place % 4 for place in range(len(lengths))], [length - 1 for length in lengths])
    rows = np.random.default_rng(0).permutation(len(lengths))
    batches = micro_batches(tokens, rows, max_tokens, at_least, packed=packed)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) >= min(at_least, len(lengths))
    for batch in batches:
        trees = sum(tree_tokens(tokens, tree) for tree in trees_of(tokens, batch, share=True))
        assert len(batch) == 1 or (trees if packed else tokens.lengths[batch].max() * len(batch)) <= max_tokens
        assert len(batch) <= max(1, len(lengths) // at_least)


def test_cells_hold_each_item_and_give_each_token_one_result(world: World) -> None:
    rows = np.array([5, 0, 1, 13, 4, 12])
    laid = lay_out(world.tokens, rows, packed=True)
    flat = laid.ids_BL.ravel()
    found, at = [], 0
    for count, length in laid.buckets:
        for _ in range(count):
            found.append(flat[laid.token_N[at : at + length]].tolist())
            at += length
    assert at == len(laid.token_N)
    items = [world.tokens.item(int(row)).tolist() for row in rows]
    assert sorted(
        cell[: len(item)] for cell, item in zip(found, sorted(items, key=len, reverse=True), strict=True)
    ) == sorted(items)
    assert laid.token_N[laid.cell_T].tolist() == list(range(len(flat)))
    assert not laid.each_once


@pytest.mark.parametrize(
    ("kind", "model_config", "packs"),
    [
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None), True),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=16), True),
        (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=32), True),
        (
            MambaForCausalLM,
            MambaConfig(vocab_size=420, hidden_size=32, num_hidden_layers=2, state_size=8),
            False,
        ),
    ],
    ids=["full attention", "sliding window", "mixed windows", "no attention"],
)
def test_models_pack_where_their_attention_allows(
    kind: Any, model_config: Any, packs: bool, world: World, tmp_path: Path
) -> None:
    """A window of 16 tokens acts on the 30 to 60 of an item as it does on the item alone."""
    folder = save(kind, model_config, tmp_path, 0)
    with torch.no_grad():
        wished = make_scorer(load_model(folder, dtype="float32"))
        assert wished.packed == packs
        alone = make_scorer(load_model(folder, dtype="float32"), packed=False)
        found, expected = (score_items(scorer, world.tokens, np.arange(12)) for scorer in (wished, alone))
    assert (found - expected).abs().max() < 2e-4


def test_joint_and_conditional_losses_do_not_see_the_layout(world: World) -> None:
    for objective in ("jpo", "kto"):
        train = config(objective=objective)
        scorer = policy_scorer(world.model, train)
        loss, gradient = gradients_of(scorer, world.data, train)
        other_loss, other = gradients_of(replace(scorer, packed=False), world.data, train)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert difference(other, gradient) < 1e-5


def test_instructions_that_no_loss_looks_at_are_not_scored(world: World) -> None:
    """The response part and its gradient stay; the projection to the vocabulary leaves out the instructions' tokens."""
    scorer = policy_scorer(world.model, config())
    rows = np.array([0, 1, 5])
    full, part = (lay_out(world.tokens, rows, packed=True, instruction=wanted) for wanted in (True, False))
    scored = world.tokens.response_tokens[rows].sum()
    assert len(part.source_S) == scored < len(full.source_S)
    both, responses = (score_items(scorer, world.tokens, rows, 3, instruction=wanted) for wanted in (True, False))
    assert torch.allclose(responses[:, 1], both[:, 1], atol=1e-5)
    assert torch.equal(responses[:, 0], torch.zeros(3, dtype=torch.float64))
    for objective in ("dpo", "kto", "jpo"):
        metrics = preference_task(scorer, only_conditional(world.data), config(objective=objective), 0).gradients(0)
        assert (abs(metrics["logps/chosen"]) < 60) == (objective != "jpo")  # of responses alone, as TRL logs them


def test_generation_is_that_of_the_model_as_it_was(world: World) -> None:
    """Left padding too: without items to look at, attention is transformers' own."""
    model = load_model(world.model, dtype="float32")
    ids = torch.randint(3, 420, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    scorer = make_scorer(model)
    assert scorer.packed
    score_items(scorer, world.tokens, [3, 4])
    scorer.state.clear()
    assert torch.equal(model.generate(ids, **options), before)


def test_checkpointed_layers_meet_their_own_items(world: World) -> None:
    """Each micro-batch's layers run again in backward, when another micro-batch was scored last."""
    scorer = policy_scorer(world.model, config())
    rows = np.arange(12)
    _, gradient = scores_and_gradient(scorer, world, rows, max_tokens=150)
    scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.model.enable_input_require_grads()
    _, recomputed = scores_and_gradient(scorer, world, rows, max_tokens=150)
    assert difference(recomputed, gradient) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_may_run_again_in_another_thread(checkpointing: bool, world: World) -> None:
    """As on CUDA, where autograd has a thread of its own for the device."""
    scorer = policy_scorer(world.model, config())
    if checkpointing:
        scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
        scorer.model.enable_input_require_grads()
    gradients = []
    for in_thread in (False, True):
        scorer.model.zero_grad(set_to_none=True)
        loss = score_items(scorer, world.tokens, range(6), step=3).sum() / 50
        if in_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]))
    assert difference(gradients[1], gradients[0]) < 1e-6
