"""Keyed dropout: a fair mask that depends on (seed, step, item, position, layer) and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.tiny import DROPOUT, World, config, policy_scorer
from jpo_ray.engine.dropout import KeyedDropout, install_dropout, mix32, mix_int, token_keys
from jpo_ray.engine.model import load_model
from jpo_ray.engine.passing import PassState
from jpo_ray.engine.scoring import make_scorer, score_items

WIDTH = 64


def mask(*, seed: int = 0, step: int = 0, item: int = 0, salt: int = 0, length: int = 200, p: float = 0.3) -> Tensor:
    """Mask of one item: float[length, WIDTH]."""
    keys = PassState()
    keys.tokens_BL = token_keys(seed, step, torch.full((1, length), item), torch.arange(length).unsqueeze(0))
    return KeyedDropout(p, salt, keys)(torch.ones(1, length, WIDTH))[0]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_and_mean(p: float) -> None:
    """12,800 elements: the share of zeros is p within 4 standard deviations, the mean 1, survivors 1 / (1 - p)."""
    found = mask(p=p)
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert (found == 0).double().mean().item() == pytest.approx(p, abs=4 * deviation)
    assert found.mean().item() == pytest.approx(1, abs=4 * deviation / (1 - p))
    assert found[found > 0].unique().tolist() == pytest.approx([1 / (1 - p)])


def test_rows_and_columns_are_fair_too() -> None:
    """No position and no feature is dropped much more often than others: 6 deviations over 64 or 2,000 elements."""
    zeros = (mask(length=2000) == 0).double()
    assert (zeros.mean(0) - 0.3).abs().max() < 6 * (0.21 / 2000) ** 0.5
    assert (zeros.mean(1) - 0.3).abs().max() < 6 * (0.21 / WIDTH) ** 0.5


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"step": 1}, {"item": 1}, {"salt": 1}, {"seed": 2**32 - 1}, {"seed": 2**32 - 1, "step": 1}],
    ids=str,
)
def test_another_key_is_an_independent_mask(other: dict[str, int]) -> None:
    """Both zero in a share of 0.3 * 0.3 = 0.09 of 12,800 elements, within 5 standard deviations (0.0126)."""
    here, there = mask() == 0, mask(**other) == 0
    assert (here & there).double().mean().item() == pytest.approx(0.09, abs=0.0126)
    assert torch.equal(mask(**other), mask(**other))


def test_steps_differ_for_the_largest_seed() -> None:
    seed = 2**32 - 1
    assert not torch.equal(mask(seed=seed, step=1), mask(seed=seed, step=2))


def test_positions_differ() -> None:
    """Neighbouring positions of one item share 0.09 of their elements as zeros in both."""
    zeros = mask(length=2000) == 0
    assert (zeros[1:] & zeros[:-1]).double().mean().item() == pytest.approx(0.09, abs=0.005)


def test_mask_is_the_items_own_in_any_batch() -> None:
    keys = PassState()
    layer = KeyedDropout(0.3, 5, keys)
    keys.tokens_BL = token_keys(1, 2, torch.tensor([[9], [4], [7]]).expand(3, 50), torch.arange(50).expand(3, 50))
    together = layer(torch.ones(3, 50, WIDTH))
    assert torch.equal(together[2, :30], mask(seed=1, step=2, item=7, salt=5, length=30))
    flat = layer(torch.ones(150, WIDTH))  # some layers see [B * L, D]
    assert torch.equal(flat.view(3, 50, WIDTH), together)


def test_evaluation_drops_nothing_and_training_needs_keys() -> None:
    layer = KeyedDropout(0.3, 0, PassState())
    x = torch.randn(2, 3, WIDTH)
    with pytest.raises(RuntimeError, match="score items through `score_items`"):
        layer(x)
    assert layer.eval()(x) is x


def test_install_replaces_every_active_dropout_once() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2))
    model = nn.ModuleDict({"a": nn.Dropout(0.1), "b": inner, "c": nn.Dropout(0)})
    model["a"].eval()
    state = PassState()
    install_dropout(model, state)
    first, second = model["a"], inner[1]
    assert isinstance(first, KeyedDropout)
    assert isinstance(second, KeyedDropout)
    assert (first.p, second.p, first.training, second.training) == (0.1, 0.2, False, True)
    assert first.salt != second.salt
    assert isinstance(model["c"], nn.Dropout)
    assert first.state is second.state is state
    install_dropout(model, state)
    assert (model["a"], inner[1]) == (first, second)  # a second scorer of the same model leaves them


def test_scores_depend_on_seed_step_and_item_but_not_on_the_batch(world: World) -> None:
    scorer = policy_scorer(world.model, config())
    policy = scorer.model
    with torch.no_grad():
        together = score_items(scorer, world.tokens, [3, 8, 5], step=4)
        alone = score_items(scorer, world.tokens, [8], step=4)
        later = score_items(scorer, world.tokens, [8], step=5)
        other_seed = score_items(make_scorer(policy, dropout_seed=4), world.tokens, [8], step=4)
        policy.eval()
        without = score_items(scorer, world.tokens, [8], step=4)
    assert torch.allclose(alone[0], together[1], atol=1e-4)
    for other in (later, other_seed, without):
        assert (other - alone).abs().sum() > 1e-2
    assert {m.p for m in policy.modules() if isinstance(m, KeyedDropout)} == {DROPOUT}


def test_attention_dropout_is_off_and_every_other_one_keyed(gpt2: Path) -> None:
    model = load_model(gpt2, dtype="float32")
    make_scorer(model)
    left = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert left == [0.0, 0.0]  # of the two attention layers
    assert [module.p for module in model.modules() if isinstance(module, KeyedDropout)] == [0.1] * 5


def test_mix32_is_a_bijection_with_avalanche() -> None:
    """100,000 values stay distinct; flipping one input bit flips about half of the 32 output bits."""
    x = torch.arange(100_000, dtype=torch.int32)
    assert len(mix32(x).unique()) == len(x)
    for bit in (0, 13, 30):
        flipped = mix32(x) ^ mix32(x ^ (1 << bit))
        ones = sum(((flipped >> k) & 1).double().mean().item() for k in range(32))
        assert ones == pytest.approx(16, abs=0.5)


def test_mix_int_keeps_all_bits_of_large_numbers() -> None:
    large = [10**18 + k for k in range(100)]
    assert len({mix_int(value) for value in large}) == 100
    assert all(0 <= mix_int(value) < 2**30 for value in [*large, -1, 2**31, 2**64])
