"""One batch's gradient: the same in however many micro-batches; JPO on edges within an instruction is DPO."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tiny import World, config, difference, edges, gradients_of, make_lists, only_conditional, policy_scorer
from jpo_ray.config_objective import OBJECTIVES
from jpo_ray.config_training import SFTConfig
from jpo_ray.engine import step as step_module
from jpo_ray.engine.dataset import PreferenceData
from jpo_ray.engine.objective import batch_rows, loss_of_scores, weighted_mean
from jpo_ray.engine.schedules import EdgeSchedule, weighted_by_list
from jpo_ray.engine.scoring import score_items
from jpo_ray.engine.step import accumulate_gradients
from jpo_ray.engine.tasks import preference_task, sft_task
from jpo_ray.objectives import Edges, Items, ItemScores
from jpo_ray.objectives.losses import jpo

SAME = 2e-5  # relative norm of the difference of two float32 gradients that sum in another order


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_jpo_within_instructions_is_dpo(dropout: float, use_peft: bool, world: World) -> None:
    """Loss and all parameter gradients, with and without dropout; DPO does not score the instructions."""
    data = only_conditional(world.data)
    jpo_config = config(protocols=["conditional"], lora_dropout=dropout, use_peft=use_peft)
    dpo_config = config(objective="dpo", lora_dropout=dropout, use_peft=use_peft)
    scorer = policy_scorer(world.model, jpo_config)
    jpo_loss, jpo_gradient = gradients_of(scorer, data, jpo_config)
    dpo_loss, dpo_gradient = gradients_of(scorer, data, dpo_config)
    assert jpo_loss == pytest.approx(dpo_loss, abs=1e-7)
    assert difference(jpo_gradient, dpo_gradient) < 1e-6
    assert float(jpo_gradient.norm()) > 1e-2


def test_joint_edges_make_jpo_another_loss_than_dpo(world: World) -> None:
    train = config()
    scorer = policy_scorer(world.model, train)
    joint_loss, joint_gradient = gradients_of(scorer, world.data, train)
    other_loss, other_gradient = gradients_of(scorer, only_conditional(world.data), train)
    assert abs(joint_loss - other_loss) > 1e-3
    assert difference(joint_gradient, other_gradient) > 0.1


def test_gradient_is_that_of_a_pair_trainer(world: World) -> None:
    """Against the plain way: both items of every edge scored for it, autograd through the weighted mean loss."""
    train = config(lora_dropout=0.0)
    scorer, data, beta = policy_scorer(world.model, train), world.data, train.beta
    loss, gradient = gradients_of(scorer, data, train)
    scorer.model.zero_grad(set_to_none=True)
    batch = data.train[0]
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected, joint, weight, *label in zip(*batch.__dict__.values(), strict=True):
        policy = score_items(scorer, data.tokens, [chosen, rejected])
        reference = torch.from_numpy(data.reference[[chosen, rejected]])
        graph = Edges(torch.tensor([0]), torch.tensor([1]), torch.tensor([bool(joint)]), *torch.tensor([label]).T)
        rest = torch.ones(3, 2, dtype=torch.int64)  # token counts and lists, which JPO does not read
        outcome = jpo(Items(ItemScores(*policy.T), ItemScores(*reference.T), *rest), graph, beta=beta)
        total = total + float(weight) * outcome.loss_E.sum()
    total = total / float(batch.weight.sum())
    total.backward()
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    plain = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert loss == pytest.approx(total.item(), abs=1e-6)
    assert difference(gradient, plain) < SAME


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gradient_is_that_of_the_loss_of_all_items_at_once(name: str, world: World) -> None:
    """Micro-batches in two phases against autograd through one graph of all items, of every objective."""
    train = config(objective=name, lora_dropout=0.0, max_micro_batch_tokens=120, activation_memory_gib=0.0)
    data = make_lists(world.model).data if train.joins == "lists" else world.data
    data = data if "joint" in train.protocols else only_conditional(data)
    scorer = policy_scorer(world.model, train)
    loss, gradient = gradients_of(scorer, data, train)
    scorer.model.zero_grad(set_to_none=True)
    rows = batch_rows(data, data.train[0], train)
    outcome = loss_of_scores(data, data.train[0], rows, train)(score_items(scorer, data.tokens, rows))
    total = weighted_mean(outcome.loss_E, weighted_by_list(data, data.train[0], train))
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.requires_grad and p.grad is not None])
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert difference(gradient, plain) < SAME
    assert float(plain.norm()) > 1e-3


def test_a_mixture_has_the_weighted_sum_of_the_gradients(world: World) -> None:
    parts = [("jpo", 1.0, {"beta": 0.5}), ("simpo", 0.5, {}), ("sft", 0.1, {})]
    also = [{"objective": name, "weight": weight, **keys} for name, weight, keys in parts[1:]]
    mixed = config(lora_dropout=0.0, also=also)
    scorer = policy_scorer(world.model, mixed)
    loss, gradient = gradients_of(scorer, world.data, mixed)
    alone = [gradients_of(scorer, world.data, config(objective=name, name="x", lora_dropout=0.0)) for name, *_ in parts]
    weights = [weight for _, weight, _ in parts]
    assert loss == pytest.approx(sum(w * part for w, (part, _) in zip(weights, alone, strict=True)), rel=1e-6)
    summed = torch.stack([w * part for w, (_, part) in zip(weights, alone, strict=True)]).sum(dim=0)
    assert difference(gradient, summed) < SAME
    metrics = preference_task(scorer, world.data, mixed, seed=0).gradients(0)
    assert [metrics[f"loss/{name}"] for name, *_ in parts] == pytest.approx([part for part, _ in alone], rel=1e-6)


@pytest.mark.parametrize("objective", ["jpo", "kto"])
@pytest.mark.parametrize(
    "split",
    [
        {"max_micro_batch_tokens": 120},
        {"max_micro_batch_tokens": 120, "activation_memory_gib": 0.0},
        {"max_micro_batch_tokens": 1, "activation_memory_gib": 5e-4},
        {"gradient_accumulation_steps": 3},
    ],
    ids=["one phase", "two phases", "item by item, some kept", "accumulation"],
)
def test_micro_batches_change_nothing_with_dropout_on(
    objective: str, split: dict[str, int], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_config, split_config = config(objective=objective), config(objective=objective, **split)
    scorer = policy_scorer(world.model, whole_config)
    passes = []
    score = step_module.score_items
    monkeypatch.setattr(step_module, "score_items", lambda *a, **k: (passes.append(len(a[2])), score(*a, **k))[1])
    loss, whole = gradients_of(scorer, world.data, whole_config)
    one_phase = len(passes)
    split_loss, parts = gradients_of(scorer, world.data, split_config)
    again = 2 if objective == "jpo" and "activation_memory_gib" in split else 1  # KTO never waits for another item
    assert len(passes) - one_phase > again * one_phase
    assert split_loss == pytest.approx(loss, abs=1e-6)
    assert difference(parts, whole) < SAME
    off = policy_scorer(world.model, config(objective=objective, lora_dropout=0.0))
    assert difference(gradients_of(off, world.data, whole_config)[1], whole) > 0.01  # dropout was on


def test_a_model_with_dropout_of_its_own_splits_too(gpt2: Path, world: World) -> None:
    """GPT-2: embedding and residual dropout are keyed; attention dropout, inside a fused kernel, is switched off."""
    whole_config = config(use_peft=False)
    scorer = policy_scorer(gpt2, whole_config)
    _, whole = gradients_of(scorer, world.data, whole_config)
    _, parts = gradients_of(scorer, world.data, config(use_peft=False, max_micro_batch_tokens=120))
    assert difference(parts, whole) < SAME
    _, again = gradients_of(scorer, world.data, whole_config, step=1)
    assert difference(again, whole) > 0.01
    scorer.model.eval()
    assert difference(gradients_of(scorer, world.data, whole_config)[1], whole) > 0.01


def test_recomputed_activations_meet_the_same_masks(world: World) -> None:
    train = config()
    scorer = policy_scorer(world.model, train)
    _, kept = gradients_of(scorer, world.data, train)
    scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.model.enable_input_require_grads()
    _, recomputed = gradients_of(scorer, world.data, train)
    assert difference(recomputed, kept) < SAME


def test_graph_and_pairs_batches_of_the_same_comparisons_have_the_same_gradient(world: World) -> None:
    """All comparisons in one step, which the modes put in different orders."""
    scorer = policy_scorer(world.model, config())
    (graph_loss, graph), (pairs_loss, pairs) = (
        gradients_of(scorer, world.data, config(batching=mode)) for mode in ("graph", "pairs")
    )
    assert graph_loss == pytest.approx(pairs_loss, abs=1e-9)
    assert difference(graph, pairs) < SAME


def test_an_epoch_of_either_mode_has_the_same_gradient_in_all(world: World) -> None:
    """Three comparisons a batch, the weights standing still: the batches differ, their sum does not."""
    scorer = policy_scorer(world.model, config(lora_dropout=0.0))
    sums, batches = {}, {}
    for mode in ("graph", "pairs"):
        train = config(lora_dropout=0.0, batching=mode, comparisons_per_step=3)
        schedule = EdgeSchedule(world.data, world.data.train, train, seed=0)
        batches[mode] = [tuple(sorted(schedule.numbers(step)[1].tolist())) for step in range(schedule.steps_per_epoch)]
        sums[mode] = sum(
            len(batch) * gradients_of(scorer, world.data, train, step=step)[1]
            for step, batch in enumerate(batches[mode])
        )
    assert set(batches["graph"]) != set(batches["pairs"])
    assert sorted(sum(batches["graph"], ())) == sorted(sum(batches["pairs"], ())) == list(range(world.data.train.count))
    assert difference(sums["graph"], sums["pairs"]) < SAME


def test_comparisons_within_micro_batches_keep_nothing_for_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory to keep anything, and yet no second forward pass: both items of each comparison are scored together."""
    data, train = only_conditional(world.data), config(objective="dpo")
    scorer = policy_scorer(world.model, train)
    loss, whole = gradients_of(scorer, data, train)
    passes: list[int] = []
    score = step_module.score_items
    monkeypatch.setattr(step_module, "score_items", lambda *a, **k: (passes.append(len(a[2])), score(*a, **k))[1])
    split = config(objective="dpo", max_micro_batch_tokens=160, activation_memory_gib=0.0)
    split_loss, parts = gradients_of(scorer, data, split)
    assert len(passes) > 2
    assert sum(passes) == 12
    assert split_loss == pytest.approx(loss, abs=1e-6)
    assert difference(parts, whole) < SAME


def test_a_chain_of_comparisons_runs_backward_as_it_goes(world: World) -> None:
    """Items 0-1-2-...-11 compared in a row, a few to a micro-batch: each waits for the next one alone."""
    scorer = policy_scorer(world.model, config())
    planned = step_module.plan(scorer, world.tokens, np.arange(12), max_tokens=60)
    order = torch.cat([one.places for one in planned[0]]).numpy()
    chain = np.stack([order[:-1], order[1:]], axis=1)
    last = len(planned[0]) - 1
    assert last >= 3
    assert step_module._due(planned, chain, 12) == [*range(1, last + 1), last]
    assert step_module._due(planned, chain[:0], 12) == list(range(last + 1))
    assert step_module._due(planned, None, 12) == [last] * (last + 1)


def test_gradients_are_added_to_what_is_there(world: World) -> None:
    train = config(lora_dropout=0.0)
    scorer = policy_scorer(world.model, train)
    parameter = next(p for name, p in scorer.model.named_parameters() if "lora_B" in name)
    found = []
    for _ in range(2):
        accumulate_gradients(scorer, world.tokens, np.arange(4), lambda s: s.sum() / 100, max_tokens=4096)
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    assert torch.allclose(found[1], 2 * found[0], rtol=1e-5, atol=1e-7)


def test_sft_gradient_is_that_of_the_mean_over_response_tokens(world: World) -> None:
    """Split or whole, and against the loss written out for items 0 to 3."""
    rows = np.arange(4)
    options = {"items_per_step": 4, "warmup_steps": 0}
    scorer = policy_scorer(world.model, config(use_peft=False))
    found = []
    for limit in (4096, 60):
        task = sft_task(scorer, world.tokens, rows, rows, SFTConfig(max_micro_batch_tokens=limit, **options), seed=0)  # type: ignore[arg-type]
        scorer.model.zero_grad(set_to_none=True)
        metrics = task.gradients(0)
        found.append(torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]))
    scorer.model.zero_grad(set_to_none=True)
    loss = -score_items(scorer, world.tokens, rows)[:, 1].sum() / int(world.tokens.response_tokens[rows].sum())
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None])
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["tokens"] == int(world.tokens.lengths[rows].sum())
    assert task.evaluate()["eval_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert max(difference(found[0], plain), difference(found[1], plain)) < SAME


def test_metrics_of_a_step(world: World) -> None:
    """At the reference all margins are 0: loss log 2, no edge is right; items counted once, edges all."""
    train = config(lora_dropout=0.0)
    scorer = policy_scorer(world.model, train, moved=False)
    metrics = preference_task(scorer, world.data, train, seed=0).gradients(0)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert (metrics["joint/items"], metrics["joint/edges"]) == (12, 12)
    assert metrics["tokens"] == int(world.tokens.lengths[:12].sum())
    whole = world.data.reference.sum(1)
    assert metrics["logps/chosen"] == pytest.approx(whole[world.data.train[0].chosen].mean(), abs=1e-2)
    assert metrics["logps/rejected"] == pytest.approx(whole[world.data.train[0].rejected].mean(), abs=1e-2)


def test_metrics_after_a_move_by_hand(world: World) -> None:
    """From the scores themselves: margins split in parts, accuracies by kind of edge, unweighted means."""
    train = config(lora_dropout=0.0)
    scorer = policy_scorer(world.model, train)
    with torch.no_grad():
        ratios = (score_items(scorer, world.tokens, range(12)).numpy() - world.data.reference[:12]) * train.beta
    metrics = preference_task(scorer, world.data, train, seed=0).gradients(0)
    e = world.data.train[0]
    instruction = np.where(e.joint, ratios[e.chosen, 0] - ratios[e.rejected, 0], 0)
    response = ratios[e.chosen, 1] - ratios[e.rejected, 1]
    right = instruction + response > 0
    assert metrics["joint/margin_instruction"] == pytest.approx(instruction.mean(), abs=1e-5)
    assert metrics["joint/margin_response"] == pytest.approx(response.mean(), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx((instruction + response).mean(), abs=1e-5)
    assert metrics["rewards/chosen"] - metrics["rewards/rejected"] == pytest.approx(metrics["rewards/margins"])
    assert metrics["rewards/accuracies"] == right.mean()
    assert metrics["joint/accuracy_joint"] == right[e.joint].mean()
    assert metrics["joint/accuracy_conditional"] == right[~e.joint].mean()
    losses = np.log1p(np.exp(-(instruction + response)))
    assert metrics["loss"] == pytest.approx((losses * e.weight).sum() / e.weight.sum(), abs=1e-5)


def test_evaluation_scores_the_held_out_edges_in_evaluation_mode(world: World) -> None:
    """The same edges as training's give, without dropout, the loss that training sees without dropout."""
    data = PreferenceData(world.tokens, world.data.reference, 12, world.data.train, world.data.train[0])
    train = config(max_micro_batch_tokens=200)
    scorer = policy_scorer(world.model, train)
    scorer.model.eval()
    task = preference_task(scorer, data, train, seed=0)
    held_out, trained = task.evaluate(), task.gradients(0)
    assert held_out["eval_loss"] == pytest.approx(trained["loss"], abs=1e-6)
    assert held_out["eval_rewards/accuracies"] == trained["rewards/accuracies"]
    nothing = PreferenceData(world.tokens, world.data.reference, 12, world.data.train, edges([], []))
    assert preference_task(scorer, nothing, train, seed=0).evaluate() == {}
