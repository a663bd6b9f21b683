"""What is minimised: the objectives by name, with the keys that each takes and what it needs.

The losses are the functions of `objectives/`; this is what can be known and checked of them without loading them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jpo_ray.config_base import NonNegative, Positive, Section

ObjectiveName = Literal[
    "jpo", "dpo", "cdpo", "robust", "ipo", "slic", "dpop", "odpo", "rdpo",  # margins of log-ratios
    "kto", "sppo", "apo_zero", "apo_down",  # targets of log-ratios
    "simpo", "orpo", "sft",  # no reference
    "lipo", "pro", "rpo",  # more than two items at once
]  # fmt: skip

# What a loss reads besides the items' log-probs: those of the reference; the instruction's part; mismatched items; by
# how much an item is better; embeddings of the instructions.
Reads = Literal["reference", "instruction", "mismatched", "gap", "embedding"]

# What a term of the loss joins: one item, the two of an edge, all responses of an instruction, or the whole batch.
Joins = Literal["items", "edges", "lists", "batch"]
WIDER: tuple[Joins, ...] = ("items", "edges", "lists", "batch")  # each joins more than the one before

WHOLE: frozenset[Reads] = frozenset({"reference", "instruction"})  # log-ratios, of whole sequences on joint edges
RATIO: frozenset[Reads] = frozenset({"reference"})  # log-ratios of responses given their instruction
POLICY: frozenset[Reads] = frozenset()  # the policy's own log-probs
ONE_LIST = (
    "ranks items by shares of wins, which order only items that met the same others, as an instruction's responses do "
    "and the ends of joint comparisons do not"
)


@dataclass(frozen=True)
class Objective:
    keys: Mapping[str, float] = field(default_factory=lambda: {"beta": 0.1})  # that it takes, with their defaults
    reads: frozenset[Reads] = WHOLE
    joins: Joins = "edges"
    conditional_only: str | None = None  # why it takes no joint comparisons; None: it does


OBJECTIVES: dict[str, Objective] = {
    "jpo": Objective(),
    "dpo": Objective(
        reads=RATIO,
        conditional_only="compares responses of one instruction; set protocols: [conditional], or objective: jpo for "
        "joint ones",
    ),
    "cdpo": Objective({"beta": 0.1, "label_smoothing": 0.1}),
    "robust": Objective({"beta": 0.1, "label_smoothing": 0.1}),
    "ipo": Objective(),
    "slic": Objective(),
    "dpop": Objective({"beta": 0.3, "dpop_lambda": 50.0}),
    "odpo": Objective({"beta": 0.1, "odpo_alpha": 1.0}, reads=WHOLE | {"gap"}),
    "rdpo": Objective({"beta": 0.1, "rdpo_alpha": 0.01}),
    "kto": Objective(
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, reads=RATIO | {"mismatched"}, joins="items"
    ),
    "sppo": Objective({"beta": 0.001}, joins="items"),
    "apo_zero": Objective(joins="items"),
    "apo_down": Objective(),
    "simpo": Objective({"beta": 2.0, "simpo_gamma": 1.0}, reads=POLICY),
    "orpo": Objective(reads=POLICY),
    "sft": Objective({}, reads=POLICY, joins="items"),
    "lipo": Objective(
        reads=RATIO,
        joins="lists",
        conditional_only=f"{ONE_LIST}, and its log-ratios hold a partition function that cancels only within one; "
        "set protocols: [conditional]",
    ),
    "pro": Objective(
        {"beta": 1.0}, reads=POLICY, joins="lists", conditional_only=f"{ONE_LIST}; set protocols: [conditional]"
    ),
    "rpo": Objective({"beta": 0.1, "rpo_temperature": 0.5}, reads=RATIO | {"embedding"}, joins="batch"),
}


class ObjectiveConfig(Section):
    """An objective and its own keys; those that it does not take are refused."""

    objective: ObjectiveName = "jpo"
    weight: Positive = 1.0  # of its loss, where there are others beside it
    beta: Positive = 0.1  # default: the objective's own
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None  # cdpo, robust: share of wrong labels
    dpop_lambda: NonNegative | None = None
    odpo_alpha: NonNegative | None = None
    rdpo_alpha: NonNegative | None = None  # rewards are less by so much per token
    desirable_weight: Positive | None = None  # kto
    undesirable_weight: Positive | None = None  # kto
    simpo_gamma: NonNegative | None = None
    rpo_temperature: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _keys_are_the_objectives(cls, values: Any) -> Any:
        """Fill in the objective's defaults. ValueError for a key that belongs to another."""
        name = values.get("objective", "jpo") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in OBJECTIVES:
            return values
        defaults = OBJECTIVES[name].keys
        for key in KEYS - defaults.keys():
            if values.get(key) not in (None, cls.model_fields[key].default):
                owners = [other for other, objective in OBJECTIVES.items() if key in objective.keys]
                others = "" if key == "beta" else f"; {key} is for {', '.join(owners)}"
                raise ValueError(f"{name} takes no {key}{others}")
        return values | {key: default for key, default in defaults.items() if values.get(key) is None}

    def parameters(self) -> dict[str, float]:
        """The keyword arguments of the loss."""
        return {key: getattr(self, key) for key in OBJECTIVES[self.objective].keys}


KEYS = frozenset(key for objective in OBJECTIVES.values() for key in objective.keys)


class LossConfig(ObjectiveConfig):
    """One objective, or the weighted sum of several."""

    also: list[ObjectiveConfig] = []  # other objectives whose losses are added, each with its own weight and keys
    protocols: list[Literal["conditional", "joint"]] = Field(default=["conditional", "joint"], min_length=1)

    @property
    def terms(self) -> list[ObjectiveConfig]:
        return [self, *self.also]

    @property
    def losses(self) -> str:
        """For people: `jpo`, or `jpo + 0.1 sft`."""
        if not self.also:
            return self.objective
        return " + ".join(f"{term.weight:g} {term.objective}".removeprefix("1 ") for term in self.terms)

    @property
    def reads(self) -> frozenset[Reads]:
        """What the losses need besides the items' log-probs."""
        found: frozenset[Reads] = frozenset().union(*(OBJECTIVES[term.objective].reads for term in self.terms))
        return found if "joint" in self.protocols else found - {"instruction"}

    @property
    def joins(self) -> Joins:
        """The most that a term of the losses joins."""
        return max((OBJECTIVES[term.objective].joins for term in self.terms), key=WIDER.index)

    @model_validator(mode="after")
    def _objectives_take_their_edges(self) -> "LossConfig":
        for term in self.terms:
            reason = OBJECTIVES[term.objective].conditional_only
            if reason and "joint" in self.protocols:
                raise ValueError(f"{term.objective} {reason}")
        names = [term.objective for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"also: each objective once, got {', '.join(names)}")
        return self
