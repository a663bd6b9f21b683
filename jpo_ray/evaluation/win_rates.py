"""Samples against gold responses, and the win rates that follow.

A sample against the gold response of its instruction is one more comparison: the same judging code, the same
both-orders rule, the same columns as the judgments a model is trained on.

Shape suffixes: B bootstrap resamples, M models, I instructions, T temperatures.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator, Comparison, Progress, silent
from jpo_ray.feedback.judge import judge
from jpo_ray.records import VERDICTS, content_id, item_id

BASELINE = "sft"
TITLE = "Win rate against gold, percent, by temperature"
RESAMPLES_AT_ONCE = 256  # bounds memory: 256 x 100,000 instructions are 200 MB of draws

Array = NDArray[np.float64]


def judge_samples(
    samples: pa.Table, golds: Mapping[str, str], annotator: Annotator, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Judge each sample (a) against the gold response (b) of its instruction.

    `golds` maps instruction ids to texts. Returns rows of `records.SAMPLE_JUDGMENTS`, one per sample, in order. Equal
    samples of an instruction are judged once; the rows that reuse a verdict carry no tokens and no cost, so that sums
    are what was spent. Empty responses are judged like any other. Raises `InputError` where an instruction has no gold
    response, and where a sample stands there twice.
    """
    rows = samples.select(["instruction_id", "instruction", "model", "temperature", "seed", "response"]).to_pylist()
    _require_golds(rows, golds)
    _require_distinct(rows)
    comparisons = [_against_gold(row, golds[row["instruction_id"]]) for row in rows]
    distinct = {comparison.key: comparison for comparison in comparisons}
    judgments = {row["pair_id"]: row for row in judge(list(distinct.values()), annotator, progress)}
    judged = []
    spent: set[str] = set()
    for row, comparison in zip(rows, comparisons, strict=True):
        judgment = {name: value for name, value in judgments[comparison.key].items() if name != "pair_id"}
        if comparison.key in spent:
            judgment |= {"tokens": 0, "cost": 0.0}
        spent.add(comparison.key)
        judged.append({name: row[name] for name in ("instruction_id", "model", "temperature", "seed")} | judgment)
    return judged


def _require_golds(rows: list[dict[str, Any]], golds: Mapping[str, str]) -> None:
    lacking = [row for row in rows if row["instruction_id"] not in golds]
    if lacking:
        distinct = {row["instruction_id"] for row in lacking}
        total = len({row["instruction_id"] for row in rows})
        raise InputError(
            f"{len(distinct)} of {total} sampled instructions ({len(lacking)} of {len(rows)} samples) have no gold "
            f"response, the first is {lacking[0]['instruction'][:60]!r}; mark one response of each as gold in the test "
            "source, or set `evaluate: null`"
        )


def _require_distinct(rows: list[dict[str, Any]]) -> None:
    """A sample that is counted twice makes the evidence look stronger than it is."""
    seen = Counter((row["model"], row["temperature"], row["seed"], row["instruction_id"]) for row in rows)
    if repeated := len(rows) - len(seen):
        model, temperature, seed, identity = next(key for key, count in seen.items() if count > 1)
        text = next(row["instruction"] for row in rows if row["instruction_id"] == identity)
        raise InputError(
            f"{repeated} of {len(rows)} samples repeat another, the first is {model}'s of {text[:60]!r} at temperature "
            f"{temperature} with seed {seed}; sample again (`jpo sample`)"
        )


def _against_gold(row: Mapping[str, Any], gold: str) -> Comparison:
    instruction, response = row["instruction"], row["response"]
    return Comparison(
        key=content_id("sample", instruction, response, gold),
        item_a=item_id(instruction, response),
        item_b=item_id(instruction, gold),
        instruction_a=instruction,
        response_a=response,
        instruction_b=instruction,
        response_b=gold,
    )


def win_rates(judgments: pa.Table, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Win rate of every model against gold, in percent: (wins + ties / 2) / valid, per temperature and their mean.

    `ci95` is the 95 % percentile bootstrap interval of the mean. Instructions are resampled, not rows: answers to one
    instruction resemble each other, so rows are not independent evidence. All models share the resamples, which makes
    `difference_to_sft` a paired comparison. What has no valid judgment is None, and so is a mean that lacks a
    temperature, since it could not be compared with the others. Row order does not matter, but for the models' order:
    `sft` first, then as they first appear.
    """
    models, temperatures, counts_VMIT = _tally(judgments)
    if not models:
        return {"models": {}}
    wins_MIT, losses_MIT, ties_MIT, _ = counts_VMIT
    score_MIT = wins_MIT + ties_MIT / 2
    valid_MIT = score_MIT + losses_MIT + ties_MIT / 2
    everything_1I = np.ones((1, counts_VMIT.shape[2]))
    rates_MT = _rates(everything_1I, score_MIT, valid_MIT)[0]
    rates_BMT = _bootstrap(score_MIT, valid_MIT, bootstrap_samples, seed)
    means_BM = rates_BMT.mean(axis=2)
    baseline = models.index(BASELINE) if BASELINE in models else None
    entries: dict[str, dict[str, Any]] = {}
    for m, model in enumerate(models):
        keys = [repr(float(temperature)) for temperature in temperatures]
        counts = dict(zip(("wins", "losses", "ties", "invalid"), _sums(counts_VMIT[:, m]), strict=True))
        entries[model] = {
            "win_rate": {key: _number(rate) for key, rate in zip(keys, rates_MT[m], strict=True)}
            | {"mean": _number(rates_MT[m].mean())},
            "ci95": interval(means_BM[:, m]),
            "ci95_by_temperature": {key: interval(rates_BMT[:, m, t]) for t, key in enumerate(keys)},
            "n": counts["wins"] + counts["losses"] + counts["ties"],
            **counts,
            "instructions": int((valid_MIT[m].sum(axis=1) > 0).sum()),
            "difference_to_sft": None,
        }
        if baseline is not None and m != baseline:
            entries[model]["difference_to_sft"] = {
                "mean": _number(rates_MT[m].mean() - rates_MT[baseline].mean()),
                "ci95": interval(means_BM[:, m] - means_BM[:, baseline]),
            }
    return {"models": entries}


def resampled_mean(judgments: pa.Table, bootstrap_samples: int, seed: int) -> tuple[float, Array]:
    """Mean win rate over the temperatures of a single model, percent, and that of every resample, [B].

    Models judged on the same instructions get the same resamples from the same seed, so their values can be paired.
    """
    models, _, (wins_MIT, losses_MIT, ties_MIT, _) = _tally(judgments)
    if len(models) != 1:
        raise ValueError(f"judgments of {len(models)} models")
    score_MIT = wins_MIT + ties_MIT / 2
    valid_MIT = score_MIT + losses_MIT + ties_MIT / 2
    rates_MT = _rates(np.ones((1, score_MIT.shape[1])), score_MIT, valid_MIT)[0]
    return float(rates_MT.mean()), _bootstrap(score_MIT, valid_MIT, bootstrap_samples, seed)[:, 0].mean(axis=1)


def interval(values_B: Array) -> list[float | None]:
    """95 % percentile interval of the resamples in which the quantity is defined."""
    defined = values_B[np.isfinite(values_B)]
    if not len(defined):
        return [None, None]
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]


def _tally(judgments: pa.Table) -> tuple[list[str], list[float], Array]:
    """Models, temperatures, and how often each of `VERDICTS` was given, [V, M, I, T]."""
    names = judgments.column("model").to_pylist()
    models = sorted(dict.fromkeys(names), key=lambda name: name != BASELINE)  # stable: else as given
    temperatures, temperature_of_row = np.unique(judgments.column("temperature").to_numpy(), return_inverse=True)
    ids, instruction_of_row = np.unique(judgments.column("instruction_id").to_pylist(), return_inverse=True)
    positions = {name: index for index, name in enumerate(models)}
    model_of_row = np.array([positions[name] for name in names], dtype=np.intp)
    verdicts = judgments.column("verdict").to_pylist()
    verdict_of_row = np.array([VERDICTS.index(verdict) for verdict in verdicts], dtype=np.intp)
    counts_VMIT = np.zeros((len(VERDICTS), len(models), len(ids), len(temperatures)))
    np.add.at(counts_VMIT, (verdict_of_row, model_of_row, instruction_of_row, temperature_of_row), 1.0)
    return models, temperatures.tolist(), counts_VMIT


def _bootstrap(score_MIT: Array, valid_MIT: Array, resamples: int, seed: int) -> Array:
    """Win rates [B, M, T] with the instructions drawn anew, with replacement."""
    generator = np.random.default_rng(seed)
    instructions = score_MIT.shape[1]
    blocks = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - start)
        draws_BI = generator.multinomial(instructions, np.full(instructions, 1 / instructions), size=size)
        blocks.append(_rates(draws_BI.astype(np.float64), score_MIT, valid_MIT))
    return np.concatenate(blocks)


def _rates(draws_BI: Array, score_MIT: Array, valid_MIT: Array) -> Array:
    """Percent [B, M, T]; NaN where a resample has no valid judgment."""
    models, instructions, temperatures = score_MIT.shape
    shape = (len(draws_BI), models, temperatures)
    score_IMT = score_MIT.transpose(1, 0, 2).reshape(instructions, -1)
    valid_IMT = valid_MIT.transpose(1, 0, 2).reshape(instructions, -1)
    valid_BMT = (draws_BI @ valid_IMT).reshape(shape)
    score_BMT = (draws_BI @ score_IMT).reshape(shape)
    rates_BMT: Array = np.full(shape, np.nan)
    np.divide(100 * score_BMT, valid_BMT, out=rates_BMT, where=valid_BMT > 0)
    return rates_BMT


def _sums(counts_VIT: Array) -> list[int]:
    return [int(count) for count in counts_VIT.sum(axis=(1, 2))]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def win_rate_table(result: Mapping[str, Any]) -> Table:
    """The win rates for the terminal."""
    models = result["models"]
    temperatures = list(dict.fromkeys(key for entry in models.values() for key in entry["win_rate"] if key != "mean"))
    # What is the same for all, or was not fitted, has no column.
    invalid = any(entry["invalid"] for entry in models.values())
    controlled = any(_controlled(entry) is not None for entry in models.values())
    # Without side borders, with narrow gaps and bare temperatures the usual table fits 80 columns.
    table = Table(
        title=TITLE + " (LC: length-controlled)" * controlled,
        caption=Text("\n".join(notes(result))) or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", overflow="fold", min_width=6)
    optional = [*(["invalid"] if invalid else []), *(["LC"] if controlled else [])]
    for heading in [*temperatures, "mean", "95 % interval", "n", *optional, "vs sft"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in models.items():
        rates = [_cell(entry["win_rate"].get(key)) for key in (*temperatures, "mean")]
        difference = entry.get("difference_to_sft") or {"mean": None}
        cells = [*rates, interval_text(entry["ci95"]), str(entry["n"])]
        cells += [str(entry["invalid"])] if invalid else []
        cells += [_cell(_controlled(entry))] if controlled else []
        table.add_row(Text(name), *cells, _cell(difference["mean"], "+.1f"))
    return table


def notes(result: Mapping[str, Any]) -> list[str]:
    """What must be known beside the rates: samples without text, models that have few valid verdicts, and why there is
    no length-controlled rate, or what it had to leave out.
    """
    models = result["models"]
    empty = [f"{name} {entry['empty']:,}" for name, entry in models.items() if entry.get("empty")]
    found = [f"empty responses, judged as they are: {', '.join(empty)}"] if empty else []
    few = [name for name, entry in models.items() if entry["invalid"] > entry["n"]]
    judged = [f"{name} {models[name]['invalid']:,} of {models[name]['invalid'] + models[name]['n']:,}" for name in few]
    if judged:
        found.append(f"most verdicts are invalid, and not in n: {', '.join(judged)}")
    for key, what in (("reason", "not length-controlled"), ("note", "length-controlled")):
        found += [f"{what}: {', '.join(names)} ({said})" for said, names in of_length_control(models, key).items()]
    return found


def of_length_control(models: Mapping[str, Any], key: str) -> dict[str, list[str]]:
    """The models by what their length-controlled rates have as `reason` or `note`."""
    grouped: dict[str, list[str]] = {}
    for name, entry in models.items():
        if said := (entry.get("length_controlled") or {}).get(key):
            grouped.setdefault(said, []).append(name)
    return grouped


def _controlled(entry: Mapping[str, Any]) -> float | None:
    rate: float | None = (entry.get("length_controlled") or {}).get("rate")
    return rate


def _cell(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def interval_text(interval: list[float | None], form: str = ".1f") -> str:
    """An interval as text; `-` where it is not defined."""
    low, high = interval
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"
