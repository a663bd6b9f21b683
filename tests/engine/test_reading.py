"""Which items trainings read: what the reference has to know, and what it need not."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine.tables import Tables, make_tables, preference_rows
from engine.test_jobs import MODEL, with_reference
from engine.tiny import config
from jpo_ray import records
from jpo_ray.engine.jobs import train_preferences
from jpo_ray.engine.reading import items_read, readers
from jpo_ray.errors import InputError


@pytest.fixture(scope="module")
def tables(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return make_tables(llama, tmp_path_factory.mktemp("tables"))


def test_sets_of_comparisons_are_named_once() -> None:
    """A part of what another entry reads is no set of its own; which lists are drawn is not known here."""
    both, dpo = config(name="a"), config(objective="dpo", protocols=["conditional"])
    few, other = (config(name=f"s{seed}", max_train_comparisons=5, seed=seed) for seed in (0, 3))
    listwise = config(objective="lipo", protocols=["conditional"], max_train_comparisons=5)
    assert list(readers([both])) == list(readers([dpo, both, few])) == ["conditional", "joint"]
    assert list(readers([dpo])) == list(readers([listwise])) == ["conditional"]
    expected = ["5 of conditional and joint by seed 0", "5 of conditional and joint by seed 3", "conditional"]
    assert list(readers([few, other, few, dpo])) == expected


def read(folder: Path, ids: list[str], *entries: Any) -> list[int]:
    found = items_read([folder / "preferences.parquet"], pa.array(ids), entries)
    return [number for number, is_read in enumerate(found) if is_read]


def test_items_of_what_is_trained_and_held_out(tmp_path: Path) -> None:
    """Item 8 is in no comparison; 10 and 11 are held out, and read whatever is trained."""
    ids = [f"item {number}" for number in range(12)]
    records.write_table(tmp_path / "preferences.parquet", preference_rows(ids), records.PREFERENCES)
    conditional, joint = (config(protocols=[kind]) for kind in ("conditional", "joint"))
    assert read(tmp_path, ids, conditional, joint) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert read(tmp_path, ids, conditional) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert read(tmp_path, ids, joint) == [0, 2, 3, 4, 7, 9, 10, 11]
    assert read(tmp_path, ids) == [10, 11]
    one, two = (config(protocols=["conditional"], max_train_comparisons=count) for count in (1, 2))
    assert len(read(tmp_path, ids, one)) == 2 + 2
    assert set(read(tmp_path, ids, one)) < set(read(tmp_path, ids, two))
    assert len(read(tmp_path, ids, one, joint)) in (8, 9, 10)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_reference_of_what_is_read_is_enough(objective: str, tables: Tables, tmp_path: Path) -> None:
    """Two of four comparisons: the weights are those of the whole reference, and one item less is missed."""
    options = config(
        objective=objective, protocols=["conditional"], max_train_comparisons=2, comparisons_per_step=2,
        num_train_epochs=2, warmup_steps=0,
    )  # fmt: skip
    ids = [row["item_id"] for row in tables.items]
    needed = {ids[number] for number in read(tables.inputs.judge, ids, options)}
    rows = [row for row in tables.reference if row["item_id"] in needed]
    assert (len(needed), len(rows)) == (6, 12)
    weights = []
    for name, some in (("whole", tables.reference), ("needed", rows)):
        (tmp_path / name).mkdir()
        inputs = with_reference(tables, some, tmp_path / name)
        train_preferences(tmp_path / name / "out", "cpu", None, inputs, MODEL, options, None)
        weights.append(load_file(tmp_path / name / "out" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    inputs = with_reference(tables, rows[1:], tmp_path)
    with pytest.raises(InputError, match="the reference lacks 1 of 6 items; run `jpo reference` again"):
        train_preferences(tmp_path / "out", "cpu", None, inputs, MODEL, options, None)
