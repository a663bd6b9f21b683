"""Every loss that TRL has, beside TRL's own code on random log-probs.

TRL's trainers compute a loss within one method, from a model's output. Here that method runs on a trainer without a
model: the "output" holds the log-probs that our losses get, laid out over as many tokens as their items have.
"""

import warnings
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jpo_ray.objectives import LOSSES, Edges, Items, mixture
from objectives.batch import hard, random_edges, random_items

trl = pytest.importorskip("trl", reason="trl is not installed (pip install -e '.[dev]')")

BETA = 0.3
SMOOTHING = 0.15
PROMPT_TOKENS = 3
PAIRS = [
    # ours, our further parameters, TRL's loss_type
    ("dpo", {}, "sigmoid"),
    ("jpo", {}, "sigmoid"),
    ("slic", {}, "hinge"),
    ("ipo", {}, "ipo"),
    ("robust", {"label_smoothing": SMOOTHING}, "robust"),
    ("sppo", {}, "sppo_hard"),
    ("apo_zero", {}, "apo_zero"),
    ("apo_down", {}, "apo_down"),
    ("sft", None, "sft"),
]


def conditional_batch() -> tuple[Items, Edges]:
    items = random_items(12, per_list=2)
    return items, hard(random_edges(items, joint=False))


def accelerator() -> Any:
    def same(value: Any) -> Any:
        return value

    return SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=same, gather=same)


def laid_out(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token log-probs [rows, length] that sum to `log_probs`, and the mask of completion tokens [rows, 1 + length].

    Rows are padded on the right and have a prompt before, whose tokens TRL's fused head gives no log-prob.
    """
    length = PROMPT_TOKENS + int(tokens.max())
    place = torch.arange(1 + length)
    mask = (place > PROMPT_TOKENS) & (place <= PROMPT_TOKENS + tokens[:, None])
    return torch.where(mask[:, 1:], (log_probs / tokens)[:, None], 0.0), mask.long()


def output_of(per_token: Tensor, **_: Any) -> Any:
    """A model's output as TRL reads it, whatever its input; what only its metrics read is zero."""
    zero = torch.zeros_like(per_token)
    return SimpleNamespace(log_probs=per_token, entropy=zero, mean_logits=zero, is_top1=zero.bool(), aux_loss=None)


def trl_dpo_losses(items: Items, edges: Edges, loss_type: str) -> list[float]:
    """DPOTrainer's loss of each edge alone."""
    ends = zip(edges.chosen_E.tolist(), edges.rejected_E.tolist(), strict=True)
    return [trl_dpo_loss(items, torch.tensor(pair), {loss_type: 1.0}) for pair in ends]


def trl_dpo_loss(items: Items, rows: Tensor, weight_of: dict[str, float], *, whole: bool = False) -> float:
    """DPOTrainer's loss of a batch: `rows` are the chosen items, then the rejected ones. The completion is the
    response, or where `whole` instruction and response, behind a prompt that says nothing.
    """
    assert items.reference is not None
    tokens = items.response_tokens_N + (items.instruction_tokens_N if whole else 0)
    policy, reference = (side.whole_N if whole else side.response_N for side in (items.policy, items.reference))
    per_token, mask = laid_out(policy[rows], tokens[rows])
    ref_chosen, ref_rejected = reference[rows].chunk(2)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[*weight_of],
        loss_weights=[*weight_of.values()], beta=BETA, label_smoothing=SMOOTHING, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "completion_mask": mask, "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
        "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    return float(trl.DPOTrainer._compute_loss(trainer, partial(output_of, per_token), inputs, return_outputs=False))


@pytest.mark.parametrize(("name", "parameters", "loss_type"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_losses_of_dpo_trainer(name: str, parameters: dict[str, float] | None, loss_type: str) -> None:
    items, edges = conditional_batch()
    keywords = {} if parameters is None else {"beta": BETA, **parameters}
    ours = LOSSES[name](items, edges, **keywords).loss_E.tolist()
    assert ours == pytest.approx(trl_dpo_losses(items, edges, loss_type), rel=1e-9)
    assert len(set(ours)) > 1 or name == "slic"


JOINT = [pair for pair in PAIRS if pair[0] not in ("dpo", "sft")]  # of responses alone


@pytest.mark.parametrize(("name", "parameters", "loss_type"), JOINT, ids=[pair[0] for pair in JOINT])
def test_joint_losses_of_dpo_trainer(name: str, parameters: dict[str, float], loss_type: str) -> None:
    """Two instructions, whose whole sequences TRL is given as completions."""
    items = random_items(12, per_list=1)
    edges = hard(random_edges(items))
    assert bool(edges.joint_E.all())
    ours = LOSSES[name](items, edges, beta=BETA, **parameters).loss_E.tolist()
    ends = zip(edges.chosen_E.tolist(), edges.rejected_E.tolist(), strict=True)
    theirs = [trl_dpo_loss(items, torch.tensor(pair), {loss_type: 1.0}, whole=True) for pair in ends]
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    "weight_of",
    [
        {"dpo": 0.8, "slic": 0.2},
        {"dpo": 0.5, "robust": 1.0, "apo_zero": 2.0},
        {"ipo": 0.7, "sppo": 0.01},
    ],
    ids=" + ".join,
)
def test_sums_of_dpo_trainer(weight_of: dict[str, float]) -> None:
    """Its list of `loss_type` with `loss_weights`, over a whole batch."""
    items, edges = conditional_batch()
    theirs = {loss_type: weight_of[name] for name, _, loss_type in PAIRS if name in weight_of}
    rows = torch.cat([edges.chosen_E, edges.rejected_E])
    assert mean_of_sum(items, edges, weight_of) == pytest.approx(trl_dpo_loss(items, rows, theirs), rel=1e-14)


def test_of_a_batch_trls_sft_averages_tokens_and_ours_responses() -> None:
    """The one term of a sum that differs, by just that: of responses of equal length they are the same."""
    items, edges = conditional_batch()
    rows = torch.cat([edges.chosen_E, edges.rejected_E])
    log_prob_E, tokens_E = items.policy.response_N[edges.chosen_E], items.response_tokens_N[edges.chosen_E]
    ours = mean_of_sum(items, edges, {"dpo": 1.0, "sft": 0.5})
    theirs = trl_dpo_loss(items, rows, {"sigmoid": 1.0, "sft": 0.5})
    per_response, per_token = -(log_prob_E / tokens_E).mean(), -log_prob_E.sum() / tokens_E.sum()
    assert abs(per_response - per_token) > 0.01
    assert ours - theirs == pytest.approx(0.5 * float(per_response - per_token), rel=1e-12)
    equal = replace(items, response_tokens_N=torch.full_like(items.response_tokens_N, 7))
    ours = mean_of_sum(equal, edges, {"dpo": 1.0, "sft": 0.5})
    assert ours == pytest.approx(trl_dpo_loss(equal, rows, {"sigmoid": 1.0, "sft": 0.5}), rel=1e-14)


def mean_of_sum(items: Items, edges: Edges, weight_of: dict[str, float]) -> float:
    """Of the batch, each objective with the parameters of the table."""
    parameters = {name: {} if given is None else {"beta": BETA, **given} for name, given, _ in PAIRS}
    parts = [LOSSES[name](items, edges, **parameters[name]) for name in weight_of]
    return float(mixture(parts, [*weight_of.values()]).loss_E.mean())


def test_cdpo_is_cpo_trainers_smoothed_loss_of_log_ratios() -> None:
    """TRL's DPOTrainer no longer smooths labels; its CPOTrainer does, on what it is given as log-probs."""
    items, edges = conditional_batch()
    ours = LOSSES["cdpo"](items, edges, beta=BETA, label_smoothing=SMOOTHING)
    ratio = items.ratios.response_N
    theirs, chosen, rejected = cpo_loss(ratio[edges.chosen_E], ratio[edges.rejected_E], "sigmoid", SMOOTHING)
    assert torch.allclose(ours.loss_E, theirs, rtol=1e-9)
    assert torch.allclose(ours.chosen_E, chosen)
    assert torch.allclose(ours.rejected_E, rejected)


def test_simpo_is_cpo_trainers() -> None:
    items, edges = conditional_batch()
    ours = LOSSES["simpo"](items, edges, beta=BETA, simpo_gamma=0.7)
    mean = items.policy.response_N / items.response_tokens_N
    theirs, chosen, rejected = cpo_loss(mean[edges.chosen_E], mean[edges.rejected_E], "simpo", 0.0, gamma=0.7)
    assert torch.allclose(ours.loss_E, theirs, rtol=1e-9)
    assert torch.allclose(ours.chosen_E, chosen)
    assert torch.allclose(ours.rejected_E, rejected)


def cpo_loss(chosen: Tensor, rejected: Tensor, loss_type: str, smoothing: float, gamma: float = 0.0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.cpo import CPOTrainer
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=accelerator(), loss_type=loss_type, simpo_gamma=gamma, beta=BETA,
        label_smoothing=smoothing,
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)


def test_orpo_is_orpo_trainers() -> None:
    """TRL's odds-ratio part (computed in float32) and the mean log-prob of the chosen response."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    items, edges = conditional_batch()
    mean = items.policy.response_N / items.response_tokens_N
    trainer = SimpleNamespace(beta=BETA, accelerator=accelerator())
    chosen, rejected = mean[edges.chosen_E], mean[edges.rejected_E]
    odds_ratio_part, *rewards = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[:3]
    ours = LOSSES["orpo"](items, edges, beta=BETA)
    assert torch.allclose(ours.loss_E, -chosen - odds_ratio_part.double(), rtol=1e-5)
    assert torch.allclose(ours.chosen_E.float(), rewards[0])
    assert torch.allclose(ours.rejected_E.float(), rewards[1])


@pytest.mark.parametrize("shift", [0.0, -9.0], ids=["z_0 above 0", "z_0 clamped at 0"])
def test_kto_is_kto_trainers(shift: float) -> None:
    """TRL averages over examples; each edge is two of them."""
    items, edges = conditional_batch()
    assert items.mismatched_K is not None
    assert items.reference is not None
    mismatched = items.mismatched_K + shift
    ends = torch.cat([edges.chosen_E, edges.rejected_E])
    per_token, mask = laid_out(items.policy.response_N[ends], items.response_tokens_N[ends])
    count = len(edges.chosen_E)
    batch = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "label": torch.arange(2 * count) < count, "ref_logps": items.reference.response_N[ends],
        "ref_KL_logps": torch.zeros_like(mismatched),
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator(), aux_loss_enabled=False, loss_type="kto",
        precompute_ref_logps=True, calculate_KL=True, beta=BETA, desirable_weight=1.3, undesirable_weight=0.6,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda *_: mismatched,
    )  # fmt: skip
    theirs = trl.KTOTrainer._compute_loss(trainer, partial(output_of, per_token), batch, return_outputs=False)
    items = Items(**(items.__dict__ | {"mismatched_K": mismatched}))
    ours = LOSSES["kto"](items, edges, beta=BETA, desirable_weight=1.3, undesirable_weight=0.6)
    assert ours.loss_E.mean().item() == pytest.approx(float(theirs), rel=1e-9)
    assert ours.chosen_E.mean().item() == pytest.approx(trainer._metrics["train"]["rewards/chosen"][0])
    assert ours.rejected_E.mean().item() == pytest.approx(trainer._metrics["train"]["rewards/rejected"][0])
