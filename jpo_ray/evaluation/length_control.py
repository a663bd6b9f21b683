"""Length-controlled win rates: what the judge would have said, had samples and gold responses been equally long.

Judges prefer long answers, so a model can win by writing more. AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475)
models the judge by a logistic regression and predicts without its length term:

    logit P(m beats gold on x at temperature t)  =  theta_mt + phi_m tanh(d / sd_m(d)) + psi_m gamma_x
    d = characters of the sample - characters of gold;  theta and psi are relative to gold's

Here it is fitted to one run's own data, which changes three things. Each temperature has its own theta, since a
temperature changes lengths and quality at once. The difficulty gamma_x does not come from a leaderboard but from the
run's *other* models, so that no result of a model is part of its own difficulty; a single model does without the term.
And the penalty is fixed and weak: with fewer answers than a leaderboard has, cross-validation chooses one that hides
part of the length effect. In simulations it left up to 5 points of bias, and intervals that missed the truth.

What no such model can tell: where longer answers (or gold responses) are better ones too, quality counts as length.

Shape suffixes: R valid judgments, F features, I instructions, T temperatures, B bootstrap resamples.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack, vstack
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from jpo_ray.evaluation.win_rates import BASELINE, win_rates

# With less there is no number; in simulations at these bounds 87 to 97 % of the intervals held the truth.
LEAST_INSTRUCTIONS = 50  # valid ones: what is resampled
LEAST_RARE = 10.0  # instructions' worth of wins, and of losses: one resample in e^10 has none
LEAST_SPREAD = 0.1  # standard deviation of the length term: there the penalty weighs as much as 40 answers

PENALTY_C = 10.0  # a normal prior of standard deviation sqrt(10) log odds on each coefficient but the intercept
INSTRUCTION_STD = 1.0  # of the prior of an instruction's difficulty, in log odds: it rests on few answers
HARD_OUTCOMES = {"a": 1.0, "tie": 0.5, "b": 0.0}

LENGTH, DIFFICULTY, TEMPERATURES = 0, 1, 2  # columns of the features; from the last on one per temperature

Array = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class LengthControlled:
    """A model's length-controlled win rate against gold; None, and `reason` says why, where the data are too few.

    Rates are in percent, means over temperatures, and a soft verdict counts by its probability; with hard verdicts
    `raw_rate` is the mean of `win_rates`. Intervals are 95 % percentile bootstrap intervals over instructions.
    """

    rate: float | None = None
    ci95: list[float | None] = field(default_factory=lambda: [None, None])
    raw_rate: float | None = None
    length_effect: float | None = None  # phi: log odds that an answer much longer than gold gains over one as long
    length_effect_ci95: list[float | None] = field(default_factory=lambda: [None, None])
    difficulty_effect: float | None = None  # psi: log odds per standard deviation; None without the term
    characters: float | None = None  # mean length of its answers
    characters_gold: float | None = None  # and of what they were compared with
    instructions: int = 0  # with a valid judgment
    reason: str = ""
    note: str = ""  # what the model had to leave out


@dataclass(frozen=True)
class _Rows:
    """The valid judgments of one model, in an order that does not depend on the table's."""

    instruction_R: Ints
    temperature_R: Ints
    outcome_R: Array  # probability that the sample is better
    characters_R: Array
    gold_R: Array  # characters

    def length_term_R(self) -> Array:
        difference_R = self.characters_R - self.gold_R
        spread = difference_R.std()
        return np.tanh(difference_R / spread) if spread > 0 else np.zeros_like(difference_R)


def controlled_win_rates(
    judgments: pa.Table, samples: pa.Table, golds: Mapping[str, str], bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """`win_rates`, and for each model its `length_controlled` ones and the number of its `empty` responses."""
    found = win_rates(judgments, bootstrap_samples, seed)
    without_text = pc.equal(pc.utf8_trim_whitespace(samples.column("response")), "")
    empty = Counter(samples.column("model").filter(without_text).to_pylist())
    for model, entry in found["models"].items():
        entry["empty"] = empty[model]
    for model, controlled in length_controlled(judgments, samples, golds, seed).items():
        found["models"][model]["length_controlled"] = asdict(controlled)
    return found


def length_controlled(
    judgments: pa.Table, samples: pa.Table, golds: Mapping[str, str], seed: int, resamples: int = 200
) -> dict[str, LengthControlled]:
    """Length-controlled win rates by model, in the order of `win_rates`: `sft` first, then as they first appear.

    `judgments` (`records.SAMPLE_JUDGMENTS`) and `samples` (`records.SAMPLES`) have the same rows in the same order;
    `golds` maps instruction ids to texts. All models share the resamples. Numbers depend on the seed, but not on the
    order of the rows. Raises ValueError where the tables do not belong together, KeyError where a gold response lacks.
    """
    for name in ("instruction_id", "model", "temperature", "seed"):
        if not judgments.column(name).equals(samples.column(name)):
            raise ValueError(f"judgments and samples differ in `{name}`")
    temperatures: list[float] = np.unique(judgments.column("temperature").to_numpy()).tolist()
    instructions, rows = _rows_by_model(judgments, samples, golds)
    if not rows:
        return {}
    draws_BI = np.random.default_rng(seed).multinomial(
        instructions, np.full(instructions, 1 / instructions), size=resamples
    )
    results = {}
    for name in sorted(rows, key=lambda name: name != BASELINE):
        results[name] = _described(rows[name], temperatures)
        if not results[name].reason:
            others = [rows[other] for other in sorted(rows) if other != name and len(rows[other].outcome_R)]
            with threadpool_limits(1):  # the fits are small: threads would wait for each other, on a busy box for long
                difficulty_I = _difficulty(others, instructions, len(temperatures))
                results[name] = _controlled(results[name], rows[name], difficulty_I, len(temperatures), draws_BI)
    return results


def _rows_by_model(judgments: pa.Table, samples: pa.Table, golds: Mapping[str, str]) -> tuple[int, dict[str, _Rows]]:
    """How many instructions there are, and the valid judgments of each model."""
    names = np.array(judgments.column("model").to_pylist(), dtype=object)
    ids = judgments.column("instruction_id").to_pylist()
    known, instruction = np.unique(ids, return_inverse=True)
    _, temperature = np.unique(judgments.column("temperature").to_numpy(), return_inverse=True)
    hard = np.array([HARD_OUTCOMES.get(verdict, np.nan) for verdict in judgments.column("verdict").to_pylist()])
    soft = judgments.column("probability").to_numpy()  # NaN where null
    outcome = np.where(np.isnan(soft) | np.isnan(hard), hard, soft)
    characters = pc.utf8_length(samples.column("response")).to_numpy().astype(np.float64)
    gold_I = np.array([len(golds[name]) for name in known.tolist()], dtype=np.float64)
    rows = {}
    for name in dict.fromkeys(names.tolist()):
        own = np.flatnonzero((names == name) & ~np.isnan(outcome))
        own = own[np.lexsort((outcome[own], characters[own], temperature[own], instruction[own]))]
        rows[name] = _Rows(instruction[own], temperature[own], outcome[own], characters[own], gold_I[instruction[own]])
    return len(known), rows


def _described(rows: _Rows, temperatures: list[float]) -> LengthControlled:
    """What takes no model to say, and why there will be no more than that."""
    if not len(rows.outcome_R):
        return LengthControlled(reason="no valid judgment")
    weight_R = np.ones(len(rows.outcome_R))
    raw = _mean_over_temperatures(rows.outcome_R, rows.temperature_R, weight_R, len(temperatures))
    return LengthControlled(
        raw_rate=100 * raw if np.isfinite(raw) else None,
        characters=float(rows.characters_R.mean()),
        characters_gold=float(rows.gold_R.mean()),
        instructions=len(np.unique(rows.instruction_R)),
        reason=_lacking(rows, temperatures),
    )


def _lacking(rows: _Rows, temperatures: list[float]) -> str:
    """What the fit would need that is not there; empty where nothing lacks."""
    empty = np.setdiff1d(np.arange(len(temperatures)), rows.temperature_R)
    if len(empty):
        return f"no valid judgment at temperature {temperatures[empty[0]]}"
    count_I = np.bincount(rows.instruction_R)
    won_I = np.bincount(rows.instruction_R, rows.outcome_R)
    judged = int((count_I > 0).sum())
    if judged < LEAST_INSTRUCTIONS:
        return f"{judged} instructions with a valid judgment, needs {LEAST_INSTRUCTIONS}"
    won = float(np.sum(won_I[count_I > 0] / count_I[count_I > 0]))
    if min(won, judged - won) < LEAST_RARE:
        few = "lost" if won > judged / 2 else "won"
        return f"{few} on {min(won, judged - won):.1f} of {judged} instructions, needs {LEAST_RARE:g}"
    if rows.length_term_R().std() < LEAST_SPREAD:
        return "the answers differ too evenly from gold in length to tell what length does"
    return ""


def _difficulty(others: list[_Rows], instructions: int, temperatures: int) -> Array | None:
    """Standardised ease of each instruction for the other models, float64[I]; None where they do not tell.

    One regression of all the others together: a theta for each model and temperature, a phi for each model, and an
    effect of each instruction, shrunk towards zero. An instruction that they were not judged on has the mean.
    """
    if not others:
        return None
    blocks = []
    for position, rows in enumerate(others):
        own = np.column_stack([rows.length_term_R(), np.eye(temperatures)[rows.temperature_R]])
        features_RF = np.zeros((len(own), len(others) * own.shape[1]))
        features_RF[:, position * own.shape[1] : (position + 1) * own.shape[1]] = own
        scale_R = np.full(len(own), INSTRUCTION_STD / np.sqrt(PENALTY_C))
        of_instruction_RI = csr_array(
            (scale_R, (np.arange(len(own)), rows.instruction_R)), shape=(len(own), instructions)
        )
        blocks.append(hstack([csr_array(features_RF), of_instruction_RI]))
    outcome_R = np.concatenate([rows.outcome_R for rows in others])
    fitted = _fit(csr_array(vstack(blocks)), outcome_R, np.ones(len(outcome_R)))
    effect_I = np.zeros(instructions) if fitted is None else fitted[1][-instructions:]
    spread = effect_I.std()
    return (effect_I - effect_I.mean()) / spread if spread > 0 else None


def _controlled(
    known: LengthControlled, rows: _Rows, difficulty_I: Array | None, temperatures: int, draws_BI: Ints
) -> LengthControlled:
    """The fit, and one for each resample: features stay as they are, only the weights of instructions change."""
    features_RF = np.zeros((len(rows.outcome_R), TEMPERATURES + temperatures))
    features_RF[:, LENGTH] = rows.length_term_R()
    if difficulty_I is not None:
        features_RF[:, DIFFICULTY] = difficulty_I[rows.instruction_R]
    features_RF[np.arange(len(features_RF)), TEMPERATURES + rows.temperature_R] = 1.0
    rate, phi, psi = _estimates(features_RF, rows, np.ones(len(features_RF)), temperatures)
    resampled_B3 = np.array(
        [_estimates(features_RF, rows, draw_I[rows.instruction_R].astype(float), temperatures) for draw_I in draws_BI]
    ).reshape(-1, 3)
    return replace(
        known,
        rate=rate,
        ci95=_interval(resampled_B3[:, 0]),
        length_effect=phi,
        length_effect_ci95=_interval(resampled_B3[:, 1]),
        difficulty_effect=None if difficulty_I is None else psi,
        note="no difficulty term: it takes judgments of other models" if difficulty_I is None else "",
    )


def _estimates(features_RF: Array, rows: _Rows, weight_R: Array, temperatures: int) -> tuple[float, float, float]:
    """Length-controlled rate in percent, phi and psi; NaN where the weights leave one outcome only."""
    fitted = _fit(features_RF, rows.outcome_R, weight_R)
    if fitted is None:
        return np.nan, np.nan, np.nan
    intercept, coefficients_F = fitted
    equally_long_F = coefficients_F.copy()
    equally_long_F[LENGTH] = 0.0
    predicted_R = expit(intercept + features_RF @ equally_long_F)
    rate = 100 * _mean_over_temperatures(predicted_R, rows.temperature_R, weight_R, temperatures)
    return rate, float(coefficients_F[LENGTH]), float(coefficients_F[DIFFICULTY])


def _fit(features_RF: Array | csr_array, outcome_R: Array, weight_R: Array) -> tuple[float, Array] | None:
    """Intercept and coefficients of the penalised logistic regression; None where there is one outcome only.

    An outcome between 0 and 1 is a win and a loss, weighted by it and by what it lacks to 1.
    """
    won_R, lost_R = weight_R * outcome_R, weight_R * (1 - outcome_R)
    won, lost = np.flatnonzero(won_R), np.flatnonzero(lost_R)
    if not len(won) or not len(lost):
        return None
    model = LogisticRegression(C=PENALTY_C, tol=1e-6, max_iter=1000)
    model.fit(
        features_RF[np.concatenate([won, lost])],
        np.repeat([1, 0], [len(won), len(lost)]),
        sample_weight=np.concatenate([won_R[won], lost_R[lost]]),
    )
    return float(model.intercept_[0]), model.coef_[0]


def _mean_over_temperatures(value_R: Array, temperature_R: Ints, weight_R: Array, temperatures: int) -> float:
    """Mean of the weighted means at each temperature; NaN where one has no weight."""
    weight_T = np.bincount(temperature_R, weight_R, minlength=temperatures)
    value_T = np.bincount(temperature_R, weight_R * value_R, minlength=temperatures)
    return float(np.mean(value_T / weight_T)) if (weight_T > 0).all() else np.nan


def _interval(values_B: Array) -> list[float | None]:
    """95 % percentile interval of the resamples that could be fitted."""
    defined = values_B[np.isfinite(values_B)]
    return np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else [None, None]
