"""What the paper says, in numbers, and whether the sandbox says the same.

A claim is that one group of models has a higher win rate than another. The sandbox agrees where the 95 % interval of
the difference (the same instructions resampled for both, and the training seeds of each) lies above zero, disagrees
where it lies below, and cannot tell where it holds zero. Only
signs and shapes are compared: the paper's models, data and judges are others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jpo_ray.evaluation.experiment_results import Group, Measured, difference
from jpo_ray.evaluation.win_rates import interval_text

AGREES, DISAGREES, OPEN = "agrees", "disagrees", "not told apart"
RESAMPLES = 2000


@dataclass(frozen=True)
class Claim:
    """One line of the comparison."""

    says: str
    paper: str
    here: str
    verdict: str


@dataclass(frozen=True)
class Found:
    """One experiment, carried out."""

    measured: Sequence[Measured]
    groups: Sequence[Group]
    seconds: float | None  # None: not timed

    def members(self, entry: str, **settings: object) -> list[Measured]:
        """The repetitions of one group. Raises `KeyError` where there are none."""
        found = [
            each
            for each in self.measured
            if each.entry == entry and all(each.settings.get(key) == value for key, value in settings.items())
        ]
        if not found:
            raise KeyError(f"{entry} {settings}")
        return found


def higher(says: str, paper: str, first: Sequence[Measured], second: Sequence[Measured]) -> Claim:
    """That `first` has a higher win rate than `second`."""
    points, (low, high) = difference(first, second, RESAMPLES, 0)
    here = f"{points:+.1f} ({interval_text([low, high], '+.1f')})"
    if low is None or high is None:
        return Claim(says, paper, "no valid judgments", OPEN)
    return Claim(says, paper, here, AGREES if low > 0 else DISAGREES if high < 0 else OPEN)


def all_claims(found: Mapping[str, Found]) -> list[Claim]:
    """Every claim of the paper that the experiments bear on; differences in points of win rate."""
    main, protocols, sizes = found["objectives"], found["protocols"], found["data_scaling"]
    sft = main.members("sft")
    smallest, largest = (end(_sizes(sizes)) for end in (min, max))
    return [
        higher("JPO beats SFT (Table 5)", "+29.1 TL;DR, +17.6 Helpful", main.members("jpo"), sft),
        higher("DPO beats SFT (Table 5)", "+23.9, +14.3", main.members("dpo"), sft),
        higher("KTO beats SFT (Table 5)", "+27.6, +14.1", main.members("kto"), sft),
        higher(
            "JPO beats DPO at equal epochs (Table 5)", "+5.2, +3.3", main.members("jpo"), main.members("dpo")
        ),
        higher(
            "JPO beats KTO at equal epochs (Table 5)", "+1.5, +3.5", main.members("jpo"), main.members("kto")
        ),
        higher(
            "Joint comparisons alone align (Figure 5)", "+27.9 over SFT", protocols.members("joint"),
            protocols.members("sft"),
        ),
        higher(
            "Joint comparisons alone beat conditional ones alone (Figure 5)", "+4.0", protocols.members("joint"),
            protocols.members("conditional"),
        ),
        higher(
            "Half conditional, half joint beats conditional at equal size (Figure 6)", "+4.2",
            protocols.members("both-half"), protocols.members("conditional"),
        ),
        higher(
            "More comparisons help (Figure 7)", "+29.3 from 100 to 9,000",
            sizes.members("jpo", max_train_comparisons=largest), sizes.members("jpo", max_train_comparisons=smallest),
        ),
        *(_learning_rates(found["sweep"]) if "sweep" in found else []),
    ]  # fmt: skip


def _learning_rates(sweep: Found) -> list[Claim]:
    """At the paper's beta."""
    best, *others = (sweep.members("jpo", learning_rate=rate, beta=0.1) for rate in (5e-5, 1e-5, 5e-4))
    says = "A learning rate of 5e-5 beats one of {} (the best of three there; beta 0.1)"
    return [
        higher(says.format(rate), "no numbers", best, some) for rate, some in zip(("1e-5", "5e-4"), others, strict=True)
    ]


def highest(found: Found) -> str:
    """The group with the highest win rate, and how many others it is told apart from."""
    trained = [group for group in found.groups if group.entry != "sft" and group.win_rate is not None]
    if len(trained) < 2:
        return ""
    first, *rest = sorted(trained, key=lambda group: -(group.win_rate or 0))
    best = found.members(first.entry, **first.settings)
    verdicts = [higher("", "", best, found.members(group.entry, **group.settings)).verdict for group in rest]
    named = ", ".join(f"{name} {value}" for name, value in first.settings.items()) or first.entry
    return (
        f"The highest rate here, {first.win_rate:.1f}, is that of {named}: told apart from {verdicts.count(AGREES)} of "
        f"{len(rest)} others"
    )


def _sizes(found: Found) -> list[int]:
    return [size for each in found.measured if (size := each.settings.get("max_train_comparisons"))]
