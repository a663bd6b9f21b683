"""Before the first update the policy is the reference; anything else is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.tiny import World, config, difference, gradients_of
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.dataset import PreferenceData
from jpo_ray.engine.model import load_model, load_policy
from jpo_ray.engine.reference import TOLERANCE_PER_TOKEN, check_reference
from jpo_ray.engine.scoring import Scorer, make_scorer
from jpo_ray.engine.step import score_all
from jpo_ray.engine.tasks import check_margins, preference_task
from jpo_ray.errors import InputError


def scored_data(data: PreferenceData, folder: Path, **options: Any) -> PreferenceData:
    """The world's edges with the reference log-probs of another model, as the reference stage computes them."""
    model = load_model(folder, **({"dtype": "float32"} | options))
    scores = score_all(make_scorer(model), data.tokens, np.arange(len(data.tokens)), max_tokens=300)
    return replace(data, reference=scores.numpy())


def policy(folder: Path, train: TrainConfig, **options: Any) -> Scorer:
    model = BaseModelConfig(model_name_or_path=str(folder), **options)
    return make_scorer(load_policy(folder, model, train, seed=5))


@pytest.mark.parametrize("objective", ["jpo", "kto"])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_margins_are_zero_for_lora_and_full_parameters(objective: str, use_peft: bool, world: World) -> None:
    """Other padding than the reference's: rounding of float32, below 1e-6 nats per token."""
    train = config(objective=objective, use_peft=use_peft, max_micro_batch_tokens=130)
    assert check_margins(policy(world.model, train), world.data, train, "float32") < 1e-6


def test_margins_are_zero_for_four_bits_and_not_those_of_full_precision(world: World) -> None:
    data = scored_data(world.data, world.model, load_in_4bit=True)
    assert np.abs(data.reference - world.data.reference).sum(1).mean() > 0.5  # quantising is no rounding error
    train = config()
    scorer = policy(world.model, train, load_in_4bit=True)
    assert check_margins(scorer, data, train, "float32") < 1e-5
    with pytest.raises(InputError, match="do not belong to this model"):
        check_margins(scorer, world.data, train, "float32")


def test_adapters_on_four_bits_have_the_gradient_of_the_dequantised_model(world: World) -> None:
    """Scored in evaluation mode first, as training does: bitsandbytes then swaps in layers that have no backward pass,
    unless it is kept from it. Tolerance: its CPU kernel multiplies in another order."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    train = config(lora_dropout=0.0)
    exact, rounded = policy(world.model, train), policy(world.model, train, load_in_4bit=True)
    layers = [(name, module) for name, module in rounded.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    with torch.no_grad():
        for name, layer in layers:
            exact.model.get_submodule(name).weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        for ours, theirs in zip(exact.model.parameters(), rounded.model.parameters(), strict=True):
            if ours.requires_grad:
                theirs += 0.05
                ours.copy_(theirs)
    check = [score_all(scorer, world.tokens, np.arange(24), max_tokens=300) for scorer in (exact, rounded)]
    assert float((check[0] - check[1]).abs().max()) < 1e-2
    for scorer in (exact, rounded):
        scorer.model.train()
    (loss, gradient), (other_loss, other) = (gradients_of(scorer, world.data, train) for scorer in (rounded, exact))
    assert loss == pytest.approx(other_loss, abs=1e-4)
    assert difference(gradient, other) < 1e-4


def test_margins_are_zero_in_bfloat16(world: World) -> None:
    data = scored_data(world.data, world.model, dtype="bfloat16")
    train = config(max_micro_batch_tokens=130)
    scorer = policy(world.model, train, dtype="bfloat16")
    assert check_margins(scorer, data, train, "bfloat16") < TOLERANCE_PER_TOKEN["bfloat16"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft, of any GPT-2
def test_a_models_own_dropout_is_no_margin(gpt2: Path, world: World) -> None:
    """peft hands the model over in training mode; the check scores without dropout."""
    data = scored_data(world.data, gpt2)
    for use_peft in (True, False):
        train = config(use_peft=use_peft)
        scorer = policy(gpt2, train)
        assert check_margins(scorer, data, train, "float32") < 1e-6


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_one_changed_weight_is_refused(use_peft: bool, world: World) -> None:
    train = config(use_peft=use_peft)
    scorer = policy(world.model, train)
    with torch.no_grad():
        next(scorer.model.parameters())[5, 7] += 1.0  # of the embedding: an often used token's
        changed = next(p for name, p in scorer.model.named_parameters() if "layers.1.mlp.up_proj" in name)
        changed[3, 4] += 1.0
    with pytest.raises(InputError, match="run `jpo reference` again") as caught:
        check_margins(scorer, world.data, train, "float32")
    assert "differ by " in str(caught.value)
    assert "rounding in float32 explains 0.0001" in str(caught.value)


def test_reference_of_other_items_is_refused(world: World) -> None:
    train = config()
    rolled = replace(world.data, reference=np.roll(world.data.reference, 1, axis=0))
    with pytest.raises(InputError, match="do not belong to this model"):
        check_margins(policy(world.model, train), rolled, train, "float32")


def test_training_starts_at_log_two(world: World) -> None:
    """All margins zero: -log sigmoid(0) = log 2 = 0.6931, dropout on or off (LoRA's B is zero)."""
    train = config()
    scorer = policy(world.model, train)
    scorer.model.train()
    metrics = preference_task(scorer, world.data, train, seed=0).gradients(0)
    assert metrics["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_check_reference_by_hand() -> None:
    """Item 0: |-7 + 7.0009| = 0.0009 over 10 tokens = 9e-5; item 1: 0.004 over 100 tokens = 4e-5."""
    fresh = np.array([[-3.0, -4.0], [-50.0, -60.0]])
    cached = np.array([[-3.0, -4.0009], [-50.004, -60.0]])
    tokens = np.array([10, 100])
    assert check_reference(fresh, cached, tokens, "float32") == pytest.approx(9e-5)
    with pytest.raises(InputError, match=r"differ by 0\.00018 nats per token"):
        check_reference(fresh, cached, np.array([5, 100]), "float32")
    assert check_reference(fresh, cached, np.array([5, 100]), "bfloat16") == pytest.approx(1.8e-4)
    with pytest.raises(InputError, match="differ by nan"):
        check_reference(fresh * np.nan, cached, tokens, "float32")
