"""AlpacaEval's win rate of preferences, by hand, and beside the win rate of whole verdicts."""

import io
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from jpo_ray import records
from jpo_ray.evaluation.soft_win_rates import soft_win_rate_table, soft_win_rates
from jpo_ray.evaluation.win_rates import win_rates
from tests.evaluation.synthetic_run import judgment


def table(preferences: dict[tuple[str, float], list[float | None]]) -> pa.Table:
    """A judgment of another instruction for each preference of a model at a temperature, as the import reads them."""
    rows: list[dict[str, Any]] = []
    for (model, temperature), given in preferences.items():
        for number, preference in enumerate(given):
            key = {"model": model, "temperature": temperature, "instruction_id": f"i{number:03d}", "seed": 0}
            verdict = "invalid" if preference is None else "tie"
            if preference not in (None, 1.5):
                verdict = "a" if preference > 1.5 else "b"
            whole = preference is None or preference in (1, 2)
            rows.append(judgment(key, verdict) | {"probability": None if whole else preference - 1})
    return pa.Table.from_pylist(rows, records.SAMPLE_JUDGMENTS)


def test_a_soft_verdict_counts_by_its_probability() -> None:
    """(0.49 + 0.9 + 1 + 0.5) / 4 = 72.25 percent, where whole verdicts make (0 + 1 + 1 + 1 / 2) / 4 = 62.5."""
    judgments = table({("jpo", 0.5): [1.49, 1.9, 2, 1.5, None], ("jpo", 1.0): [None] * 5, ("sft", 0.5): [1, 1.2]})
    soft = soft_win_rates(judgments, 200, 0)
    assert soft["jpo"]["0.5"]["win_rate"] == pytest.approx(72.25)
    assert soft["jpo"]["0.5"]["n"] == 4
    assert soft["jpo"]["1.0"] == {"win_rate": None, "ci95": [None, None], "n": 0}
    assert soft["sft"]["0.5"]["win_rate"] == pytest.approx(10.0)
    assert win_rates(judgments, 200, 0)["models"]["jpo"]["win_rate"]["0.5"] == 62.5


def test_whole_verdicts_give_the_win_rates_and_intervals_of_win_rates() -> None:
    """The same resamples of instructions."""
    judgments = table({("jpo", 0.5): [2, 1, 1.5, 2, None] * 8, ("sft", 0.5): [1, 1, 2, 2, 1.5] * 8})
    hard, soft = win_rates(judgments, 300, 7)["models"], soft_win_rates(judgments, 300, 7)
    for model in ("jpo", "sft"):
        assert soft[model]["0.5"]["win_rate"] == pytest.approx(hard[model]["win_rate"]["0.5"])
        assert soft[model]["0.5"]["ci95"] == pytest.approx(hard[model]["ci95_by_temperature"]["0.5"])
        assert soft[model]["0.5"]["n"] == hard[model]["n"]


def test_instructions_are_resampled_not_rows() -> None:
    """Four equal samples of each instruction are no more evidence than one."""
    once = table({("jpo", 0.5): [1.2, 1.9] * 50})
    found = [soft_win_rates(judged, 500, 1)["jpo"]["0.5"] for judged in (once, pa.concat_tables([once] * 4))]
    assert found[1]["ci95"] == pytest.approx(found[0]["ci95"])
    # A mean of 100 values of standard deviation 0.35: 55 +- 1.96 * 3.5 percent.
    assert found[0]["ci95"] == pytest.approx([55 - 6.86, 55 + 6.86], abs=1.0)


def test_both_rates_fit_eighty_columns() -> None:
    judgments = table({("jpo", 0.001): [1.49] * 3, ("joint-only-with-a-small-beta", 1.0): [1.49] * 3})
    found = win_rates(judgments, 50, 0)
    for model, soft in soft_win_rates(judgments, 50, 0).items():
        found["models"][model]["soft"] = soft
    shown = io.StringIO()
    Console(file=shown, width=80).print(soft_win_rate_table(found))
    rows = [line.split() for line in shown.getvalue().splitlines()]
    assert ["jpo-t0.001", "49.0", "49.0", "to", "49.0", "0.0", "0.0", "to", "0.0", "3"] in rows
    assert ["joint-only-with-a-small-", "49.0", "49.0", "to", "49.0", "0.0", "0.0", "to", "0.0", "3"] in rows
    assert ["beta-t1.0"] in rows
    assert "…" not in shown.getvalue()
