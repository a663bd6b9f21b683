"""What a worker runs, from artifacts on disk to a model on disk; the same seed gives the same weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.tiny import INSTRUCTIONS, LAYOUT, RESPONSES, config, plain_scorer
from jpo_ray import records
from jpo_ray.config import BaseModelConfig, SFTConfig, TrainConfig
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine import jobs
from jpo_ray.engine.dataset import mismatched_partners
from jpo_ray.engine.jobs import PreferenceInputs, load_preferences, train_preferences, train_sft
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.engine.step import score_all
from jpo_ray.errors import InputError

MODEL = BaseModelConfig(model_name_or_path="-", template=LAYOUT.template, max_length=LAYOUT.max_length)
FLAGS = {"source": "s", "gold": False}


@dataclass(frozen=True)
class Tables:
    """Artifacts as the stages write them: twelve items, eight preferences, references with mismatched items."""

    inputs: PreferenceInputs
    items: list[dict[str, Any]]
    reference: list[dict[str, Any]]


def item_rows() -> list[dict[str, Any]]:
    """Of the sixth instruction, items of the validation split; the first response of each is D_S's."""
    return [
        {
            "item_id": records.item_id(instruction, response),
            "instruction_id": records.instruction_id(instruction),
            "instruction": instruction,
            "response": response,
            "split": "validation" if number == 5 else "train",
            "sft": place == 0,
        }
        | FLAGS
        for number, (instruction, pair) in enumerate(zip(INSTRUCTIONS, RESPONSES, strict=True))
        for place, response in enumerate(pair)
    ]


def preference_rows(ids: list[str]) -> list[dict[str, Any]]:
    edges = [(0, 1, "conditional"), (2, 3, "conditional"), (4, 5, "conditional"), (6, 7, "conditional")]
    edges += [(0, 3, "joint"), (4, 7, "joint"), (2, 9, "joint"), (10, 11, "conditional")]
    return [
        {"chosen": ids[w], "rejected": ids[l], "protocol": kind, "weight": 1.0, "probability": 1.0}
        | {"split": "validation" if w >= 10 else "train"}
        for w, l, kind in edges  # noqa: E741
    ]


def reference_rows(model: Path, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every item, then each with its partner's response."""
    partners = mismatched_partners([row["instruction_id"] for row in items], seed=0)
    sources = [*range(12), *partners]
    instructions = [row["instruction"] for row in items] * 2
    responses = [items[source]["response"] for source in sources]
    tokens = tokenize(load_tokenizer(model), LAYOUT, instructions, responses)
    scores = score_all(plain_scorer(model), tokens, np.arange(24), max_tokens=500).tolist()
    return [
        {
            "item_id": items[number % 12]["item_id"],
            "response_of": items[sources[number]]["item_id"],
            "instruction_logprob": scores[number][0],
            "response_logprob": scores[number][1],
            "instruction_tokens": int(tokens.instruction_tokens[number]),
            "response_tokens": int(tokens.response_tokens[number]),
        }
        for number in range(24)
    ]


@pytest.fixture(scope="module")
def tables(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder, items = tmp_path_factory.mktemp("tables"), item_rows()
    reference = reference_rows(llama, items)
    records.write_table(folder / "items.parquet", items, records.ITEMS)
    preferences = preference_rows([row["item_id"] for row in items])
    records.write_table(folder / "preferences.parquet", preferences, records.PREFERENCES)
    records.write_table(folder / "reference.parquet", reference, records.REFERENCE)
    return Tables(PreferenceInputs(llama, folder, folder, folder), items, reference)


def with_reference(tables: Tables, rows: list[dict[str, Any]], folder: Path) -> PreferenceInputs:
    records.write_table(folder / "reference.parquet", rows, records.REFERENCE)
    return replace(tables.inputs, reference=folder)


def entry(**options: Any) -> TrainConfig:
    return config(comparisons_per_step=4, num_train_epochs=3, warmup_steps=1, **options)


def trained(out: Path, tables: Tables, options: TrainConfig) -> dict[str, Any]:
    return train_preferences(out, "cpu", None, tables.inputs, MODEL, options, None)


def adapter(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())])


@pytest.mark.parametrize("objective", ["jpo", "dpo", "kto"])
def test_every_objective_trains_and_learns_its_comparisons(objective: str, tables: Tables, tmp_path: Path) -> None:
    """DPO has the four conditional comparisons, the others seven; after three epochs the loss is below the first."""
    state = trained(tmp_path, tables, entry(objective=objective, lora_dropout=0.0))
    comparisons = 4 if objective == "dpo" else 7
    assert (state["comparisons"], state["validation_comparisons"], state["truncated"]) == (comparisons, 1, 0)
    assert state["global_step"] == 3 * -(-comparisons // 4)
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert losses[0] == pytest.approx(0.5 if objective == "kto" else 0.693147, abs=1e-4)
    assert losses[-1] < losses[0] - 0.05
    assert [log["epoch"] for log in state["log_history"] if "eval_loss" in log] == [1.0, 2.0, 3.0]


def test_the_same_seed_gives_the_same_weights(tables: Tables, tmp_path: Path) -> None:
    """With dropout on, one worker, CPU: equal to the last bit. Another seed ends elsewhere."""
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        trained(tmp_path / name, tables, entry(seed=seed))
    first, again, other = (adapter(tmp_path / name) for name in ("first", "again", "other"))
    assert torch.equal(first, again)
    assert float((first - other).norm() / first.norm()) > 0.5


def test_steps_can_be_given_and_comparisons_limited(tables: Tables, tmp_path: Path) -> None:
    options = entry(max_train_comparisons=5)
    state = train_preferences(tmp_path, "cpu", None, tables.inputs, MODEL, options, 3)
    assert (state["global_step"], state["comparisons"]) == (3, 5)


def test_sft_lowers_the_loss_of_d_s(tables: Tables, llama: Path, tmp_path: Path) -> None:
    """Five training items (one a response of each instruction but the sixth, which is held out), one step an epoch."""
    options = SFTConfig(num_train_epochs=5, warmup_steps=0, learning_rate=3e-3, seed=0)
    state = train_sft(tmp_path, "cpu", None, llama, tables.inputs.items, MODEL, options)
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    held_out = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    assert (state["items"], state["global_step"], len(held_out)) == (5, 5, 5)
    assert losses[-1] < losses[0] - 1
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_final_weights_have_the_configured_dtype(tables: Tables, llama: Path, tmp_path: Path) -> None:
    """Trained in float32 under bfloat16 autocast; checkpoints keep float32, so that resuming loses nothing."""
    model = MODEL.model_copy(update={"dtype": "bfloat16"})
    train_sft(tmp_path, "cpu", None, llama, tables.inputs.items, model, SFTConfig(num_train_epochs=1, warmup_steps=0))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    kept = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}


def test_a_stale_reference_is_refused(tables: Tables, tmp_path: Path) -> None:
    rows = [row | {"response_logprob": row["response_logprob"] - 0.5} for row in tables.reference]
    stale = with_reference(tables, rows, tmp_path)
    with pytest.raises(InputError, match="do not belong to this model"):
        train_preferences(tmp_path / "out", "cpu", None, stale, MODEL, entry(), None)
    assert not (tmp_path / "out").exists()


def test_another_template_is_refused_by_the_margins(tables: Tables, tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"template": "Q: {instruction}\nA:"})
    with pytest.raises(InputError, match="do not belong to this model"):
        train_preferences(tmp_path / "out", "cpu", None, tables.inputs, model, entry(), None)


def test_a_reference_that_lacks_items_is_refused(tables: Tables, tmp_path: Path) -> None:
    without = with_reference(tables, tables.reference[2:12], tmp_path)
    with pytest.raises(InputError, match="the reference lacks 2 of 11 items; run `jpo reference` again"):
        load_preferences(load_tokenizer(tables.inputs.model), without, MODEL, entry())


def test_kto_without_mismatched_items_is_refused(tables: Tables, tmp_path: Path) -> None:
    without = with_reference(tables, tables.reference[:12], tmp_path)
    with pytest.raises(InputError, match=r"^train\.kto: kto "):
        load_preferences(load_tokenizer(tables.inputs.model), without, MODEL, entry(objective="kto"))


def test_no_comparisons_of_the_wanted_kind_are_refused(tables: Tables, tmp_path: Path) -> None:
    ids = [row["item_id"] for row in tables.items]
    conditional = [row for row in preference_rows(ids) if row["protocol"] == "conditional"]
    records.write_table(tmp_path / "preferences.parquet", conditional, records.PREFERENCES)
    inputs = replace(tables.inputs, judge=tmp_path)
    with pytest.raises(InputError, match=r"^train\.jpo: no decisive joint preferences to train on"):
        load_preferences(load_tokenizer(tables.inputs.model), inputs, MODEL, entry(protocols=["joint"]))


def test_loaded_rows_belong_together(tables: Tables) -> None:
    """Only items that some preference names; row n + i is item i's instruction with its partner's response."""
    tokenizer = load_tokenizer(tables.inputs.model)
    data = load_preferences(tokenizer, tables.inputs, MODEL, entry(objective="kto"))
    used = [row for number, row in enumerate(tables.items) if number != 8]
    assert (data.items, len(data.tokens), data.reference.shape) == (11, 22, (22, 2))
    by_id = {row["item_id"]: row for row in tables.items}
    known = {(row["item_id"], row["response_of"]): row for row in tables.reference}
    partner = {row["item_id"]: row["response_of"] for row in tables.reference[12:]}
    for place, row in enumerate(used):
        own, other = row["item_id"], partner[row["item_id"]]
        assert data.reference[place, 1] == known[own, own]["response_logprob"]
        assert data.reference[11 + place, 1] == known[own, other]["response_logprob"]
        text = tokenizer.decode(data.tokens.item(11 + place))
        assert text.endswith(f"Response: {by_id[other]['response']}<eos>")
        assert row["instruction"] in text


@pytest.mark.parametrize(
    ("option", "probe"),
    [
        ({"gradient_checkpointing": True}, lambda scorer, *_: scorer.model.is_gradient_checkpointing),
        ({"batching": "pairs"}, lambda _s, _d, train, *_: train.batching == "pairs"),
    ],
)
def test_options_reach_the_engine(
    option: dict[str, Any], probe: Any, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    make_task = jobs.preference_task

    def noted(*arguments: Any) -> Any:
        seen.append(probe(*arguments))
        return make_task(*arguments)

    monkeypatch.setattr(jobs, "preference_task", noted)
    trained(tmp_path / "plain", tables, entry())
    trained(tmp_path / "with", tables, entry(**option))
    assert seen == [False, True]


def test_items_per_comparison_are_those_of_the_steps(tables: Tables, tmp_path: Path) -> None:
    """Seven comparisons of nine items an epoch, in steps of four and three."""
    state = trained(tmp_path / "run", tables, entry())
    logged = [one for one in state["log_history"] if "joint/items" in one]
    expected = sum(one["joint/items"] for one in logged) / sum(one["joint/edges"] for one in logged)
    assert state["items_per_comparison"] == round(expected, 3)
    assert 1 < state["items_per_comparison"] <= 2
