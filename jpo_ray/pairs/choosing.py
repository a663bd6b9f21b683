"""Choosing which comparisons to judge next, by what is known of their items: a judgment is what costs.

A strategy is one function of the candidates' two items that says how good it is to judge them; the best come first.
Each can be used in rounds: judge some, learn from them, choose again.

Shape suffixes: N items, E candidate comparisons.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.selection import within_limit
from jpo_ray.pairs.sides import Ints, Keys, mix

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What is known of N items when a round begins. What a strategy does not need may be missing (None)."""

    keys: Keys  # uint64[N]
    strength: Floats  # float64[N], log odds, of a Bradley-Terry fit to the judgments so far; zeros before any
    standard_error: Floats  # float64[N]; ones before any judgment
    reward: Floats | None = None  # float64[N]: implicit rewards of the policy
    embedding: Floats | None = None  # float64[N, D]: mean last hidden state over the response, of the policy


def random(first: Ints, second: Ints, known: Known, seed: int) -> Floats:
    """Any comparison, for a baseline."""
    drawn = mix(mix(known.keys[first] ^ np.uint64(seed)) + known.keys[second])
    return drawn.astype(np.float64)


def uncertainty(first: Ints, second: Ints, known: Known, seed: int) -> Floats:  # noqa: ARG001
    """Closest strengths, widest errors: how much a judgment is expected to say about the items' difference.

    The Fisher information of its outcome, p (1 - p), times the difference's variance (to first order the expected
    information gain: MacKay 1992, doi:10.1162/neco.1992.4.4.590).
    """
    variance = known.standard_error[first] ** 2 + known.standard_error[second] ** 2
    difference = known.strength[first] - known.strength[second]
    sure = 1 / (1 + np.exp(-difference / np.sqrt(1 + np.pi * variance / 8)))
    information: Floats = sure * (1 - sure) * variance
    return information


def margin(first: Ints, second: Ints, known: Known, seed: int) -> Floats:  # noqa: ARG001
    """Widest margins of the policy's implicit rewards first: verdicts that are clear and that the model can learn.

    After arXiv 2502.14560 (comparisons of small margin waste updates) and 2502.09650 (those too hard for a model harm).
    """
    assert known.reward is not None
    return np.abs(known.reward[first] - known.reward[second])


def ches(first: Ints, second: Ints, known: Known, seed: int) -> Floats:  # noqa: ARG001
    """Responses whose hidden embeddings differ most first, since training on alike ones lowers both likelihoods.

    The length-normalised centered hidden embedding similarity of arXiv 2410.08847, <h+, h-> - |h+|^2, averaged over
    which of the two wins, is -|h+ - h-|^2 / 2.
    """
    assert known.embedding is not None
    distance: Floats = np.linalg.norm(known.embedding[first] - known.embedding[second], axis=1)
    return distance


Strategy = Callable[[Ints, Ints, Known, int], Floats]
CHOOSING: dict[str, Strategy] = {"random": random, "uncertainty": uncertainty, "margin": margin, "ches": ches}


def choose_next(
    strategy: str, first: Ints, second: Ints, judged: npt.NDArray[np.bool_], known: Known, count: int, seed: int
) -> Ints:
    """Numbers of the `count` comparisons to judge next, best first, of those not `judged` yet: int64[count] or fewer.

    No item is in more of them than twice its share: what one judgment teaches of an item makes the others of the same
    round worth less. The limit gives way where it leaves too few.
    """
    open_ = np.flatnonzero(~judged)
    worth = CHOOSING[strategy](first[open_], second[open_], known, seed)
    tie = random(first[open_], second[open_], known, seed)
    order = open_[np.lexsort((tie, -worth))]
    count = min(count, len(order))
    items = len(np.unique(np.concatenate([first[open_], second[open_]]))) if len(open_) else 0
    limit = -(-4 * count // max(1, items))
    while True:
        low, high = np.minimum(first[order], second[order]), np.maximum(first[order], second[order])
        chosen = order[within_limit(low, high, len(known.keys), limit)]
        if len(chosen) >= count:
            first_ones: Ints = chosen[:count]
            return first_ones
        limit *= 2
