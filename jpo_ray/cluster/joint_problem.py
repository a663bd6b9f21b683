"""What joint pairs are chosen of, within which limits, and what is said where these leave too few."""

from dataclasses import dataclass

from jpo_ray.cluster.tiles import TIMEOUT_S, SharedVectors
from jpo_ray.config import JointPairs
from jpo_ray.errors import InputError
from jpo_ray.pairs.candidates import Search
from jpo_ray.pairs.selection import Limits
from jpo_ray.pairs.sides import Ints, Side


@dataclass(frozen=True)
class JointProblem:
    """What to choose pairs of, and within which limits."""

    rows: Side
    columns: Side  # the same object as `rows` where items are compared among themselves
    vectors: SharedVectors
    config: JointPairs
    budget: int
    seed: int
    budget_key: str = "pairs.joint.budget"  # what the config calls the budget
    at_most: bool = False  # the budget is no more than wished for
    timeout_s: float = TIMEOUT_S

    @property
    def symmetric(self) -> bool:
        return self.rows is self.columns

    @property
    def limits(self) -> Limits:
        return Limits(self.budget, self.config.min_per_item, self.config.max_per_item, self.config.connected)

    @property
    def band(self) -> tuple[float, float]:
        return self.config.min_similarity, self.config.max_similarity

    def search(self, keep: int, bins: int = 1) -> Search:
        return Search(self.config.strategy, self.band, keep, self.seed, bins)


def check_limits(problem: JointProblem, nodes: int) -> None:
    """Raise `InputError` where the limits contradict each other, whatever the similarities."""
    config, limits = problem.config, problem.limits
    key = problem.budget_key
    most = (
        len(problem.rows) * (len(problem.rows) - 1) // 2
        if problem.symmetric
        else len(problem.rows) * len(problem.columns)
    )
    if limits.budget > most:
        raise InputError(
            f"pairs.joint: {_sides_text(problem)} make {most} pairs, the budget asks for {limits.budget}; lower {key}"
        )
    narrow = min(len(problem.rows), len(problem.columns))
    if not problem.symmetric and limits.max_per_item is not None and limits.budget > limits.max_per_item * narrow:
        raise InputError(
            f"pairs.joint.max_per_item: {_sides_text(problem)} in at most {limits.max_per_item} pairs each make at "
            f"most {limits.max_per_item * narrow} pairs, the budget asks for {limits.budget}; raise it or lower {key}"
        )
    if limits.max_per_item is not None and 2 * limits.budget > limits.max_per_item * nodes:
        raise InputError(
            f"pairs.joint.max_per_item: {nodes} items in at most {limits.max_per_item} pairs each make at most "
            f"{limits.max_per_item * nodes // 2} pairs, the budget asks for {limits.budget}; raise it or lower {key}"
        )
    if config.min_per_item * nodes > 2 * limits.budget:
        raise InputError(
            f"pairs.joint.min_per_item: {nodes} items in at least {config.min_per_item} pairs each take at least "
            f"{-(-config.min_per_item * nodes // 2)} pairs, the budget gives {limits.budget}; lower it or raise {key}"
        )
    if limits.connected and limits.budget < nodes - 1:
        raise InputError(
            f"pairs.joint.connected: it takes {nodes - 1} pairs to connect {nodes} items, the budget gives "
            f"{limits.budget}; raise {key} or set connected: false"
        )


def check_least(problem: JointProblem, degree: Ints) -> None:
    wanted = problem.config.min_per_item
    if (degree < wanted).any():
        raise InputError(
            f"pairs.joint.min_per_item: {int((degree < wanted).sum())} of {len(degree)} items are in fewer than "
            f"{wanted} pairs (the fewest: {int(degree.min())}); {how_to_mend(problem)}, raise {problem.budget_key} or "
            "lower it"
        )


def limits_text(problem: JointProblem) -> str:
    low, high = problem.band
    capped = f" and max_per_item {problem.limits.max_per_item}" if problem.limits.max_per_item else ""
    within = " within the groups" if problem.rows.groups is not None else ""
    return f"the similarity band [{low:g}, {high:g}]{capped}{within}"


def _sides_text(problem: JointProblem) -> str:
    if problem.symmetric:
        return f"{len(problem.rows)} items"
    return f"{len(problem.rows)} items on one side and {len(problem.columns)} on the other"


def how_to_mend(problem: JointProblem) -> str:
    mends = ["raise group_size"] if problem.rows.groups is not None else []
    mends += ["raise max_per_item"] if problem.limits.max_per_item else []
    mends += ["widen min_similarity/max_similarity"] if problem.band != (-1, 1) else []
    return ", ".join(mends) or "add items of other instructions"


def too_few(problem: JointProblem, count: int, *, exact: bool = True, most: int | None = None) -> InputError:
    """The error of a band, groups or limits that leave fewer pairs than the budget, of `most` candidates or all."""
    where = limits_text(problem)
    said = (
        f"{where} leaves {count} pairs" if not problem.limits.max_per_item else f"in {where} {count} pairs were found"
    )
    if not exact:
        said += " among the approximate candidates (raise approximate_above to look at all pairs)"
    elif most is not None:
        said += f" among the {most:,} candidates that are looked at most"
    return InputError(
        f"pairs.joint: {said}, the budget asks for {problem.limits.budget}; {how_to_mend(problem)} or lower "
        f"{problem.budget_key}"
    )
