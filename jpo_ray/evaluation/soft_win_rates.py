"""AlpacaEval's own win rates: the mean preference, in which a soft verdict counts by its probability.

`win_rates` counts each verdict whole, which is AlpacaEval's `discrete_win_rate`. Its `win_rate`, which its leaderboard
sorts by, is the mean of preference - 1 (`metrics/helpers.py` of github.com/tatsu-lab/alpaca_eval); the two differ where
an annotator weighs its verdicts, as the default `weighted_alpaca_eval_gpt4_turbo` does.

Shape suffixes: R judgments, I instructions, C models at a temperature, B bootstrap resamples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jpo_ray.evaluation.alpaca_eval import generator_name
from jpo_ray.evaluation.win_rates import interval, interval_text

OUTCOMES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of a verdict that has no probability


def soft_win_rates(judgments: pa.Table, bootstrap_samples: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """By model and temperature the `win_rate` in percent, its `ci95` and `n`, the valid judgments.

    Intervals are 95 % percentile bootstrap intervals that resample instructions: the same ones as in `win_rates` of
    these judgments with this seed. None where nothing is valid.
    """
    ids, instruction_R = np.unique(judgments["instruction_id"].to_pylist(), return_inverse=True)
    models, temperatures = judgments["model"].to_pylist(), judgments["temperature"].to_pylist()
    cells = {cell: place for place, cell in enumerate(dict.fromkeys(zip(models, temperatures, strict=True)))}
    cell_R = np.array([cells[cell] for cell in zip(models, temperatures, strict=True)], dtype=np.intp)
    hard_R = np.array([OUTCOMES.get(verdict, np.nan) for verdict in judgments["verdict"].to_pylist()])
    soft_R = judgments["probability"].to_numpy()  # NaN where null
    outcome_R = np.where(np.isnan(soft_R) | np.isnan(hard_R), hard_R, soft_R)
    score_IC, valid_IC = np.zeros((2, len(ids), len(cells)))
    valid = ~np.isnan(outcome_R)
    np.add.at(score_IC, (instruction_R[valid], cell_R[valid]), outcome_R[valid])
    np.add.at(valid_IC, (instruction_R[valid], cell_R[valid]), 1.0)

    generator = np.random.default_rng(seed)
    even_I = np.full(len(ids), 1 / len(ids))
    draws = (generator.multinomial(len(ids), even_I) for _ in range(bootstrap_samples))  # one at a time: little memory
    with np.errstate(invalid="ignore"):  # 0 / 0 becomes NaN, as it should
        rate_C = 100 * score_IC.sum(axis=0) / valid_IC.sum(axis=0)
        rate_BC = np.array([100 * (draw_I @ score_IC) / (draw_I @ valid_IC) for draw_I in draws])
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (model, temperature), place in cells.items():
        rate = float(rate_C[place])
        found.setdefault(model, {})[repr(float(temperature))] = {
            "win_rate": rate if np.isfinite(rate) else None,
            "ci95": interval(rate_BC[:, place]),
            "n": int(valid_IC[:, place].sum()),
        }
    return found


def soft_win_rate_table(result: Mapping[str, Any]) -> Table:
    """AlpacaEval's two win rates beside each other, for the terminal; `result` as in `win_rates`, with `soft` ones."""
    table = Table(
        title="Win rate as AlpacaEval defines it, percent",
        caption="win_rate is the mean preference; discrete (its discrete_win_rate) counts each verdict whole, as "
        "all other win rates here do",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("generator", overflow="fold", min_width=6)
    for heading in ("win_rate", "95 % interval", "discrete", "95 % interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model, entry in result["models"].items():
        for temperature, soft in entry["soft"].items():
            cells = []
            hard, ends = entry["win_rate"][temperature], entry["ci95_by_temperature"][temperature]
            for rate, ci95 in ((soft["win_rate"], soft["ci95"]), (hard, ends)):
                cells += ["-" if rate is None else f"{rate:.1f}", interval_text(ci95)]
            table.add_row(Text(generator_name(model, float(temperature))), *cells, str(soft["n"]))
    return table
