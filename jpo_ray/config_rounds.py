"""On-policy rounds: how many, of what, and against which reference."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jpo_ray.config_base import Count, Positive, Section


class RoundsConfig(Section):
    """Rounds instead of one training on the data's own responses; a number alone is their count."""

    count: Count = 3
    # moved: each round's policy is the next one's reference; fixed: the SFT model is the reference of all rounds.
    reference: Literal["moved", "fixed"] = "moved"
    instructions: Count | None = None  # of each round: the next so many in a random order; default: all, every time
    samples_per_instruction: Annotated[int, Field(ge=2)] = 2
    temperature: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_enough(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value
