"""Strengths of items from comparisons: the Bradley-Terry model with ties.

Joint comparisons connect items of different instructions, so a connected graph of them ranks all items. In Davidson's
model (1970, doi:10.1080/01621459.1970.10481082) items of strengths s_a and s_b, d = s_a - s_b, compare as

    P(a) : P(tie) : P(b)  =  exp(d / 2) : nu : exp(-d / 2)

Strengths have a normal prior around zero, or an item that won all its few comparisons would be infinitely strong. Its
width is estimated from the data (empirical Bayes, MacKay's fixed point; it comes out a sixth too small at 24 judgments
per item): where judgments are few or contradict each other, strengths shrink towards each other, and what they say of
unseen pairs stays modest.

Shape suffixes: N items, E comparisons.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg
from scipy.special import logsumexp

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DENSE_ITEMS = 2000  # up to here variances are exact: the precision matrix is inverted
SAMPLES = 64  # above, of the posterior: a variance is then off by sqrt(2 / 64), 18 %
PRIOR_ROUNDS = 30
LEAST_PRIOR_STD = 1e-2


@dataclass(frozen=True)
class Strengths:
    """A fitted model: strengths and their standard errors float64[N], in units of log odds."""

    strength: Floats
    standard_error: Floats
    tie: float  # nu: the weight of a tie between equals, against 1 for each side's win; 0 where none was seen
    prior_std: float
    log_loss: float  # nats per comparison; log 3 = 1.10 where all three outcomes are equally likely
    agreement: float | None  # share of decisive comparisons that the strengths decide alike; None where there are none

    @property
    def reliability(self) -> float:
        """Share of the strengths' variance that the comparisons explain (0: nothing is known, 1: all is)."""
        return float(1 - np.mean(self.standard_error**2) / self.prior_std**2)

    def win_probability(self, first: Ints, second: Ints) -> Floats:
        """P(a judgment that is no tie prefers first to second), float64, with the uncertainty of both strengths in it.

        A logistic function averaged over a normal distribution (MacKay 1992, doi:10.1162/neco.1992.4.5.720).
        """
        difference = self.strength[first] - self.strength[second]
        variance = self.standard_error[first] ** 2 + self.standard_error[second] ** 2
        moderated: Floats = 1 / (1 + np.exp(-difference / np.sqrt(1 + np.pi * variance / 8)))
        return moderated


def fit_strengths(items: int, first: Ints, second: Ints, outcome: Ints, seed: int = 0) -> Strengths:
    """Fit the strengths of items 0..items-1 to comparisons: `outcome` is 1 where `first` won, -1 `second`, 0 a tie.

    Raises ValueError where there is no comparison, or one of an item with itself.
    """
    if not len(first):
        raise ValueError("no comparison to fit strengths to")
    if (first == second).any():
        raise ValueError("a comparison of an item with itself")
    count = len(first)
    design_EN = csr_array(
        (np.repeat([1.0, -1.0], count), (np.tile(np.arange(count), 2), np.concatenate([first, second]))),
        shape=(count, items),
    )
    has_ties = bool((outcome == 0).any())
    log_tie = 0.0 if has_ties else -np.inf
    strength, prior_std = np.zeros(items), 1.0
    for _ in range(PRIOR_ROUNDS):
        strength, log_tie = _most_probable(design_EN, outcome, prior_std, strength, log_tie, fit_tie=has_ties)
        variance = _variances(design_EN, _curvature(design_EN @ strength, log_tie), prior_std, seed)
        before, explained = prior_std, items - variance.sum() / prior_std**2
        prior_std = max(LEAST_PRIOR_STD, float(np.sqrt(strength @ strength / max(explained, 1e-9))))
        if abs(prior_std - before) < 1e-3 * before:
            break
    difference = design_EN @ strength
    decisive = outcome != 0
    return Strengths(
        strength=strength,
        standard_error=np.sqrt(variance),
        tie=float(np.exp(log_tie)),
        prior_std=prior_std,
        log_loss=float(-np.mean(_log_likelihood(_log_probabilities(difference, log_tie), outcome))),
        agreement=float(np.mean(np.sign(difference) == outcome, where=decisive)) if decisive.any() else None,
    )


def _most_probable(
    design_EN: csr_array, outcome: Ints, prior_std: float, strength: Floats, log_tie: float, *, fit_tie: bool
) -> tuple[Floats, float]:
    """Maximum of the posterior, by L-BFGS, from where the last one ended."""

    def objective(x: Floats) -> tuple[float, Floats]:
        s, tie = (x[:-1], float(x[-1])) if fit_tie else (x, log_tie)
        difference = design_EN @ s
        logs = _log_probabilities(difference, tie)
        win, draw, loss = np.exp(logs)
        value = -_log_likelihood(logs, outcome).sum() + (s @ s) / (2 * prior_std**2)
        slope = design_EN.T @ ((win - loss - outcome) / 2) + s / prior_std**2
        if not fit_tie:
            return float(value), slope
        return float(value) + tie**2 / 200, np.append(slope, (draw - (outcome == 0)).sum() + tie / 100)

    start = np.append(strength, log_tie) if fit_tie else strength
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "maxcor": 30}).x
    return (found[:-1], float(found[-1])) if fit_tie else (found, log_tie)


def _log_probabilities(difference: Floats, log_tie: float) -> Floats:
    """log P(first), log P(tie) and log P(second): float64[3, E]."""
    logits = np.stack([difference / 2, np.full_like(difference, log_tie), -difference / 2])
    logs: Floats = logits - logsumexp(logits, axis=0)
    return logs


def _log_likelihood(logs: Floats, outcome: Ints) -> Floats:
    likelihood: Floats = logs[1 - outcome, np.arange(len(outcome))]
    return likelihood


def _curvature(difference: Floats, log_tie: float) -> Floats:
    """Fisher information of each comparison about the difference of strengths."""
    win, _, loss = np.exp(_log_probabilities(difference, log_tie))
    information: Floats = ((win + loss) - (win - loss) ** 2) / 4
    return information


def _variances(design_EN: csr_array, information: Floats, prior_std: float, seed: int) -> Floats:
    """Posterior variance of each strength (Laplace): the diagonal of the precision matrix's inverse."""
    count, items = design_EN.shape
    precision = design_EN.T @ diags_array(information) @ design_EN + diags_array(np.full(items, prior_std**-2))
    if items <= DENSE_ITEMS:
        exact: Floats = np.diag(np.linalg.inv(precision.toarray()))
        return exact
    rng = np.random.default_rng([seed, 0x7374])
    scale = diags_array(1 / precision.diagonal())
    total = np.zeros(items)
    for _ in range(SAMPLES):  # a draw of the posterior solves for noise whose covariance is the precision itself
        noise = (
            design_EN.T @ (np.sqrt(information) * rng.standard_normal(count)) + rng.standard_normal(items) / prior_std
        )
        draw, _ = cg(precision, noise, rtol=1e-3, M=scale)
        total += draw**2
    sampled: Floats = total / SAMPLES
    return sampled


@dataclass(frozen=True)
class GraphFacts:
    """What a graph of comparisons can say, before any model."""

    items: int
    comparisons: int
    components: int
    largest_component: int  # items in it
    per_item: float  # comparisons of an item, in the mean
    triples: int  # of items that are all compared with each other, decisively
    intransitive: int  # of them, those that go round in a circle

    @property
    def intransitive_share(self) -> float | None:
        return self.intransitive / self.triples if self.triples else None


def components(items: int, first: Ints, second: Ints) -> Ints:
    """The component each item belongs to, int64[N]: items that chains of comparisons connect."""
    links = coo_array((np.ones(len(first)), (first, second)), shape=(items, items))
    label: Ints = connected_components(links, directed=False)[1].astype(np.int64)
    return label


def graph_facts(items: int, first: Ints, second: Ints, outcome: Ints) -> GraphFacts:
    """Connectivity of the comparisons, and how often three of them contradict each other."""
    count = len(first)
    sizes = np.bincount(components(items, first, second))
    first, second, outcome = (column[outcome != 0] for column in (first, second, outcome))
    winner, loser = np.where(outcome > 0, first, second), np.where(outcome > 0, second, first)
    beats = csr_array(coo_array((np.ones(len(winner)), (winner, loser)), shape=(items, items)))
    beats.data[:] = 1.0  # a pair that was judged twice alike is one
    beats = beats - beats.multiply(beats.T)  # one that was judged either way is none
    two_steps = beats @ beats
    circles = round(float(two_steps.multiply(beats.T).sum()) / 3)
    return GraphFacts(
        items=items,
        comparisons=count,
        components=len(sizes),
        largest_component=int(sizes.max()),
        per_item=2 * count / items,
        triples=circles + round(float(two_steps.multiply(beats).sum())),
        intransitive=circles,
    )
