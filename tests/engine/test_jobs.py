"""What a worker runs, from artifacts on disk to a model on disk; the same seed gives the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.tables import Tables, make_tables, preference_rows, vector_of
from engine.tiny import LAYOUT, config
from jpo_ray import records, shards
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_objective import OBJECTIVES
from jpo_ray.config_training import SFTConfig, TrainConfig
from jpo_ray.engine import jobs
from jpo_ray.engine.jobs import PreferenceInputs, load_preferences, train_preferences, train_sft
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.errors import InputError

MODEL = BaseModelConfig(model_name_or_path="-", template=LAYOUT.template, max_length=LAYOUT.max_length)


@pytest.fixture(scope="module")
def tables(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return make_tables(llama, tmp_path_factory.mktemp("tables"))


def with_reference(tables: Tables, rows: list[dict[str, Any]], folder: Path) -> PreferenceInputs:
    records.write_table(folder / "reference.parquet", rows, records.REFERENCE)
    return replace(tables.inputs, reference=folder)


def entry(**options: Any) -> TrainConfig:
    return config(**({"comparisons_per_step": 4, "num_train_epochs": 3, "warmup_steps": 1} | options))


def trained(out: Path, tables: Tables, options: TrainConfig) -> dict[str, Any]:
    return train_preferences(out, "cpu", None, tables.inputs, MODEL, options, None)


def adapter(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "adapter_model.safetensors").items())])


# The loss before the first update, where policy and reference are one; None: it depends on the model.
AT_START = dict.fromkeys(OBJECTIVES) | {
    "jpo": np.log(2), "dpo": np.log(2), "cdpo": np.log(2), "robust": np.log(2), "dpop": np.log(2), "rpo": np.log(2),
    "odpo": np.log([1.5, 2.5, *[3.0] * 5]).mean(), "slic": 1.0, "ipo": (1 / 0.2) ** 2, "kto": 0.5,
    "sppo": 2 * (1 / 2e-3) ** 2, "apo_zero": 1.0, "apo_down": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_trains_and_learns_its_comparisons(objective: str, tables: Tables, tmp_path: Path) -> None:
    """Of one instruction alone there are four comparisons, with joint ones seven, all of an epoch in one step. In the
    sixth the loss is lower and the mean margin larger than in the first. (ODPO's loss is log(1 + gap) at the start.)
    """
    options = entry(objective=objective, lora_dropout=0.0, comparisons_per_step=7, num_train_epochs=6)
    state = trained(tmp_path, tables, options)
    comparisons = 4 if OBJECTIVES[objective].conditional_only else 7
    assert (state["comparisons"], state["validation_comparisons"], state["truncated"]) == (comparisons, 1, 0)
    assert state["global_step"] == 6
    first, *_, last = [log for log in state["log_history"] if "loss" in log]
    if (expected := AT_START[objective]) is not None:
        assert first["loss"] == pytest.approx(expected, rel=2e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=2e-4)
    assert last["loss"] < 0.98 * first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"]
    assert [log["epoch"] for log in state["log_history"] if "eval_loss" in log] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("objective", ["simpo", "orpo", "pro", "sft"])
def test_no_reference_is_read_where_none_is_needed(objective: str, tables: Tables, tmp_path: Path) -> None:
    state = trained(
        tmp_path, replace(tables, inputs=replace(tables.inputs, reference=None)), entry(objective=objective)
    )
    assert state["global_step"] > 0


def test_a_curriculum_by_the_reference_reads_it_whatever_the_objective(tables: Tables) -> None:
    options = entry(objective="simpo", curriculum={"easy": "reference"})
    data = load_preferences(load_tokenizer(tables.inputs.model), tables.inputs, MODEL, options)
    assert data.reference is not None


@pytest.mark.parametrize(
    ("options", "needing"),
    [
        ({"objective": "odpo"}, "odpo"),
        ({"also": [{"objective": "odpo"}]}, "odpo"),
        ({"curriculum": {"phases": 2}}, "a curriculum by gap"),
    ],
)
def test_comparisons_without_gaps_are_refused_where_they_are_needed(
    options: dict[str, Any], needing: str, tables: Tables, tmp_path: Path
) -> None:
    rows = preference_rows([row["item_id"] for row in tables.items])
    rows[2]["gap"] = rows[7]["gap"] = None
    records.write_table(tmp_path / "preferences.parquet", rows, records.PREFERENCES)
    inputs = replace(tables.inputs, judge=tmp_path)
    with pytest.raises(InputError) as caught:
        load_preferences(load_tokenizer(inputs.model), inputs, MODEL, entry(**options))
    assert str(caught.value) == (
        f"train.{options.get('objective', 'jpo')}: {needing} needs to know by how much each chosen item is better, and "
        "2 of 8 comparisons do not say; judge by scores (judge.annotator: ratings or reward_model) or with judge.soft, "
        "and without judge.closure"
    )
    assert load_preferences(load_tokenizer(inputs.model), inputs, MODEL, entry()).train[0].gap[:2].tolist() == [
        0.5,
        1.5,
    ]


def test_preferences_of_before_there_were_gaps_are_read(tables: Tables, tmp_path: Path) -> None:
    rows = preference_rows([row["item_id"] for row in tables.items])
    old = records.PREFERENCES.remove(records.PREFERENCES.get_field_index("gap"))
    records.write_table(tmp_path / "preferences.parquet", rows, old)
    inputs = replace(tables.inputs, judge=tmp_path)
    data = load_preferences(load_tokenizer(inputs.model), inputs, MODEL, entry())
    assert np.isnan(data.train[0].gap).all()


def test_embeddings_are_those_of_the_items_instructions(tables: Tables) -> None:
    data = load_preferences(load_tokenizer(tables.inputs.model), tables.inputs, MODEL, entry(objective="rpo"))
    used = [number for number in range(12) if number != 8]
    assert data.embeddings is not None
    assert data.embeddings.tolist() == [vector_of(number // 2) for number in used]


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


def sharded(tables: Tables, folder: Path) -> Tables:
    """The preferences in three shards: two of training, one held out."""
    whole = records.read_table(tables.inputs.judge / "preferences.parquet", records.PREFERENCES)
    for number, (start, stop) in enumerate(((0, 3), (3, 7), (7, 8))):
        path = shards.shard_path(folder / "preferences.parquet", shards.numbered_name(number))
        shards.write_shard(path, whole.slice(start, stop - start), records.PREFERENCES)
    return replace(tables, inputs=replace(tables.inputs, judge=folder))


def test_shards_are_trained_on_one_after_the_other(tables: Tables, tmp_path: Path) -> None:
    """Three and four comparisons, at most eight to a step: two steps an epoch, one for each shard."""
    many = sharded(tables, tmp_path / "judge")
    data = load_preferences(load_tokenizer(many.inputs.model), many.inputs, MODEL, entry())
    assert (data.train.sizes, len(data.validation)) == ([3, 4], 1)
    state = trained(tmp_path / "out", many, entry(comparisons_per_step=8, num_train_epochs=2))
    assert (state["global_step"], state["comparisons"], state["validation_comparisons"]) == (4, 7, 1)
    seen = [log["joint/edges"] for log in state["log_history"] if "loss" in log]
    assert sorted(seen[:2]) == sorted(seen[2:]) == [3, 4]
    few = trained(tmp_path / "few", many, entry(comparisons_per_step=8, max_train_comparisons=2, num_train_epochs=1))
    assert (few["global_step"], few["comparisons"]) == (2, 2)


def test_resumed_in_the_middle_of_a_shard_equals_uninterrupted(tables: Tables, tmp_path: Path) -> None:
    """One comparison a step, seven an epoch, in two shards; stopped after the ninth step."""
    many = sharded(tables, tmp_path / "judge")
    options = entry(comparisons_per_step=1, num_train_epochs=2, save_steps=3, eval_steps=14)

    def stop(done: int, *_: Any) -> None:
        if done == 9:
            raise KeyboardInterrupt

    trained(tmp_path / "whole", many, options)
    with pytest.raises(KeyboardInterrupt):
        train_preferences(tmp_path / "parts", "cpu", stop, many.inputs, MODEL, options, None)
    trained(tmp_path / "parts", many, options)
    assert torch.equal(adapter(tmp_path / "whole"), adapter(tmp_path / "parts"))
