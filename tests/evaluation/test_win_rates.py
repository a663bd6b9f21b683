"""Win rates against hand-computed and analytically known values."""

import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.evaluation.length_control import controlled_win_rates
from jpo_ray.evaluation.win_rates import judge_samples, notes, win_rate_table, win_rates
from jpo_ray.feedback.annotators import Annotator, Answer, Comparison
from tests.evaluation.synthetic_run import instruction_text, judgment, sample_row


def table(rows: Sequence[tuple[str, str, float, str]]) -> pa.Table:
    """Judgments of (model, instruction, temperature, verdict)."""
    keys = ("model", "instruction_id", "temperature", "seed")
    records_ = [judgment(dict(zip(keys, (*row[:3], 0), strict=True)), row[3]) for row in rows]
    return pa.Table.from_pylist(records_, records.SAMPLE_JUDGMENTS)


def one_temperature(verdicts: str, model: str = "jpo") -> pa.Table:
    """A row per letter: a, b, t(ie) or i(nvalid), each of another instruction."""
    words = {"a": "a", "b": "b", "t": "tie", "i": "invalid"}
    return table([(model, f"i{index:05d}", 1.0, words[letter]) for index, letter in enumerate(verdicts)])


def random_judgments(models: int, instructions: int) -> pa.Table:
    generator = np.random.default_rng(3)
    names = ["sft", *(f"m{index}" for index in range(1, models))]
    return table(
        [
            (
                name,
                f"i{index}",
                temperature,
                str(generator.choice(["a", "b", "tie", "invalid"], p=[0.4, 0.4, 0.15, 0.05])),
            )
            for index in range(instructions)
            for name in names
            for temperature in (0.001, 0.5, 1.0)
        ]
    )


def test_win_rate_is_wins_and_half_the_ties_of_the_valid() -> None:
    """At 0.001: 2 wins, 1 tie, 1 loss of 4 valid (one invalid): 62.5. At 1.0: 1 win of 2: 50. Mean 56.25."""
    verdicts = {0.001: ["a", "a", "tie", "b", "invalid"], 1.0: ["a", "b"]}
    rows = [("jpo", f"i{i}", t, verdict) for t, given in verdicts.items() for i, verdict in enumerate(given)]
    entry = win_rates(table(rows), 100, 0)["models"]["jpo"]
    assert entry["win_rate"] == {"0.001": 62.5, "1.0": 50.0, "mean": 56.25}
    assert {key: entry[key] for key in ("n", "wins", "ties", "losses", "invalid", "instructions")} == {
        "n": 6,
        "wins": 3,
        "ties": 1,
        "losses": 2,
        "invalid": 1,
        "instructions": 4,
    }
    assert entry["difference_to_sft"] is None


def test_interval_is_that_of_a_binomial_share() -> None:
    """150 of 400 independent wins: 37.5 +- 1.96 sqrt(0.375 * 0.625 / 400) = 37.5 +- 4.74 percent."""
    entry = win_rates(one_temperature("a" * 150 + "b" * 250), 4000, 1)["models"]["jpo"]
    assert entry["ci95"] == pytest.approx([37.5 - 4.74, 37.5 + 4.74], abs=0.4)
    assert entry["ci95_by_temperature"] == {"1.0": entry["ci95"]}


def test_instructions_are_resampled_not_rows() -> None:
    """Three identical temperatures are no more evidence than one: the interval is sqrt(3) times the naive one."""
    verdicts = ["a"] * 60 + ["b"] * 60
    same = [("jpo", f"i{i}", t, verdict) for t in (0.001, 0.5, 1.0) for i, verdict in enumerate(verdicts)]
    apart = [("jpo", f"{t}-{i}", t, verdict) for t in (0.001, 0.5, 1.0) for i, verdict in enumerate(verdicts)]
    clustered, independent = (win_rates(table(rows), 4000, 0)["models"]["jpo"]["ci95"] for rows in (same, apart))
    widths = [high - low for low, high in (clustered, independent)]
    assert widths[0] == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.25 / 120), rel=0.07)
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(3), rel=0.1)


def test_difference_to_sft_is_paired() -> None:
    """A model that wins just where sft wins differs by exactly zero, however wide both intervals are."""
    rows = [(model, f"i{i}", 1.0, "ab"[i % 2]) for i in range(100) for model in ("sft", "jpo")]
    models = win_rates(table(rows), 500, 0)["models"]
    assert models["jpo"]["difference_to_sft"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert models["jpo"]["ci95"][1] - models["jpo"]["ci95"][0] > 10


def test_row_order_does_not_matter_and_the_seed_does() -> None:
    judgments = random_judgments(models=3, instructions=50)
    shuffled = judgments.take(np.random.default_rng(0).permutation(judgments.num_rows))
    assert win_rates(shuffled, 200, 5) == win_rates(judgments, 200, 5)
    assert win_rates(judgments, 200, 6) != win_rates(judgments, 200, 5)


def test_sft_comes_first_then_as_given() -> None:
    rows = [(model, "i", 1.0, "a") for model in ("zeta", "sft", "alpha")]
    assert list(win_rates(table(rows), 10, 0)["models"]) == ["sft", "zeta", "alpha"]


def test_nothing_valid_gives_null() -> None:
    judgments = pa.concat_tables([one_temperature("iii"), one_temperature("ab", model="sft")])
    entry = win_rates(judgments, 50, 0)["models"]["jpo"]
    assert entry["win_rate"] == {"1.0": None, "mean": None}
    assert (entry["ci95"], entry["n"], entry["invalid"]) == ([None, None], 0, 3)
    assert entry["difference_to_sft"] == {"mean": None, "ci95": [None, None]}


def test_a_mean_that_lacks_a_temperature_is_null() -> None:
    entry = win_rates(table([("jpo", "i", 0.5, "a"), ("jpo", "i", 1.0, "invalid")]), 50, 0)["models"]["jpo"]
    assert entry["win_rate"] == {"0.5": 100.0, "1.0": None, "mean": None}
    assert entry["ci95_by_temperature"] == {"0.5": [100.0, 100.0], "1.0": [None, None]}


def test_no_judgments_give_no_models() -> None:
    assert win_rates(table([]), 50, 0) == {"models": {}}


def test_usual_size_is_fast() -> None:
    judgments = random_judgments(models=4, instructions=500)
    started = time.process_time()  # not the clock: other work on the machine is not ours
    win_rates(judgments, 2000, 0)
    assert time.process_time() - started < 2.0


def test_table_shows_every_model_in_80_columns() -> None:
    judgments = pa.concat_tables([random_judgments(models=3, instructions=30), one_temperature("ii", model="broken")])
    result = win_rates(judgments, 50, 0)
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(win_rate_table(result))
    text = console.export_text()
    assert "…" not in text
    jpo = next(line for line in text.splitlines() if line.split()[:1] == ["m1"])
    assert f"{result['models']['m1']['win_rate']['mean']:.1f}" in jpo
    assert f"{result['models']['m1']['difference_to_sft']['mean']:+.1f}" in jpo
    broken = next(line for line in text.splitlines() if line.split()[:1] == ["broken"])
    assert broken.split()[1:] == ["-", "-", "-", "-", "-", "0", "2", "-"]


def longer_is_better(asked: list[Comparison]) -> Annotator:
    def answer(comparisons: Sequence[Comparison], *_: Any) -> list[Answer]:
        asked.extend(comparisons)
        return [Answer("a" if len(c.response_a) > len(c.response_b) else "b", tokens=10, cost=0.5) for c in comparisons]

    return Annotator("longer", answer)


def samples_of(rows: Sequence[tuple[int, str, float, str]]) -> pa.Table:
    return pa.Table.from_pylist([sample_row(*row) for row in rows], records.SAMPLES)


def golds_of(*indices: int) -> dict[str, str]:
    return {records.instruction_id(instruction_text(index)): "a gold answer" for index in indices}


def test_each_sample_is_judged_against_its_gold_in_both_orders() -> None:
    asked: list[Comparison] = []
    samples = samples_of([(1, "jpo", 0.5, "a much longer answer than gold"), (2, "sft", 1.0, "short")])
    rows = judge_samples(samples, golds_of(1, 2), longer_is_better(asked))
    assert [(row["model"], row["temperature"], row["verdict"]) for row in rows] == [
        ("jpo", 0.5, "a"),
        ("sft", 1.0, "b"),
    ]
    assert [(row["verdict_ab"], row["verdict_ba"]) for row in rows] == [("a", "a"), ("b", "b")]
    assert len(asked) == 4
    assert {comparison.instruction_a for comparison in asked} == {instruction_text(1), instruction_text(2)}
    assert pa.Table.from_pylist(rows, records.SAMPLE_JUDGMENTS).column("seed").to_pylist() == [1005, 2010]


def test_equal_samples_are_judged_once_and_every_sample_has_a_row() -> None:
    asked: list[Comparison] = []
    same = [(1, model, t, "pear, fig") for model in ("sft", "jpo") for t in (0.001, 0.5)]
    rows = judge_samples(samples_of([*same, (2, "jpo", 0.5, "pear, fig")]), golds_of(1, 2), longer_is_better(asked))
    assert len(asked) == 4  # two distinct comparisons, each in both orders
    assert len(rows) == 5
    assert {row["verdict"] for row in rows} == {"b"}
    assert [row["cost"] for row in rows] == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_sample_equal_to_gold_is_a_tie_that_nobody_is_asked_about() -> None:
    asked: list[Comparison] = []
    (row,) = judge_samples(samples_of([(1, "sft", 0.5, "a gold answer")]), golds_of(1), longer_is_better(asked))
    assert (row["verdict"], row["cost"], asked) == ("tie", 0.0, [])


def test_samples_without_gold_are_refused_with_counts() -> None:
    samples = samples_of([(index, "sft", t, "pear") for index in (1, 2, 3) for t in (0.5, 1.0)])
    with pytest.raises(InputError, match=r"2 of 3 sampled instructions \(4 of 6 samples\) have no gold") as error:
        judge_samples(samples, golds_of(1), longer_is_better([]))
    assert "\n" not in str(error.value)


def test_a_sample_that_stands_there_twice_is_refused_with_counts() -> None:
    samples = samples_of(
        [(1, "jpo", 0.5, "pear"), (2, "jpo", 0.5, "fig"), (1, "jpo", 0.5, "plum"), (1, "jpo", 0.5, "fig")]
    )
    with pytest.raises(InputError, match=r"^2 of 4 samples repeat another, the first is jpo's of 'Name four") as error:
        judge_samples(samples, golds_of(1, 2), longer_is_better([]))
    assert "at temperature 0.5 with seed 1005" in str(error.value)


def test_empty_samples_lose_by_verdict_and_are_one_of_n() -> None:
    samples = samples_of([(1, "jpo", 0.5, ""), (2, "jpo", 0.5, " \n"), (3, "jpo", 0.5, "longer than the gold one")])
    rows = judge_samples(samples, golds_of(1, 2, 3), longer_is_better([]))
    judgments = pa.Table.from_pylist(rows, records.SAMPLE_JUDGMENTS)
    found = controlled_win_rates(judgments, samples, golds_of(1, 2, 3), 10, 0)
    entry = found["models"]["jpo"]
    assert {key: entry[key] for key in ("n", "wins", "losses", "empty")} == {"n": 3, "wins": 1, "losses": 2, "empty": 2}
    assert notes(found) == [
        "empty responses, judged as they are: jpo 2",
        "not length-controlled: jpo (3 instructions with a valid judgment, needs 50)",
    ]


def test_why_rates_are_not_length_controlled_is_said_once_for_all_models_of_a_reason() -> None:
    few = {"reason": "40 instructions with a valid judgment, needs 50", "note": ""}
    fitted = {"rate": 41.5, "reason": "", "note": "no difficulty term: it takes judgments of other models"}
    judgments = pa.concat_tables([one_temperature("ab", model=name) for name in ("sft", "dpo", "[jpo]", "kto")])
    found = win_rates(judgments, 10, 0)
    assert notes(found) == []  # of a version that had no length control
    for name, controlled in (("sft", few), ("dpo", {"reason": "no valid judgment"}), ("[jpo]", few), ("kto", fitted)):
        found["models"][name]["length_controlled"] = {"rate": None, **controlled}
    assert notes(found) == [
        "not length-controlled: sft, [jpo] (40 instructions with a valid judgment, needs 50)",
        "not length-controlled: dpo (no valid judgment)",
        "length-controlled: kto (no difficulty term: it takes judgments of other models)",
    ]
    shown = io.StringIO()
    Console(file=shown, width=80).print(win_rate_table(found))
    said = " ".join(shown.getvalue().split())
    assert all(note in said for note in notes(found))


def test_models_with_few_valid_verdicts_are_named_beneath_the_table() -> None:
    judgments = pa.concat_tables([one_temperature("abii", model="sft"), one_temperature("aiii", model="[b]")])
    found = win_rates(judgments, 10, 0)
    assert notes(found) == ["most verdicts are invalid, and not in n: [b] 3 of 4"]
    shown = io.StringIO()
    Console(file=shown, width=80).print(win_rate_table(found))
    assert "most verdicts are invalid, and not in n: [b] 3 of 4" in " ".join(shown.getvalue().split())
    assert [line.split()[0] for line in shown.getvalue().splitlines() if "to" in line.split()] == ["sft", "[b]"]


def test_the_table_keeps_names_and_numbers_in_eighty_columns() -> None:
    entry = {
        "win_rate": {"0.001": 64.7, "0.5": 63.1, "1.0": 47.4, "mean": 58.4}, "ci95": [55.3, 61.3], "n": 1500,
        "invalid": 3, "difference_to_sft": {"mean": 21.8}, "length_controlled": {"rate": 56.4},
    }  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=80).print(win_rate_table({"models": {"sft": entry, "dpo-comparisons": entry}}))
    rows = shown.getvalue().splitlines()
    cells = ["64.7", "63.1", "47.4", "58.4", "55.3", "to", "61.3", "1500", "3", "56.4", "+21.8"]
    assert [row.split() for row in rows if row.startswith(" sft")] == [["sft", *cells]]
    assert [row.split()[1:] for row in rows if row.startswith(" dpo")] == [cells]
