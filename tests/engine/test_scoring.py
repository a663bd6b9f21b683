"""Log-probs of items: the same alone, padded, in buckets and in chunks, and those of plain transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from engine.tiny import (
    PER_TOKEN,
    SIZES,
    World,
    all_plain,
    config,
    difference,
    gradients_of,
    make_llama,
    plain_scorer,
    policy_scorer,
    save,
    worst_per_token,
)
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine import logprobs
from jpo_ray.engine.micro_batches import micro_batches
from jpo_ray.engine.model import load_model
from jpo_ray.engine.scoring import make_scorer, score_items
from jpo_ray.engine.step import score_all
from jpo_ray.errors import InputError


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logprobs_are_those_of_plain_transformers(
    kind: str, packed: bool, world: World, request: pytest.FixtureRequest
) -> None:
    """Alone, all together and in micro-batches; the whole is the sum of the parts by construction."""
    folder, tokens = request.getfixturevalue(kind), world.tokens
    expected = all_plain(folder, tokens)
    scorer = plain_scorer(folder, packed=packed)
    assert scorer.packed == packed
    every = np.arange(len(tokens))
    with torch.no_grad():
        single = torch.cat([score_items(scorer, tokens, [row]) for row in every])
        padded = score_items(scorer, tokens, every)
    bucketed = score_all(scorer, tokens, every, max_tokens=150)
    assert len(scorer.micro_batches(tokens, every, 150)) > (3 if packed else 8)
    for scores in (single, padded, bucketed):
        assert worst_per_token(scores, expected, tokens) < PER_TOKEN


def test_parts_add_up_to_the_whole_whatever_the_boundary(world: World) -> None:
    """Moving the boundary moves log-prob from one part to the other; their sum stays."""
    tokens = world.tokens
    moved = TokenizedItems(tokens.ids, tokens.offsets, tokens.prompt_lengths - 3, tokens.truncated)
    scorer = plain_scorer(world.model)
    with torch.no_grad():
        before, after = (score_items(scorer, these, range(4)) for these in (tokens, moved))
    assert torch.allclose(before.sum(1), after.sum(1), atol=1e-6)
    assert bool((after[:, 1] < before[:, 1] - 1).all())


def test_instruction_part_is_the_same_for_both_responses(world: World) -> None:
    first, second = world.data.reference[0], world.data.reference[1]
    assert first[0] == pytest.approx(second[0], abs=1e-4)
    assert abs(first[1] - second[1]) > 1


@pytest.mark.parametrize("tied", [True, False])
def test_projection_in_chunks_changes_neither_values_nor_gradients(
    tied: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven tokens at a time against all at once; full parameters, so the head itself has a gradient."""
    folder = make_llama(tmp_path, tied=tied)
    train = config(use_peft=False)
    scorer = policy_scorer(folder, train)
    loss, whole = gradients_of(scorer, world.data, train)
    calls = []
    logits = logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", lambda *a: (calls.append(len(a[0])), logits(*a))[1])
    monkeypatch.setattr(logprobs, "MAX_CHUNK_LOGITS", {"cpu": 420 * 7})
    chunked_loss, chunked = gradients_of(scorer, world.data, train)
    assert max(calls) == 7
    assert chunked_loss == pytest.approx(loss, abs=1e-6)
    assert difference(chunked, whole) < 1e-5


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=32)),
        (CohereForCausalLM, CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)),
        (GraniteForCausalLM, GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)),
    ],
    ids=["softcap", "logit_scale", "logits_scaling"],
)
def test_models_that_change_their_logits_are_scored_through_them(
    kind: Any, changed: Any, world: World, tmp_path: Path
) -> None:
    folder = save(kind, changed, tmp_path, 0)
    scorer = plain_scorer(folder)
    assert scorer.head is None
    every = np.arange(len(world.tokens))
    scores = score_all(scorer, world.tokens, every, max_tokens=300)
    assert worst_per_token(scores, all_plain(folder, world.tokens), world.tokens) < PER_TOKEN


def test_a_cap_far_above_the_logits_is_seen_too(tmp_path: Path, llama: Path) -> None:
    """A cap at 30 changes the small logits of a fresh model by less than 1e-3: by its effect alone it would be missed,
    and bite when training makes logits large."""
    options = SIZES | {"initializer_range": 0.02}
    folder = save(Gemma2ForCausalLM, Gemma2Config(**options, final_logit_softcapping=30.0), tmp_path, 0)
    assert plain_scorer(folder).head is None
    assert plain_scorer(llama).head is not None


def test_models_that_draw_dropout_themselves_are_refused_unless_it_is_off() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "vocab_size": 100}
    with pytest.raises(InputError, match=r"OPTForCausalLM draws dropout .* set its dropout rates to 0 in config.json"):
        make_scorer(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)))
    quiet = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0)).eval()
    assert not make_scorer(quiet).model.training


def test_autocast_scores_near_float32(world: World) -> None:
    """bfloat16 has 8 bits: about 0.4 % per product, some 0.05 nats per token here; sums stay float64."""
    rough = make_scorer(load_model(world.model, dtype="float32"), autocast=torch.bfloat16)
    with torch.no_grad():
        scores = score_items(rough, world.tokens, range(24))
    assert scores.dtype == torch.float64
    worst = worst_per_token(scores, torch.from_numpy(world.data.reference), world.tokens)
    assert 1e-5 < worst < 0.05


def items_of(lengths: list[int]) -> TokenizedItems:
    return TokenizedItems(np.ones(sum(lengths), np.int32), np.cumsum([0, *lengths]), np.ones(len(lengths), np.int32), 0)


def test_micro_batches_hold_every_row_once_within_the_limit() -> None:
    """Lengths 5, 90, 20, 7, 6, 19 at 40 padded tokens: 90 alone, 20 + 19 (2 * 20 = 40), 7 + 6 + 5 (3 * 7 = 21)."""
    tokens = items_of([5, 90, 20, 7, 6, 19])
    found = [batch.tolist() for batch in micro_batches(tokens, np.arange(6), 40)]
    assert found == [[1], [2, 5], [3, 4, 0]]
    assert [batch.tolist() for batch in micro_batches(tokens, np.arange(6)[::-1], 40)] == found
    assert micro_batches(tokens, np.arange(0), 40) == []


@pytest.mark.parametrize(("rows", "at_least", "batches"), [(5, 4, 5), (8, 4, 4), (9, 4, 5), (3, 8, 3), (6, 1, 1)])
def test_at_least_so_many_micro_batches(rows: int, at_least: int, batches: int) -> None:
    """5 rows in at least 4: one each, as two each would make only 3. 3 rows cannot make more than 3."""
    assert len(micro_batches(items_of([4] * rows), np.arange(rows), 4096, at_least)) == batches
