"""Rows: reproducible, disjoint splits, mediocre data over the full range of quality."""

import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from jpo_ray.sandbox import BASE_MODEL, make_rows, quality
from jpo_ray.sandbox.oracle import FAMILIES, task_of
from jpo_ray.sandbox.responses import MEDIOCRE, respond
from jpo_ray.sandbox.rows import CAPACITY, Split, split_of


def test_same_arguments_same_rows_and_another_seed_other_rows() -> None:
    rows = make_rows("train", 200, 3)
    assert rows == make_rows("train", 200, 3)
    assert rows[:50] == make_rows("train", 50, 3)
    other = {row["instruction"] for row in make_rows("train", 200, 4)}
    assert len(other & {row["instruction"] for row in rows}) < 20


def test_rows_have_the_promised_texts() -> None:
    assert set(make_rows("train", 1, 0)[0]) == {"instruction", "response_0", "response_1"}
    for row in make_rows("validation", 300, 0) + make_rows("test", 300, 0):
        first, second = (quality(row["instruction"], row[key]) for key in ("response_0", "response_1"))
        assert row["gold_response"] == row["response_1" if second > first else "response_0"]
        assert row["response_0"] != row["response_1"]


def test_instructions_are_distinct_and_splits_share_none_whatever_the_seeds() -> None:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    seen = {split: [row["instruction"] for row in make_rows(split, 1500, 7 * k)] for k, split in enumerate(splits)}
    for split, instructions in seen.items():
        assert len(set(instructions)) == 1500
        assert {split_of(instruction) for instruction in instructions} == {split}


def test_splits_take_eighty_ten_and_ten_percent() -> None:
    rng = Random(0)
    shares = Counter(split_of(rng.choice(FAMILIES).draw(rng)) for _ in range(5000))
    assert shares["train"] / 5000 == pytest.approx(0.8, abs=0.03)
    assert shares["validation"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_every_family_has_hundreds_of_test_instructions_and_the_world_what_it_promises() -> None:
    for family in FAMILIES:
        rng = Random(family.name)
        drawn = {family.draw(rng) for _ in range(8000)}
        assert sum(split_of(instruction) == "test" for instruction in drawn) > 250
    assert len(make_rows("test", CAPACITY["test"], 0)) == 10_000


@pytest.mark.parametrize(("split", "count"), [("test", 10_001), ("train", 80_001), ("validation", -1)])
def test_too_many_rows_are_refused_with_the_number_there_is(split: Split, count: int) -> None:
    with pytest.raises(ValueError, match=f"the sandbox has 0 to {CAPACITY[split]} of them"):
        make_rows(split, count, 0)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make_rows("dev", 1, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_parses_its_own_instructions_and_grades_every_kind(family) -> None:  # type: ignore[no-untyped-def]
    rng = Random(5)
    means: Counter[str] = Counter()
    for _ in range(400):
        instruction = family.draw(rng)
        task = task_of(instruction)
        assert task == family.parse(instruction)
        assert [other.name for other in FAMILIES if other.parse(instruction)] == [family.name]
        assert quality(instruction, task.good(rng)) == 1.0
        assert quality(instruction, task.partial(rng)) < 0.95
        assert quality(instruction, task.corrupted(rng)) < 0.95
        for kind in MEDIOCRE:
            value = quality(instruction, respond(task, rng, {kind: 1.0}))
            assert 0.0 <= value <= 1.0
            means[kind] += value / 400
    assert means["good"] == pytest.approx(1.0)
    assert means["evasive"] == pytest.approx(0.1)
    assert 0.25 < means["partial"] < 0.65
    assert 0.1 < means["corrupted"] < 0.6


def test_the_commonest_quality_is_the_evasive_one_not_the_best() -> None:
    rows = make_rows("train", 2000, 0)
    values = [quality(row["instruction"], row[key]) for row in rows for key in ("response_0", "response_1")]
    tenths = Counter(round(value, 1) for value in values)
    assert tenths.most_common(1)[0][0] == 0.1
    assert 0.22 < tenths[1.0] / len(values) < 0.30
    assert 0.28 < tenths[0.1] / len(values) < 0.40
    assert 0.40 < sum(values) / len(values) < 0.50
    assert set(tenths) >= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0}


def test_texts_are_short() -> None:
    rows = make_rows("train", 2000, 1)
    words = [len(f"{row['instruction']} {row['response_0']}".split()) for row in rows]
    assert max(words) < 75
    assert sum(count < 40 for count in words) / len(words) > 0.9


def test_importing_the_sandbox_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, jpo_ray.sandbox, jpo_ray.sandbox.pretrain; print({'torch', 'transformers'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
    assert BASE_MODEL.name == "base_model"
