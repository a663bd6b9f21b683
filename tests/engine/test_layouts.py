"""However items are laid out for a forward pass, alone, padded, packed or with a shared instruction, scores and
gradients are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from engine.tiny import World, config, difference, gradients_of, policy_scorer, save
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.dropout import KeyedDropout
from jpo_ray.engine.micro_batches import MAX_SHARED_TOKENS, lay_out, micro_batches, tree_tokens, trees_of
from jpo_ray.engine.model import load_model
from jpo_ray.engine.probes import attention_mask
from jpo_ray.engine.scoring import Scorer, make_scorer, score_items
from jpo_ray.engine.step import accumulate_gradients

SIZES = {
    "vocab_size": 420, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
LAYOUTS = {"shared": (True, False), "packed": (False, True), "packed and shared": (True, True)}


def rebuilt(scorer: Scorer, *, share: bool, packed: bool) -> Scorer:
    """Another scorer of the same model and dropout seed."""
    return make_scorer(scorer.model, dropout_seed=scorer.dropout_seed, share=share, packed=packed)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_layouts_give_the_same_scores_and_gradients_with_dropout_on(
    layout: str, kind: str, use_peft: bool, world: World, request: pytest.FixtureRequest
) -> None:
    share, packed = LAYOUTS[layout]
    train = config(use_peft=use_peft, lora_target_modules="all-linear")
    plain = rebuilt(policy_scorer(request.getfixturevalue(kind), train), share=False, packed=False)
    other = rebuilt(plain, share=share, packed=packed)
    assert (other.share, other.packed) == (share, packed)
    rows = np.array([7, 2, 3, 11, 10, 6, 0, 14])
    expected, gradient = scores_and_gradient(plain, world, rows)
    for max_tokens in (10**6, 150):
        found, its_gradient = scores_and_gradient(other, world, rows, max_tokens=max_tokens)
        assert (found - expected).abs().max() < 2e-4
        assert difference(its_gradient, gradient) < 1e-5
    drops = [module.p for module in plain.model.modules() if isinstance(module, KeyedDropout)]
    assert bool(drops) == (use_peft or kind == "gpt2")


def test_an_instruction_is_scored_once_for_all_its_items(world: World) -> None:
    scorer = policy_scorer(world.model, config())
    laid = lay_out(world.tokens, np.array([0, 1, 12, 4]), share=True, packed=False)
    assert laid.ids_BL.shape[0] == 2  # items 0, 1 and 12 (a mismatched response) are of one instruction
    assert laid.instruction_M.tolist() == [0, 0, 0, 4]
    assert laid.response_M.tolist() == [1, 2, 3, 5]
    tokens = world.tokens
    prompt, other = int(tokens.prompt_lengths[0]), int(tokens.prompt_lengths[4])
    assert len(laid.source_T) == prompt - 1 + tokens.response_tokens[[0, 1, 12]].sum() + tokens.lengths[4] - 1
    computed = prompt + other + int(tokens.response_tokens[[0, 1, 12, 4]].sum())
    assert scorer.computed_tokens(tokens, np.array([0, 1, 12, 4])) == computed
    scores = score_items(scorer, tokens, [0, 1, 12, 4]).detach()
    assert scores[0, 0] == scores[1, 0] == scores[2, 0] != scores[3, 0]


def test_what_is_laid_out_is_the_items_tokens(world: World) -> None:
    """Every scored token is predicted by the one before it in its item, whatever stands between them."""
    tokens = world.tokens
    for share, packed in [(False, False), *LAYOUTS.values()]:
        rows = np.array([5, 0, 1, 13, 4])
        laid = lay_out(tokens, rows, share=share, packed=packed)
        flat, positions = laid.ids_BL.ravel(), laid.position_BL.ravel()
        for place, row in enumerate(rows.tolist()):
            pieces = (laid.piece_T == laid.instruction_M[place]) | (laid.piece_T == laid.response_M[place])
            item = tokens.item(row)
            assert laid.target_T[pieces].tolist() == item[1:].tolist()
            assert flat[laid.source_T[pieces]].tolist() == item[:-1].tolist()
            assert positions[laid.source_T[pieces]].tolist() == list(range(len(item) - 1))


def items_of(prompts: list[int], responses: list[int]) -> TokenizedItems:
    """Items whose instruction is `prompts[i]` repeated so many times."""
    rows = [[prompt] * prompt + [1] * response for prompt, response in zip(prompts, responses, strict=True)]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return TokenizedItems(np.concatenate(rows).astype(np.int32), offsets, np.array(prompts, np.int32), 0)


def test_trees_hold_items_of_one_instruction_up_to_a_length() -> None:
    tokens = items_of([3, 5, 3, 3, 5], [10, 10, 20, 30, 10])
    rows = np.arange(5)
    assert [tree.tolist() for tree in trees_of(tokens, rows, share=True)] == [[0, 2, 3], [1, 4]]
    assert [tree.tolist() for tree in trees_of(tokens, rows, share=True, longest=40)] == [[0, 2], [3], [1, 4]]
    assert [tree.tolist() for tree in trees_of(tokens, rows, share=False)] == [[0], [1], [2], [3], [4]]
    assert tree_tokens(tokens, np.array([0, 2, 3])) == 63


def test_packed_micro_batches_count_tokens_and_padded_ones_their_longest_row() -> None:
    tokens = items_of([3, 4, 5, 6], [7, 16, 5, 4])  # 10, 20, 10, 10
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 40, packed=True)] == [[1, 0, 2], [3]]
    assert [b.tolist() for b in micro_batches(tokens, np.arange(4), 40)] == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("kind", "settings", "shares", "packs"),
    [
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None), True, True),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=16), True, False),
        (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, sliding_window=16, query_pre_attn_scalar=32), True, False),
        (
            MambaForCausalLM,
            MambaConfig(vocab_size=420, hidden_size=32, num_hidden_layers=2, state_size=8),
            False,
            False,
        ),
    ],
    ids=["full attention", "sliding window", "mixed windows", "no attention"],
)
def test_models_share_and_pack_as_far_as_their_attention_allows(
    kind: Any, settings: Any, shares: bool, packs: bool, world: World, tmp_path: Path
) -> None:
    """A window of 16 tokens acts on the 30 to 60 of an item: such rows are not shared, and the scores stay right."""
    folder = save(kind, settings, tmp_path, 0)
    with torch.no_grad():
        wished = make_scorer(load_model(folder, dtype="float32"), share=True, packed=True)
        assert (wished.share, wished.packed) == (shares, packs)
        alone = make_scorer(load_model(folder, dtype="float32"), share=False, packed=False)
        found, expected = (score_items(scorer, world.tokens, np.arange(12)) for scorer in (wished, alone))
    assert (found - expected).abs().max() < 2e-4


def test_long_trees_are_cut() -> None:
    tokens = items_of([100] * 60, [100] * 60)
    sizes = [tree_tokens(tokens, tree) for tree in trees_of(tokens, np.arange(60), share=True)]
    assert max(sizes) <= MAX_SHARED_TOKENS
    assert len(sizes) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joint_and_conditional_losses_do_not_see_the_layout(layout: str, world: World) -> None:
    share, packed = LAYOUTS[layout]
    for objective in ("jpo", "kto"):
        train = config(objective=objective)
        plain = rebuilt(policy_scorer(world.model, train), share=False, packed=False)
        loss, gradient = gradients_of(plain, world.data, train)
        other_loss, other = gradients_of(rebuilt(plain, share=share, packed=packed), world.data, train)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert difference(other, gradient) < 1e-5


def test_flex_attention_gets_the_same_mask(world: World) -> None:
    """The mask alone: FlexAttention itself has no backward pass on CPUs."""
    from torch.nn.attention.flex_attention import create_mask

    laid = lay_out(world.tokens, np.array([0, 1, 12, 4, 5]), share=True, packed=True)
    parts = [torch.from_numpy(part) for part in (laid.piece_BL, laid.tree_BL, laid.is_instruction_BL)]
    dense = attention_mask(load_model(world.model, dtype="float32"), *parts)
    length = laid.ids_BL.shape[1]
    blocks = attention_mask(load_model(world.model, dtype="float32", attention="flex_attention"), *parts)
    assert blocks.shape == (1, 1, length, length)
    allowed = create_mask(blocks.mask_mod, 1, 1, length, length, device="cpu")
    assert torch.equal(allowed, dense == 0)
    assert 0.1 < allowed.float().mean() < 0.4
